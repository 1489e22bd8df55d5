"""Whole networks in other engines: candidates, eight bits, loops, near-ties, engines that leave."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.runtime.flat import flatten
from gossamer.runtime.plan import choose, dense, dense_openvino, reference
from gossamer.runtime.plan.arrays import difference
from gossamer.runtime.plan.capture import capture
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.plan.explain import table
from gossamer.runtime.plan.fuse import fused
from gossamer.runtime.plan.graph import Graph
from gossamer.runtime.plan.kernels import KERNELS
from gossamer.runtime.plan.program import Program, steps_of
from gossamer.runtime.plan.rounded import rounded
from gossamer.runtime.plan.wholes import _dense_runs
from resealed import resealed

THERE = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason="not installed"),
    )
    for name in ("onnxruntime", "openvino")
]
ORT = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="not installed")


class Residual(nn.Module):
    """A strided shortcut, an addition, a pool in codes, a map flattened, and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.short, self.third = nn.Conv2d(8, 6, 1, 2), nn.Conv2d(8, 6, 3, 2, 1, groups=2)
        self.hidden, self.out = nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        y = F.relu(self.second(y) + y)
        y = F.max_pool2d(F.relu6(self.third(y) + self.short(y)), 2)
        return self.out(F.relu(self.hidden(y.flatten(1))))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture(scope="module")
def inputs() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=draw) for _ in range(3)]


def lowered(net: nn.Module, x: Tensor) -> tuple[Graph, tuple[Any, ...]]:
    flat, tensors, _ = flatten(net, x)
    made = capture(flat, tensors)
    return fused(made.graph), made.islands


def test_eight_bits_are_rounded_at_both_sides(net: nn.Module, inputs: list[Tensor]) -> None:
    graph, islands = lowered(net, inputs[0])
    eight = rounded(graph, islands, [[x.numpy()] for x in inputs], ())
    kinds = [n.op for n in eight.nodes]
    assert kinds.count("conv_w8") == 4
    assert kinds.count("linear_w8") == 2
    made = {n.name: n for n in eight.nodes}
    for node in eight.nodes:
        if node.op.endswith("_w8"):
            assert made[node.inputs[0]].op == "round_u8"
            assert np.abs(eight.constants[node.inputs[1]]).max() == 64
        if node.op == "binary":
            assert {made[n].op for n in node.inputs} == {"round_u8"}
    pool = next(n for n in eight.nodes if n.op == "max_pool")
    before, after = made[pool.inputs[0]], made[f"{pool.name}/rounded"]
    assert before.attributes == after.attributes  # the same codes go through
    assert eight.outputs[0] in made
    assert made[eight.outputs[0]].op == "linear_w8"  # its floats are given
    x = inputs[1].numpy()
    wanted = net(inputs[1]).detach().numpy()
    for run in (
        lambda: reference.run(eight, [x])[eight.outputs[0]],
        lambda: Program(eight, steps_of(eight, {n.name: "numpy" for n in eight.nodes}, 1))([x], 4)[
            0
        ],
    ):
        assert difference(wanted, run()) < 0.1
    kept = next(n.name for n in graph.nodes if n.op == "conv" and n.inputs[3])
    fewer = rounded(graph, islands, [[x]], (kept,))
    assert [n.op for n in fewer.nodes].count("conv_w8") == 3


