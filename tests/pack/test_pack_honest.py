"""What was given comes back, or is refused by name: views, metadata, arguments, tied tensors."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.compression.inputs import save_safetensors
from gossamer.compression.records import load
from gossamer.compression.weights import read_tensors
from gossamer.core.errors import ArgumentError
from gossamer.pack import Archive, load_into, pack, pack_bytes, unpack
from gossamer.pack import safetensors_io as coded
from gossamer.pack.netfile import NetLayer


class Pair(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        if tied:
            self.b.weight = self.a.weight


def test_a_view_of_the_same_place_with_the_other_sign_is_a_tensor_of_its_own(
    tmp_path: Path,
) -> None:
    z = torch.tensor([1 + 2j, 3 + 4j])
    given = {"a": z.imag, "b": z.conj().imag}  # one place, one stride; b is negated when read
    coded.save_safetensors(given, tmp_path / "c.safetensors")
    save_safetensors(given, tmp_path / "p.safetensors")
    for found in (
        unpack(pack_bytes(given)),
        coded.load_safetensors(tmp_path / "c.safetensors")[0],
        read_tensors(tmp_path / "p.safetensors"),
    ):
        assert {n: t.tolist() for n, t in found.items()} == {"a": [2, 4], "b": [-2, -4]}


@pytest.mark.parametrize("as_safetensors", [False, True])
def test_metadata_is_what_json_holds(tmp_path: Path, as_safetensors: bool) -> None:
    def write(metadata: Any) -> None:
        if as_safetensors:
            coded.save_safetensors({"w": torch.ones(2)}, tmp_path / "w", metadata=metadata)
        else:
            pack_bytes({"w": torch.ones(2)}, metadata=metadata)

    write({"a": [{"b": (1, 2.5, None, True, "é")}]})
    deep: dict[str, Any] = {}
    inner = deep
    for _ in range(5000):
        inner["a"] = inner = {}
    for given, told in [
        ({1: "a", "1": "b"}, "the key 1 is no string"),  # json would keep one of the two
        ({"a": [{None: 1}]}, "the key None is no string"),
        (deep, "nested too deeply"),
        ({"a": float("nan")}, "not JSON"),
    ]:
        with pytest.raises(ArgumentError, match=told):
            write(given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"workers": 1.5}, "workers is 1.5"),
        ({"index_bits": 2.5}, "index_bits is 2.5"),
        ({"context_entries": -1}, "context_entries is -1"),
        ({"profile": ["fast"]}, r"profile \['fast'\] is not one of"),
        ({"seeds": {"w": 3}}, "seeds is no mapping"),
    ],
)
def test_arguments_are_told_by_name(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        pack({"w": torch.ones(2)}, tmp_path / "w.gsm", **given)
    assert not list(tmp_path.iterdir())


def test_a_nested_tensor_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(ArgumentError, match="'w' is a nested tensor"):
        pack_bytes({"w": nested})


def test_a_file_of_two_values_does_not_go_into_one_tied_tensor() -> None:
    apart, model = Pair(tied=False), Pair(tied=True)
    before = model.a.weight.detach().clone()
    with pytest.raises(ArgumentError, match=r"'b\.weight' is tied to 'a\.weight' in the model"):
        load_into(pack_bytes(apart), model)
    assert torch.equal(model.a.weight, before)
    apart.b.load_state_dict(apart.a.state_dict())  # the same values: nothing is lost
    load_into(pack_bytes(apart), model)
    assert torch.equal(model.a.weight, apart.a.weight)
    load_into(pack_bytes(Pair(tied=True)), apart)
    assert torch.equal(apart.a.weight, apart.b.weight)


def test_a_graph_from_before_loading_gives_no_gradients() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    loss = net(torch.ones(1, 3)).sum()
    load_into(pack_bytes(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))), net)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_negated_view_is_read_into() -> None:
    z = torch.zeros(2, dtype=torch.complex64)
    out = z.conj().imag.view(2)
    with Archive(pack_bytes({"w": torch.tensor([1.0, 2.0])})) as archive:
        archive.read_into("w", out)
    assert out.tolist() == [1, 2]


@pytest.mark.parametrize(("file", "model"), [("w.gsm", nn.Linear), (nn.Linear(2, 2), "w.gsm")])
def test_what_is_no_network_and_no_file_is_told(file: Any, model: Any) -> None:
    with pytest.raises(ArgumentError, match=r"must be an nn\.Module"):
        load(file, model)
    with pytest.raises(ArgumentError, match="given as a path or as bytes, not as NoneType"):
        Archive(None)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gsm")
    with pytest.raises(ArgumentError, match="no regular file"):
        Archive(tmp_path / "pipe.gsm")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_and_tiny_values_pack_without_a_warning(dtype: torch.dtype) -> None:
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    w: Tensor = torch.tensor([most, -most, least, 3 * least] * 40, dtype=dtype).reshape(8, 20)
    given = {"w": w, "v": w[0, :2].clone(), "u": torch.full((40, 40), most, dtype=dtype)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = unpack(pack_bytes(given))
    assert all(torch.equal(found[n], t) for n, t in given.items())


def test_a_bias_that_is_not_finite_is_no_net_layer() -> None:
    with pytest.raises(ArgumentError, match="weight or bias holds NaN"):
        NetLayer.of("a", torch.ones(2, 3), torch.tensor([1.0, float("nan")]))
