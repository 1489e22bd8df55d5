"""Recurrent layers in plans: every kernel beside the oracle, networks beside torch, files."""

from __future__ import annotations

import subprocess
import sys
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
from gossamer.runtime.kernels.arrays import dot_products
from gossamer.runtime.plan import reference
from gossamer.runtime.plan.arrays import difference
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.plan.graph import Graph, Node, Value, resolved
from gossamer.runtime.plan.kernels import candidates
from gossamer.runtime.plan.plan import Plan
from gossamer.runtime.plan.program import Program, steps_of
from resealed import resealed

PATHS = ["scalar", "wide", "avx2", *["avx512"] * dot_products()]
BUILT = kernel("recurrent") is not None


def layer(
    op: str, steps: int, units: int, weight: np.ndarray, *, reverse: bool, terms: tuple[str, ...]
) -> Graph:
    """One node; ``terms``: its inputs behind the weight, h and c given, @b a constant."""
    gates = 4 if op == "lstm" else 3
    values = {
        "x": Value((steps, -1, gates * units)),
        "y": Value((steps + (op == "lstm"), -1, units)),
    }
    values |= {n: Value((-1, units)) for n in terms if n in ("h", "c")}
    bias = np.random.default_rng(3).standard_normal(units).astype(np.float32)
    node = Node(op, ("x", "@w", *terms), ("y",), {"reverse": reverse})
    inputs = tuple(n for n in values if n != "y")
    return Graph(inputs, ("y",), (node,), values, {"@w": weight, "@b": bias}).check()


@given(st.data())
@settings(max_examples=40)
def test_layers_are_the_oracle_s(data: st.DataObject) -> None:
    draw = data.draw
    op = draw(st.sampled_from(["lstm", "gru"]))
    units, steps, batch = draw(st.sampled_from([1, 7, 66])), draw(st.integers(1, 4)), draw(
        st.integers(1, 5)
    )  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    weight = rng.standard_normal(((4 if op == "lstm" else 3) * units, units)).astype(np.float32)
    form = draw(st.sampled_from(["dense", "sparse", "ternary"]))
    weight[rng.random(weight.shape) < (0.8 if form == "sparse" else 0)] = 0
    weight = np.sign(np.round(weight)) * np.float32(0.3) if form == "ternary" else weight
    kinds = [["", "h"], ["", "c"]] if op == "lstm" else [["", "@b"], ["", "h"]]
    terms = tuple(draw(st.sampled_from(k)) for k in kinds)
    graph = layer(op, steps, units, weight, reverse=draw(st.booleans()), terms=terms)
    for name, why in candidates(graph, graph.nodes[0]).items():
        if why or (form == "sparse" and "few" in name):  # which looks at every row in packing
            continue
        program = Program(graph, steps_of(graph, {"y": name}, draw(st.sampled_from([1, 2]))))
        for _ in range(2):
            given = [
                rng.standard_normal(resolved(graph.values[n].shape, batch)).astype(np.float32)
                for n in graph.inputs
            ]
            (got,) = program(given, batch)
            assert difference(reference.run(graph, given)["y"], got) <= 4e-6, name


def test_a_step_by_hand() -> None:
    # One unit, no state: i = f = o = s(0) = .5, g = tanh(1): c = .5 * .761594, h = .5 tanh(c).
    weight = np.zeros((4, 1), np.float32)
    graph = layer("lstm", 1, 1, weight, reverse=False, terms=("", ""))
    found = reference.run(graph, [np.array([[[0, 0, 1, 0]]], np.float32)])["y"]
    np.testing.assert_allclose(found.reshape(-1), [0.181700, 0.380797], atol=1e-6)
    # r = s(0) = .5, n = tanh(.2 + .5 * (.5 * 1 + b)), z = s(0): h = .5 n + .5 * 1.
    weight = np.array([[0], [0], [0.5]], np.float32)
    graph = layer("gru", 1, 1, weight, reverse=False, terms=("@b", "h"))
    one, x = np.ones((1, 1), np.float32), np.array([[[0, 0, 0.2]]], np.float32)
    wanted = 0.5 * np.tanh(0.2 + 0.5 * (0.5 + graph.constants["@b"][0])) + 0.5
    np.testing.assert_allclose(reference.run(graph, [x, one])["y"].reshape(-1), wanted, atol=1e-6)