def test_weights_on_a_grid_keep_it() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    steps = torch.rand(8, 1) + 0.1
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-5, 6, (8, 64)) * steps)
    x = torch.randn(2, 64)
    graph, islands = lowered(layer, x)
    eight = rounded(graph, islands, [[x.numpy()]], ())
    node = next(n for n in eight.nodes if n.op == "linear_w8")
    got = eight.constants[node.inputs[1]] * eight.constants[node.inputs[2]][:, None]
    np.testing.assert_allclose(got, layer.weight.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", THERE)
def test_engines_compute_the_eight_bits(net: nn.Module, inputs: list[Tensor], kernel: str) -> None:
    graph, islands = lowered(net, inputs[0])
    eight = rounded(graph, islands, [[x.numpy()] for x in inputs], ())
    theirs = Program(eight, steps_of(eight, {n.name: kernel for n in eight.nodes}, 1))
    plain = Program(eight, steps_of(eight, {n.name: "numpy" for n in eight.nodes}, 1))
    for count in (1, 4, 3):
        x = inputs[0].numpy()[:count]
        (got,), (wanted,) = theirs([x], count), plain([x], count)
        assert difference(wanted, got) < 0.02  # a code that is rounded to the other side


class Speech(nn.Module):
    def __init__(self, cell: type[nn.Module], **more: Any) -> None:
        super().__init__()
        self.rnn = cell(6, 8, 2, **more)
        self.out = nn.Linear(16 if more.get("bidirectional") else 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, last = self.rnn(x)
        return (self.out(y), *(last if isinstance(last, tuple) else (last,)))


class Given(nn.Module):
    """A first state that is an input, and a single step."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = cell(6, 8)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        state = (h, 2 * h) if isinstance(self.rnn, nn.LSTM) else h
        return self.rnn(x, state)[0][-1]


LOOPS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Speech(nn.LSTM, batch_first=True),
    "both ways": lambda: Speech(nn.LSTM, bidirectional=True),
    "gru": lambda: Speech(nn.GRU, bidirectional=True),
    "no bias": lambda: Speech(nn.GRU, bias=False, batch_first=True),
    "given": lambda: Given(nn.LSTM),
    "given to gru": lambda: Given(nn.GRU),
}


@pytest.mark.parametrize("kernel", THERE)
@pytest.mark.parametrize("form", LOOPS)
def test_loops_of_engines(form: str, kernel: str) -> None:
    torch.manual_seed(0)
    net = LOOPS[form]().eval()
    given = (torch.randn(5, 2, 6), torch.randn(1, 2, 8)) if "given" in form else (
        torch.randn(2, 5, 6) if net.rnn.batch_first else torch.randn(5, 2, 6),
    )  # fmt: skip
    made = compile_network(net, given, engine=kernel)
    loops = [n for n in made.graph.nodes if n.op in ("lstm", "gru")]
    assert loops
    for node in loops:  # OpenVINO computes those that run backwards otherwise
        backwards = kernel == "openvino" and node.attributes["reverse"]
        assert made.facts.chosen[node.name] == ("numpy" if backwards else kernel)
    with torch.no_grad():
        wanted = net(*given)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (wanted, made(*given))),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@ORT
def test_a_loop_goes_with_its_product_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Speech(nn.LSTM, batch_first=True).eval(), torch.randn(2, 5, 6)
    made = compile_network(net, x, rounds=1)
    assert {"plan", "onnxruntime"} <= set(made.facts.whole)
    loops = [row for row in made.facts.rows if row["op"] == "lstm"]
    plan = compile_network(net, x, engine="plan", rounds=1)
    loops = [row for row in plan.facts.rows if row["op"] == "lstm"]
    assert "with the product of its inputs alone" in loops[0]["refused"]["onnxruntime"]
    path = compile_network(net, x, engine="onnxruntime").save(tmp_path / "net.plan")
    data = path.read_bytes()
    product = next(n.name for n in plan.graph.nodes if n.op == "linear")
    path.write_bytes(resealed(data, lambda h: h["facts"]["chosen"].update({product: "numpy"})))
    with pytest.raises(FormatError, match="with the product of its inputs alone"):
        gossamer.runtime.load(path)
    path.write_bytes(data)
    np.testing.assert_allclose(gossamer.runtime.load(path)(x.numpy())[0], net(x)[0].detach(),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def second(calls: list[Any], *settings: Any) -> list[float]:
    """Times by which onnxruntime's eight bits win: they come right behind the plan."""
    return [0.5 if i == 1 else 1.0 for i in range(len(calls))]


@ORT
def test_auto_compares_eight_bits_of_engines(
    net: nn.Module, inputs: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.runtime.plan.door.timed", second)
    settings: dict[str, Any] = {"precision": "int8", "calibration": inputs, "rounds": 1}
    made = compile_network(net, inputs[0][:1], **settings)
    assert {"plan", "onnxruntime-int8", "onnxruntime", "torch"} <= set(made.facts.whole)
    assert (made.facts.engine, made.facts.precision) == ("onnxruntime-int8", "int8")
    text = made.explain()
    for part in ("runs     onnxruntime-int8", "needs    onnxruntime", "on the calibration inputs",
                 "own eight bits", "conv_w8"):  # fmt: skip
        assert part in text
    with torch.no_grad():
        assert (made(inputs[1]) - net(inputs[1])).abs().max() < 0.1 * net(inputs[1]).abs().max()
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        made(torch.full((1, 3, 8, 8), torch.nan))
    path = made.save(tmp_path / "net.plan")
    read = gossamer.runtime.load(path)
    np.testing.assert_array_equal(read(inputs[1].numpy()), made(inputs[1]).numpy())
    # where answers are too far they are no candidates
    strict = compile_network(net, inputs[0][:1], **settings, floor=1.0)
    assert strict.facts.precision == "float32"
    assert any("onnxruntime-int8 was refused: int8 is too far" in n for n in strict.facts.notes)


HOSTILE = {
    "a scale": lambda h: change(h, "round_u8", 3, "scale", 0.0),
    "a scale that is none": lambda h: change(h, "round_u8", 3, "scale", "1"),
    "a scale without end": lambda h: change(h, "round_u8", 3, "scale", 1e400),
    "a zero point": lambda h: change(h, "round_u8", 3, "zero", 256),
    "half a zero point": lambda h: change(h, "round_u8", 3, "zero", 0.5),
    "a weight of floats": lambda h: swapped(h, "linear_w8"),
    "a computed weight": lambda h: of(h, "conv_w8")[1].__setitem__(1, h["inputs"][0]),
}


def of(header: dict[str, Any], op: str) -> list[Any]:
    return next(n for n in header["nodes"] if n[0] == op)


def change(header: dict[str, Any], op: str, place: int, key: str, value: object) -> None:
    of(header, op)[place][key] = value


def swapped(header: dict[str, Any], op: str) -> None:
    names = of(header, op)[1]
    names[1], names[2] = names[2], names[1]


@ORT
def test_files_of_eight_bits_that_are_hostile(
    net: nn.Module, inputs: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.runtime.plan.door.timed", second)
    made = compile_network(
        net, inputs[0][:1], precision="int8", calibration=inputs, rounds=1, seconds=0.01
    )
    path = made.save(tmp_path / "net.plan")
    data = path.read_bytes()
    for changed, kernel in itertools.product(HOSTILE.values(), ("numpy", "onnxruntime")):

        def both(header: dict[str, Any], changed=changed, kernel=kernel) -> None:
            header["facts"]["chosen"] = dict.fromkeys(header["facts"]["chosen"], kernel)
            changed(header)

        path.write_bytes(resealed(data, both))
        with pytest.raises(FormatError, match=r"net\.plan"):
            gossamer.runtime.load(path)


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes an engine as if it were not installed."""

    def leave(*names: str) -> None:
        for module in (dense, dense_openvino):
            monkeypatch.setattr(module, "find_spec", lambda n: None if n in names else object())

    return leave


@ORT
def test_an_engine_that_is_gone_is_replaced_and_named(
    net: nn.Module, inputs: list[Tensor], tmp_path: Path, gone: Callable[..., None]
) -> None:
    x = inputs[0]
    path = compile_network(net, x, engine="onnxruntime").save(tmp_path / "net.plan")
    assert "needs    onnxruntime" in gossamer.runtime.load(path).explain()
    gone("onnxruntime", "openvino")
    read = gossamer.runtime.load(path)
    assert any(
        "kernel onnxruntime cannot be used here (onnxruntime is not installed; pip install "
        "'gossamer[onnx]'): numpy in its place" in note
        for note in read.facts.notes
    )
    np.testing.assert_allclose(read(x.numpy()), net(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="engine='openvino': openvino is not installed"):
        compile_network(net, x, engine="openvino")
    with pytest.raises(ArgumentError, match="engine='onnxruntime': onnxruntime is not installed"):
        compile_network(net, x, engine="onnxruntime")
    made = compile_network(net, x, rounds=1)
    assert set(made.facts.whole) == {"plan", "torch"}
    assert "needs" not in made.explain()


def test_another_dense_engine_stands_in(
    net: nn.Module, inputs: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO is made up: the portable kernels under its name."""
    x, plain = inputs[0], KERNELS["numpy"]
    fake = type(plain)(
        KERNELS["openvino"].serves, plain.pack, plain.bind, package="openvino", apart=False
    )
    monkeypatch.setitem(KERNELS._entries, "openvino", fake)
    made = compile_network(net, x, engine="openvino")
    assert set(made.facts.chosen.values()) == {"openvino"}
    assert "openvino" in table(made.graph, made.facts)
    path = made.save(tmp_path / "net.plan")
    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    data = resealed(path.read_bytes(), lambda h: h["facts"].update(
        chosen=dict.fromkeys(h["facts"]["chosen"], "onnxruntime")))  # fmt: skip
    path.write_bytes(data)
    read = gossamer.runtime.load(path)
    assert any(note.endswith("openvino in its place") for note in read.facts.notes)
    np.testing.assert_allclose(read(x.numpy()), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_engines_that_change_make_a_plan_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, said = nn.Sequential(nn.Linear(64, 10)).eval(), torch.randn(1, 64), []
    file = tmp_path / "model.gsm"
    gossamer.pack.pack(net, file).close()

    def compiled() -> None:
        said.clear()
        gossamer.compile(file, x, model=net, engine="plan", rounds=1, say=said.append)

    versions = {"onnxruntime": "1.2", "openvino": "2026.4"}
    monkeypatch.setattr("gossamer.compression.compiled._version", versions.__getitem__)
    compiled()
    compiled()
    assert said == []
    versions["openvino"] = "not installed"
    compiled()
    assert "made anew" in said[0]
    assert "'openvino': '2026.4'" in said[0]
    assert "'openvino': 'not installed'" in said[0]
    assert len(list(tmp_path.glob("*.plan"))) == 1


def test_dense_runs(net: nn.Module, inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_openvino, "find_spec", lambda name: object())
    graph, _ = lowered(net, inputs[0])
    assert len(_dense_runs(graph)) == len(graph.nodes)
    names = [n.name for n in graph.nodes]
    second = next(n for n in graph.nodes if n.op == "conv" and n.inputs[0] not in graph.inputs)
    graph.constants[second.inputs[1]][1:] = 0  # type: ignore[index]
    left = _dense_runs(graph)
    assert second.name not in left
    assert names[-1] in left


def test_near_ties_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    looks = iter([[[1.0], [1.04], [2.0]], [[1.0], [0.7]]])

    def interleaved(calls: Any, **settings: Any) -> list[list[float]]:
        asked.append(len(calls))
        return next(looks)

    monkeypatch.setattr(choose, "interleaved", interleaved)
    assert choose.timed([print] * 3, 1, 5, 0.1) == [1000.0, 700.0, 2000.0]
    assert asked == [3, 2]
    looks = iter([[[1.0], [1.01]]] * 9)
    asked.clear()
    choose.timed([print] * 2, 1, 5, 0.1)
    assert asked == [2, 2, 2]  # and no more
    assert choose.timed([], 1, 5, 0.1) == []
