"""What the encoder leaves out because a sample says that it cannot pay."""

import pytest
import torch

from gossamer.pack import Archive, pack_bytes, unpack
from gossamer.pack.format import raw
from gossamer.pack.format.values import to_bits
from gossamer.pack.write import encode
from gossamer.pack.write.layouts import Settings


def drawn(size: int, book: int, density: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(book, generator=g)[torch.randint(0, book, (size, size), generator=g)]
    return values * (torch.rand(size, size, generator=g) < density)


@pytest.mark.parametrize(
    ("book", "density", "tried"),
    [(16, 1.0, True), (16, 0.05, True), (200, 1.0, True), (3000, 1.0, False)],
)
def test_the_context_coder_runs_where_a_sample_comes_near(
    monkeypatch: pytest.MonkeyPatch, book: int, density: float, tried: bool
) -> None:
    whole: list[int] = []
    real = encode.context_section

    def counted(values) -> bytes:
        whole.append(len(values.bits))
        return b"x" * 10**9 if len(values.bits) == 400 * 400 else real(values)

    monkeypatch.setattr(encode, "context_section", counted)
    dtype, bits = to_bits("w", drawn(400, book, density))
    encode.encode_section(bits, dtype, (400, 400), Settings())
    assert (400 * 400 in whole) is tried
    assert sum(whole) <= 400 * 400 + (1 << 14)


def test_a_slow_level_of_zstd_runs_where_a_fast_one_comes_near(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels: list[tuple[int, int]] = []
    real = raw.compress

    def counted(data, level: int = 19) -> bytes:
        levels.append((level, len(data)))
        return real(data, level)

    monkeypatch.setattr(raw, "compress", counted)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1200, 1000, generator=g)
    dtype, bits = to_bits("w", noise)
    raw.encode_raw(bits, dtype)
    assert (19, 4_800_000) not in levels  # nothing to find in all bytes together


def test_a_sample_never_costs_what_a_repeat_saves() -> None:
    noise = torch.randn(50, 4000, generator=torch.Generator().manual_seed(0))
    assert len(pack_bytes({"w": noise.repeat(10, 1)})) < 1.2 * noise.numel() * 4


@pytest.mark.parametrize("profile", ["smallest", "fast"])
def test_rows_that_repeat_go_through_lzma(profile: str) -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 256, generator=g)[torch.randint(0, 16, (128,), generator=g)]
    data = pack_bytes({"w": rows}, profile=profile)
    assert torch.equal(unpack(data)["w"], rows)
    assert (data[4] == 3) is (profile == "smallest")
    if profile == "smallest":
        assert len(data) < 1.05 * 16 * 256 * 4
        with Archive(data) as archive:
            row = archive.info("w")
        assert row["codec"] == "lzma"
        assert (row["nonzeros"], row["distinct"]) == (rows.numel(), len(rows.unique()))
        assert sum(row["parts"].values()) == row["bytes"]


@pytest.mark.parametrize("kind", ["noise", "pruned", "shared", "half"])
def test_lzma_does_not_run_on_weights_without_repeats(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    noise = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    weights = {
        "noise": noise,
        "pruned": noise * (noise.abs() > 1.3),
        "shared": drawn(300, 15, 0.3),
        "half": noise.bfloat16(),
    }

    def never(*_: object) -> bytes:
        raise AssertionError("it cannot pay here")

    monkeypatch.setattr(encode, "encode_lzma", never)
    pack_bytes({"w": weights[kind]})