@pytest.mark.skipif(not BUILT, reason="the compiled kernels are not built")
@pytest.mark.parametrize("path", PATHS)
def test_gates(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_ISA", path)
    module = kernel("recurrent")
    # Of every size of numbers, and beyond what float32's exponential holds.
    ends = [0.0, -0.0, 1e-30, 1e-8, 1e-3, 0.3, 0.624, 0.626, 2.0, 9.0, 30.0, 88.0, 120.0, 1e30]
    numbers = np.array([*ends, *(-v for v in ends)], np.float32)
    for gate in range(4):
        x = np.zeros((1, 1, 4 * len(numbers)), np.float32)
        x.reshape(4, -1)[gate] = numbers
        x.reshape(4, -1)[2] += 0.5
        g, h, y = np.zeros(x.shape[1:], np.float32), *(
            np.empty(s, np.float32) for s in ((1, len(numbers)), (2, 1, len(numbers)))
        )  # fmt: skip
        c = np.full_like(h, 0.25)
        weight = np.zeros((4 * len(numbers), len(numbers)), np.float32)
        graph = layer("lstm", 1, len(numbers), weight, reverse=False, terms=("", "c"))
        wanted = reference.run(graph, [x, c])["y"]
        module.lstm(x, 0, g, c, h, y)
        np.testing.assert_allclose(y[0], wanted[0], rtol=1e-6, atol=1e-37)
        np.testing.assert_allclose(c, wanted[1], rtol=1e-6, atol=1e-37)
        assert np.array_equal(h, y[0])
    for bad in (
        {"t": 1}, {"t": -1}, {"g": g[:, 1:]}, {"c": c[:, 1:]}, {"y": y[:, :, 1:]}, {"y": y[:0]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="another shape"):
            module.lstm(**{"x": x, "t": 0, "g": g, "c": c, "h": h, "y": y, **bad})
    with pytest.raises(ValueError, match="another shape"):
        module.gru(x[:, :, : 3 * len(numbers)], 0, g[:, : 3 * len(numbers)], h[0, 1:], h, y)


class Speech(nn.Module):
    """Both directions and the last state."""

    def __init__(self, cell: type[nn.Module] = nn.LSTM, layers: int = 2, **more: bool) -> None:
        super().__init__()
        self.rnn = cell(6, 8, layers, bidirectional=True, **more)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, last = self.rnn(x)
        return (self.out(y), *(last if isinstance(last, tuple) else (last,)))


class Learned(nn.Module):
    """A first state that is a parameter, one that is an input, and the last step alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, batch_first=True)
        self.first = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.first.expand(1, x.shape[0], 8).contiguous()
        return self.rnn(x, (h, c.unsqueeze(0)))[0][:, -1]


class Cells(nn.Module):
    """Cells in a loop of three."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LSTMCell(6, 5), nn.GRUCell(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        state, h = None, x.new_zeros(x.shape[0], 4)
        for t in range(3):
            state = self.one(x[:, t], state)
            h = self.two(state[0], h)
        return torch.cat([h, state[1]], 1)


NETWORKS = {
    "lstm": (lambda: Speech(dropout=0.5), ((5, 2, 6),)),
    "gru": (lambda: Speech(nn.GRU, 1, batch_first=True, bias=False), ((2, 5, 6),)),
    "learned": (Learned, ((2, 4, 6), (2, 8))),
    "cells": (Cells, ((2, 3, 6),)),
}


@pytest.mark.parametrize(
    "name", ["lstm", "gru", "cells", pytest.param("learned", marks=pytest.mark.slow)]
)
def test_networks_are_torch_s(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, sizes = NETWORKS[name]
    net, x = make().eval(), tuple(torch.randn(size) for size in sizes)
    made = compile_network(net, x if len(x) > 1 else x[0], engine="numpy")
    read = gossamer.runtime.load(made.save(tmp_path / "net.plan"))
    for count in (2, *((1, 3) if made.graph.free else ())):
        given = [torch.randn(count if made.graph.free else t.shape[0], *t.shape[1:]) for t in x]
        with torch.no_grad():
            wanted = net(*given)
        for plan in (made, read):
            got = plan(*(t.numpy() for t in given))
            for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (wanted, got)),
                            strict=True):  # fmt: skip
                np.testing.assert_allclose(b, a.numpy(), rtol=1e-4, atol=1e-6)
    assert made.graph.free == (name != "lstm")  # its first dimension is the steps


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_is_left_to_torch() -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(6, 8, proj_size=4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    made = compile_network(Short().eval(), torch.randn(2, 3, 6), engine="plan", rounds=1)
    assert [n.attributes["names"] for n in made.graph.islands] == [["lstm"]]
    assert "a projection of the state" in made.explain()


@pytest.fixture(scope="module")
def small() -> Plan:
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    return compile_network(Small().eval(), torch.randn(2, 4, 6), engine="plan", rounds=1)


CHANGES = {
    "no way": lambda n: n[3].pop("reverse"),
    "a state that is none": lambda n: n[1].__setitem__(2, "x9"),
    "a state of another shape": lambda n: n[1].__setitem__(3, n[1][0]),
    "a matrix of another shape": lambda n: n[1].__setitem__(1, "@rnn.weight_ih_l0"),
    "a matrix that is computed": lambda n: n[1].__setitem__(1, n[1][0]),
    "another cell": lambda n: n.__setitem__(0, "gru"),
}


def test_files(small: Plan, tmp_path: Path) -> None:
    path = small.save(tmp_path / "net.plan")
    data, x = path.read_bytes(), np.random.default_rng(0).standard_normal((3, 4, 6))
    number = next(i for i, n in enumerate(small.graph.nodes) if n.op == "lstm")
    name = small.graph.nodes[number].name
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    code = (
        "import sys, numpy as np, gossamer.runtime\n"
        f"y = gossamer.runtime.load({str(path)!r})(np.load({str(tmp_path / 'x.npy')!r}))\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, y)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    wanted = small(x.astype(np.float32))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted, rtol=1e-5, atol=1e-6)
    for change in CHANGES.values():
        for chosen in ("numpy", "recurrent", "recurrent-rows"):

            def both(header: dict, change=change, chosen=chosen) -> None:
                header["facts"]["chosen"][name] = chosen
                change(header["nodes"][number])

            path.write_bytes(resealed(data, both))
            with pytest.raises(FormatError, match=r"net\.plan"):
                gossamer.runtime.load(path)


def test_the_inputs_part_in_integers() -> None:
    torch.manual_seed(0)
    net, inputs = nn.GRU(6, 8, batch_first=True).eval(), [torch.randn(4, 5, 6) for _ in range(3)]
    made = compile_network(net, inputs[0][:1], engine="numpy", precision="int8", calibration=inputs)
    kinds = [n.op for n in made.graph.nodes]
    assert (kinds.count("linear_int8"), kinds.count("gru")) == (1, 1)
    assert all(0 < e < 0.03 for e in made.facts.errors.values())
    with torch.no_grad():
        for a, b in zip(net(inputs[0]), made(inputs[0]), strict=True):
            assert (a - b).abs().max() < 0.05 * a.abs().max()
