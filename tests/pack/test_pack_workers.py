"""Several tensors are coded at once; nobody sees it in the bytes."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path

import pytest
import torch

from gossamer.core.errors import ArgumentError
from gossamer.pack import pack, pack_bytes, unpack
from gossamer.pack.write import writer


def network(tensors: int, size: int = 70) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    out = {}
    for i in range(tensors):
        w = torch.randn(size, size, generator=g)
        out[f"{i}.pruned"] = w * (w.abs() > 1)
        out[f"{i}.shared"] = torch.round(w * 2) / 8
        out[f"{i}.bias"] = w[0].clone()
    return out


@pytest.mark.parametrize("profile", ["smallest", "fast", "huffman"])
def test_the_same_bytes_and_the_same_progress_for_any_number_of_workers(
    tmp_path: Path, profile: str
) -> None:
    state, told = network(4), []
    for workers in (1, 2, 5):
        calls: list[tuple[str, int, int]] = []
        path = tmp_path / f"{workers}.gsm"
        pack(
            state,
            path,
            profile=profile,
            workers=workers,
            progress=lambda *call, calls=calls: calls.append(call),
        ).close()
        assert path.read_bytes() == pack_bytes(state, profile=profile, workers=workers)
        told.append((path.read_bytes(), calls))
    assert told[0] == told[1] == told[2]
    assert told[0][1] == [(name, i + 1, len(state)) for i, name in enumerate(state)]
    assert all(torch.equal(t, state[n]) for n, t in unpack(told[0][0]).items())
    assert len(list(tmp_path.iterdir())) == 3


def test_workers_are_threads_and_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    real = writer._code

    def noted(*given: object) -> object:
        seen.add(threading.current_thread().name.partition("_")[0])
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "_code", noted)
    pack_bytes(network(1), workers=1)
    assert seen == {"MainThread"}
    seen.clear()
    pack_bytes(network(1), workers=2)
    assert seen == {"pack"}


def test_by_default_the_cores_that_there_are_and_one_where_torch_has_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer.os, "sched_getaffinity", lambda _: {0, 3, 7}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert writer._workers(None) == 3
    assert writer._workers(2) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert writer._workers(None) == 1
    with pytest.raises(ArgumentError, match="workers is 0, it must be 1 or more"):
        pack_bytes({}, workers=0)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_tensor_that_cannot_be_stored_is_named_and_nothing_is_left(
    tmp_path: Path, workers: int
) -> None:
    state = network(6)
    state["3.bias"][0] = float("nan")
    state["5.bias"][0] = float("inf")
    (tmp_path / "net.gsm").write_bytes(b"as it was")
    with pytest.raises(ArgumentError, match=r"'3\.bias' holds 1 NaN"):
        pack(state, tmp_path / "net.gsm", workers=workers)
    assert (tmp_path / "net.gsm").read_bytes() == b"as it was"
    assert len(list(tmp_path.iterdir())) == 1
    assert not [t for t in threading.enumerate() if t.name.startswith("pack")]


@pytest.mark.parametrize("workers", [1, 2])
def test_sections_wait_on_the_disk_and_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    g = torch.Generator().manual_seed(0)
    state = {f"{i}": torch.randn(128, 256, generator=g) for i in range(64)}
    size = sum(t.nbytes for t in state.values())
    expected = pack_bytes(state, profile="fast")
    monkeypatch.setattr(writer, "_SPOOLED", 1 << 16)
    tracemalloc.start()
    try:
        pack(state, tmp_path / "net.gsm", profile="fast", workers=workers).close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "net.gsm").read_bytes() == expected
    assert peak < size / 2  # beside the network itself
    assert [p.name for p in tmp_path.iterdir()] == ["net.gsm"]
