"""Linear layers of few bits in plans: offered, small in files, refused where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gossamer
from gossamer.core.errors import FormatError
from gossamer.core.kernels import kernel
from gossamer.runtime.plan import reference
from gossamer.runtime.plan.arrays import difference
from gossamer.runtime.plan.coding import Coded, coded
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.plan.graph import Graph, Node, Value, resolved
from gossamer.runtime.plan.kernels import KERNELS, candidates
from gossamer.runtime.plan.plan import Plan
from gossamer.runtime.plan.program import Program, steps_of
from resealed import resealed

built = pytest.mark.skipif(kernel("few_bits") is None, reason="the compiled kernels are not built")
RULES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "ternary": lambda w, rng: np.where(np.abs(w) < 0.5, 0, np.where(w > 0, 0.7, -0.3)),
    "ternary rows": lambda w, rng: np.sign(np.round(w)) * rng.random((len(w), 1)),
    "shared": lambda w, rng: rng.standard_normal(16)[rng.integers(0, 16, w.shape)],
    "grid": lambda w, rng: np.clip(np.round(w * 3), -8, 7) * rng.random((len(w), 1)),
}


def weight_of(rule: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return RULES[rule](rng.standard_normal(shape), rng).astype(np.float32)


@built
@given(st.data())
@settings(max_examples=25)
def test_layers_are_the_oracle_s(data: st.DataObject) -> None:
    draw = data.draw
    ins, outs, batch = draw(st.integers(64, 400)), draw(st.integers(1, 40)), draw(st.integers(1, 6))
    middle = draw(st.sampled_from([(), (3,)]))
    weight = weight_of(draw(st.sampled_from(list(RULES))), (outs, ins), draw(st.integers(0, 99)))
    rng = np.random.default_rng(1)
    constants = {"@w": weight, "@b": rng.standard_normal(outs).astype(np.float32)}
    inputs = ("x", "@w", draw(st.sampled_from(["", "@b"])), draw(st.sampled_from(["", "r"])))
    values = {"x": Value((-1, *middle, ins)), "y": Value((-1, *middle, outs))}
    if inputs[3]:
        values["r"] = values["y"]
    kind = draw(st.sampled_from([None, ["relu"], ["gelu"], ["clamp", -1.0, 1.5]]))
    node = Node("linear", inputs, ("y",), {"activation": kind})
    graph = Graph(tuple(values)[::2], ("y",), (node,), values, constants).check()
    assert candidates(graph, node)["few-bits"] == ""
    program = Program(graph, steps_of(graph, {"y": "few-bits"}, draw(st.sampled_from([1, 2]))))
    for _ in range(2):
        given = [
            rng.standard_normal(resolved(values[n].shape, batch)).astype(np.float32)
            for n in graph.inputs
        ]
        (got,) = program(given, batch)
        assert difference(reference.run(graph, given)["y"], got) <= 2e-6


@given(st.data())
@settings(max_examples=60)
def test_arrays_come_back_from_their_bytes(data: st.DataObject) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    kind, most = draw(st.sampled_from(["float32", "int8"])), draw(st.integers(1, 40))
    if draw(st.booleans()):
        book = rng.standard_normal((shape[0], most))
        array = np.take_along_axis(
            book, rng.integers(0, most, (shape[0], int(np.prod(shape[1:])))), 1
        )
        array = array.reshape(shape)
    else:
        array = rng.standard_normal(most)[rng.integers(0, most, shape)]
    array[rng.random(shape) < draw(st.sampled_from([0.0, 0.4, 0.9]))] = 0
    array = (array * 40).astype(kind)
    if kind == "float32":
        array[rng.random(shape) < 0.1] = draw(st.sampled_from([0.0, -0.0, np.nan, np.inf]))
    coding, data_ = coded(array)
    stored = Coded(kind, shape, coding, memoryview(data_), "here")
    assert stored.dense().tobytes() == array.tobytes()
    live = stored.entries()
    assert (live.shape, live.values.dtype) == (shape, array.dtype)
    assert np.array_equal(live.places, np.flatnonzero(array))
    assert live.values.tobytes() == array.reshape(-1)[live.places].tobytes()
    assert stored.density >= live.density  # zeros with a sign
    assert len(data_) <= array.nbytes


def test_bytes_of_arrays_by_hand() -> None:
    array = np.tile(np.array([0, 5, -5, 5], np.int8), 16)
    # two bits a code, one book of four; codes 0, 1, 2, 1 from the lowest bit on
    assert coded(array) == ("few", bytes([2, 0, 0, 5, 251, 0]) + bytes([0b01100100]) * 16)
    assert coded(np.arange(256).astype(np.int8))[0] == "dense"
    rare = np.zeros(4096, np.float32)
    rare[::64] = [1.5, -2.0] * 32
    coding, data = coded(rare)
    assert (coding, len(data)) == ("sparse few", 512 + 2 + 8 + 8)  # bitmap, book, 64 codes of a bit
    many = np.repeat(np.arange(64, dtype=np.float32), 64).reshape(64, 64) + 1
    many[:, ::2] *= -1  # two values in each row, 128 in all
    coding, data = coded(many)
    assert (coding, data[:2], len(data)) == ("few", bytes([1, 1]), 2 + 64 * 8 + 512)
    for wrong in (b"", b"\2", data[:-1], data + b"\0", b"\3" + data[1:], b"\1\2" + data[2:]):
        with pytest.raises(FormatError, match="here"):
            Coded("float32", (64, 64), "few", memoryview(wrong), "here")
    for coding in ("sparse few", "sparse", "zip"):
        with pytest.raises(FormatError, match="here"):
            Coded("float32", (64, 64), coding, memoryview(b"\xff" * 100), "here")


class Net(nn.Module):
    """Ternary, then a code book, then floats."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 96), nn.Linear(96, 80), nn.Linear(80, 5)
        with torch.no_grad():
            self.one.weight.copy_(torch.from_numpy(weight_of("ternary", (96, 64), 0)) * 0.1)
            self.two.weight.copy_(torch.from_numpy(weight_of("grid", (80, 96), 1)) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def with_kernels(made: Plan, path: Path, **names: str) -> Plan:
    """The plan from its file with other kernels for its layers."""
    data = made.save(path).read_bytes()
    nodes = {n.inputs[1].split(".")[0].strip("@"): n.name for n in made.graph.nodes if n.inputs[1:]}
    path.write_bytes(
        resealed(
            data, lambda h: h["facts"]["chosen"].update({nodes[k]: v for k, v in names.items()})
        )
    )
    return gossamer.runtime.load(path)


@built
def test_a_plan_offers_them(net: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    made = compile_network(net, x[:1], engine="plan", rounds=1)
    rows = {row["layer"]: row for row in made.facts.rows}
    assert {"few-bits"} <= set(rows["one"]["ms"]) & set(rows["two"]["ms"])
    assert rows["three"]["refused"]["few-bits"] == "a row has more than 16 values"
    assert "few-bits" in made.explain()
    plan = with_kernels(made, tmp_path / "a.plan", one="few-bits", two="few-bits")
    assert not plan.facts.notes
    with torch.no_grad():
        np.testing.assert_allclose(plan(x.numpy()), net(x).numpy(), rtol=1e-4, atol=1e-5)
    size = (tmp_path / "a.plan").stat().st_size
    codes = 96 * 64 // 4 + 80 * (96 // 2 + 64)  # 2 bits; 4 and a book of 16 floats a row
    floats = sum(p.numel() for p in net.parameters()) - 96 * 64 - 80 * 96
    assert size < codes + 4 * floats + 6000  # the header


@built
def test_a_file_that_names_them_for_other_layers(net: nn.Module, tmp_path: Path) -> None:
    x = torch.zeros(1, 64)
    made = compile_network(net, x, engine="numpy")
    wide = Net().eval()
    with torch.no_grad():
        wide.two.weight[40] = torch.randn(96)  # beyond the rows that are looked at first
    lie = compile_network(wide, x, engine="numpy")
    with pytest.raises(FormatError, match="more than 16 values"):
        with_kernels(lie, tmp_path / "b", two="few-bits")
    plan = with_kernels(made, tmp_path / "c", three="few-bits")
    assert "kernel few-bits cannot be used here (a row has more than 16" in plan.facts.notes[0]
    plan = with_kernels(made, tmp_path / "d", one="few-bits-int8")
    assert "is unknown here" in plan.facts.notes[0]


@built
def test_integer_plans_offer_them_too(net: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(8, 64) for _ in range(4)]
    settings = {"precision": "int8", "calibration": inputs}
    made = compile_network(net, inputs[0][:1], engine="numpy", **settings)
    assert set(made.facts.errors) == {"one", "two", "three"}
    assert all(0 < e < 0.03 for e in made.facts.errors.values())
    layers = [n for n in made.graph.nodes if n.op == "linear_int8"]
    why = [candidates(made.graph, n)["few-bits-int8"] for n in layers]
    assert why == ["", "", "a row has more than 16 values"]
    plan = with_kernels(made, tmp_path / "a", one="few-bits-int8", two="few-bits-int8")
    assert not plan.facts.notes
    for x in inputs:  # sums are exact: the same bits
        np.testing.assert_array_equal(plan(x.numpy()), made(x).numpy())
    measured = compile_network(net, inputs[0][:1], engine="plan", rounds=1, **settings)
    assert measured.facts.errors == made.facts.errors


def test_tables_of_kernels_name_them() -> None:
    assert {"few-bits", "few-bits-int8"} <= set(KERNELS)
