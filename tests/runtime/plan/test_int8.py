"""Integer plans: one layer by hand, random graphs beside the oracle, files, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer import cli
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.runtime.flat import flatten
from gossamer.runtime.kernels.eight_bits import Scale
from gossamer.runtime.plan import calibration, choose, reference
from gossamer.runtime.plan.capture import Captured, capture
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.plan.fuse import fused
from gossamer.runtime.plan.graph import Graph, Node, Value
from gossamer.runtime.plan.int8 import Lowering, able
from gossamer.runtime.plan.kernels import KERNELS, candidates
from gossamer.runtime.plan.plan import Plan
from gossamer.runtime.plan.program import Program, steps_of
from resealed import resealed

CONV = {"stride": [1, 1], "padding": [[0, 0], [0, 0]], "dilation": [1, 1], "groups": 1}


def every_kernel(graph: Graph, inputs: list[np.ndarray], batch: int) -> None:
    """Each node by each kernel, on the oracle's values: the same bits, of floats too."""
    values = {n: np.ascontiguousarray(a) for n, a in reference.run(graph, inputs).items()}
    for node in graph.nodes:
        integers = node.op.endswith("int8") or "quantize" in node.op
        if not integers:
            continue
        for name, why in candidates(graph, node).items():
            if why:
                continue
            names = [n for n in dict.fromkeys(node.inputs) if n and n not in graph.constants]
            packed = KERNELS[name].pack(graph, [node], names, [node.name], 1)
            out = np.full_like(values[node.name], 99, order="C")
            call = KERNELS[name].bind(packed, [node], [values[n] for n in names], [out], batch)
            for _ in range(2):
                call()
                np.testing.assert_array_equal(out, values[node.name], err_msg=f"{name} {node}")


def test_a_convolution_by_hand() -> None:
    # Channels (1.0, 0.5), weights 1.27 and -0.6301, on no grid: steps of .01, codes 127 and -63.
    # Inputs 0 to 12.7: steps of .1, so 10 and 5 are codes 100 and 50, 12.7 and 0 are 127 and 0.
    # Sums: 127 * 100 - 63 * 50 = 9550 and 127 * 127 = 16129, times .01 * .1 plus .5: 10.05, 16.629.
    weight = np.array([[[[1.27]], [[-0.6301]]]], np.float32)
    node = Node("conv", ("x", "@w", "@b", ""), ("y",), {**CONV, "activation": ["relu"]})
    values = {"x": Value((-1, 2, 1, 2)), "y": Value((-1, 1, 1, 2))}
    constants = {"@w": weight, "@b": np.array([0.5], np.float32)}
    graph = Graph(("x",), ("y",), (node,), values, constants).check()
    scales = {"x": Scale(0.1, 0), "y": Scale(0.2, 0)}
    mixed = Lowering(graph, scales).graph_of({"y"})
    x = np.array([[[[10.0, 12.7]], [[5.0, 0.0]]]], np.float32)
    found = reference.run(mixed, [x])
    assert found["x/codes"].tolist() == [[[[[100, 50, 0, 0], [127, 0, 0, 0]]]]]
    assert mixed.constants["@w*y/codes"].reshape(-1).tolist() == [127, -63]
    np.testing.assert_allclose(found["y"].reshape(-1), [10.05, 16.629], rtol=1e-6)
    # Twice, so that codes lie between. 10.05 is code 50 of .2, 16.629 code 83 (16.6). Then 1.27
    # times 10 and 16.6, both plus the value itself: 22.7 and 37.682.
    second = Node("conv", ("y", "@v", "", "y"), ("z",), {**CONV, "activation": None})
    graph = Graph(
        ("x",), ("z",), (node, second), {**values, "z": values["y"]},
        {**constants, "@v": np.full((1, 1, 1, 1), 1.27, np.float32)},
    )  # fmt: skip
    mixed = Lowering(graph, scales).graph_of({"y", "z"})
    assert [n.op for n in mixed.nodes] == ["quantize", "conv_int8", "dequantize", "conv_int8"]
    found = reference.run(mixed, [x])
    assert found["y/codes"].reshape(2, 4)[:, 0].tolist() == [50, 83]
    np.testing.assert_allclose(found["z"].reshape(-1), [22.7, 37.682], rtol=1e-5)
    every_kernel(mixed, [x], 1)


class Mixture(nn.Module):
    """Residuals, pools, a flattened map, grouped and strided layers, and floats between."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        c, d = (int(v) for v in rng.integers(3, 9, 2))
        g = int(rng.choice([1, 2]))
        self.first = nn.Conv2d(3, c, 3, padding=1)
        self.second = nn.Conv2d(c, c, 3, padding=1, bias=bool(rng.integers(2)))
        self.third = nn.Conv2d(c, g * d, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2))
        self.fourth = nn.Conv2d(g * d, g * d, 1, groups=g)
        self.pool = nn.MaxPool2d(3, 2, int(rng.integers(2)), ceil_mode=bool(rng.integers(2)))
        self.turn = [nn.ReLU(), nn.ReLU6(), nn.Identity(), nn.SiLU()][int(rng.integers(4))]
        with torch.no_grad():
            shape = self.features(torch.zeros(1, 3, 11, 9)).shape
        self.head, self.tail = nn.Linear(int(np.prod(shape)), 17), nn.Linear(17, 5)
        for p in self.parameters():
            if p.ndim > 1:
                p.data *= torch.rand(p.shape) < 0.6

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x) + x)
        x = self.turn(self.third(x))
        return self.pool(self.fourth(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(F.relu(self.head(self.features(x).flatten(1))))


def captured(net: nn.Module, x: Tensor) -> Captured:
    flat, tensors, _ = flatten(net.eval(), x)
    made = capture(flat, tensors)
    return Captured(fused(made.graph), made.islands)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
def test_random_graphs(seed: int) -> None:
    torch.manual_seed(seed)
    net, x = Mixture(seed), torch.randn(3, 3, 11, 9)
    graph = captured(net, x).graph
    scales = calibration.scales(graph, (), [[x.numpy()]])
    lowering, layers = Lowering(graph, scales), able(graph)
    rng = np.random.default_rng(seed)
    picks = [{n.name for n in layers}]
    picks += [{n.name for n in layers if rng.random() < 0.6} for _ in range(2)]
    with torch.no_grad():
        wanted = net(x).numpy()
    for chosen in picks:
        mixed = lowering.graph_of(chosen)
        assert sum(n.op in ("conv_int8", "linear_int8") for n in mixed.nodes) == len(chosen)
        every_kernel(mixed, [x.numpy()], 3)
        got = choose.values_of(mixed, (), [x.numpy()], 3)[mixed.outputs[0]]
        assert np.abs(got - wanted).max() <= 0.08 * np.abs(wanted).max()
        (again,) = Program(mixed, steps_of(mixed, choose.plain(mixed), 1))([x.numpy()], 3)
        np.testing.assert_array_equal(got, again)
    assert lowering.graph_of(()) is graph


def test_scales_leave_out_what_lies_far_off() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) - 1

    rng = np.random.default_rng(0)
    even = rng.uniform(0, 8, (4, 3, 200, 200)).astype(np.float32)
    far = np.abs(rng.normal(size=even.shape)).astype(np.float32)
    far[0, 0, 0, 0] = 10.0  # one of 480,000
    graph = captured(Twice(), torch.from_numpy(even)).graph
    for x, low, high in ((even, 7.8, 8.01), (far, 4.0, 6.5)):
        scale = calibration.scales(graph, (), [[x]])[graph.inputs[0]]
        assert low < 127 * scale.scale < high, scale
        assert scale.zero == 0
    # of ends alone, which are codes exactly, nothing is left out
    ends = np.where(even > 4, 1, 0).astype(np.float32)
    assert calibration.scales(graph, (), [[ends]])[graph.inputs[0]].scale == pytest.approx(1 / 127)
    # a value that is always the same has no range
    same = calibration.scales(graph, (), [[np.ones_like(even)]])[graph.inputs[0]]
    assert same == Scale(1.0, 0)


def test_no_float_lies_between_neighbours() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip
    x = torch.randn(2, 3, 14, 14)
    graph = captured(net, x).graph
    scales = calibration.scales(graph, (), [[x.numpy()]])
    mixed = Lowering(graph, scales).graph_of({n.name for n in able(graph)})
    assert [n.op for n in mixed.nodes] == [
        "quantize", "conv_int8", "max_pool_int8", "conv_int8", "max_pool_int8", "reshape",
        "linear_int8", "linear_int8",
    ]  # fmt: skip
    kinds = [mixed.values[n.name].dtype for n in mixed.nodes]
    assert kinds == ["uint8"] * 7 + ["float32"]


class Shortcut(nn.Module):
    """A block whose shortcut takes every second pixel, and zeros for the channels that are new."""

    def __init__(self, before: int, last: int) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.last, self.before, self.end = nn.Conv2d(16, 8, 1), before, last

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.first(x) + 1)
        new = (self.before, 16 - self.before - self.end)
        more = F.pad(x[:, : self.end, ::2, ::2], (0, 0, 0, 0, *new))
        return self.last(F.relu(self.down(x) + more))


@pytest.mark.parametrize(("before", "end", "through"), [(4, 8, True), (0, 4, True), (2, 8, False)])
def test_codes_go_through_slices_and_padding(before: int, end: int, through: bool) -> None:
    torch.manual_seed(before)
    net, x = Shortcut(before, end), torch.randn(3, 3, 7, 9)
    graph = captured(net, x).graph
    scales = calibration.scales(graph, (), [[x.numpy()]])
    mixed = Lowering(graph, scales).graph_of({n.name for n in able(graph)})
    kinds = {n.op: mixed.values[n.name].dtype for n in mixed.nodes if n.op in ("slice", "pad")}
    assert kinds["pad"] == ("uint8" if through else "float32")
    every_kernel(mixed, [x.numpy()], 3)
    got = choose.values_of(mixed, (), [x.numpy()], 3)[mixed.outputs[0]]
    with torch.no_grad():
        wanted = net(x).numpy()
    assert np.abs(got - wanted).max() <= 0.05 * np.abs(wanted).max()


def test_padding_that_is_no_code_is_refused() -> None:
    torch.manual_seed(0)
    net, x = Shortcut(4, 8), torch.randn(1, 3, 7, 9)
    graph = captured(net, x).graph
    scales = calibration.scales(graph, (), [[x.numpy()]])
    mixed = Lowering(graph, scales).graph_of({n.name for n in able(graph)})
    nodes = tuple(
        n._replace(attributes={**n.attributes, "value": 200.0}) if n.op == "pad" else n
        for n in mixed.nodes
    )
    with pytest.raises(FormatError, match=r"200\.0 is no code"):
        mixed._replace(nodes=nodes).check()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 6)
    ).eval()


@pytest.fixture(scope="module")
def inputs() -> list[Tensor]:
    torch.manual_seed(4)
    return [torch.randn(5, 3, 10, 10) for _ in range(3)]


@pytest.fixture(scope="module")
def plan(net: nn.Module, inputs: list[Tensor]) -> Plan:
    return gossamer.compile(
        net, inputs[0][:1], engine="numpy", precision="int8", calibration=inputs
    )


def test_a_plan_says_what_it_loses(net: nn.Module, plan: Plan, inputs: list[Tensor]) -> None:
    assert plan.facts.precision == "int8"
    assert set(plan.facts.errors) == {"0", "4"}
    assert all(0 < e < 0.03 for e in plan.facts.errors.values())
    text = plan.explain()
    for part in ("conv_int8", "int8     2 of 2 layers", "int8     0: error 0.0",
                 "on the calibration", "15 examples", "cosine 0.99"):  # fmt: skip
        assert part in text
    again = gossamer.compile(
        net, inputs[0][:1], engine="numpy", precision="int8", calibration=iter(inputs)
    )
    for x in inputs:
        assert torch.equal(plan(x), again(x))
        with torch.no_grad():
            assert (plan(x) - net(x)).abs().max() < 0.05 * net(x).abs().max()
    with pytest.raises(ArgumentError, match="NaN or infinite, which no code of an int8 plan"):
        plan(torch.full((1, 3, 10, 10), torch.nan))
    assert plan(torch.zeros(0, 3, 10, 10)).shape == (0, 6)


def test_kernels_are_chosen_by_time(net: nn.Module, plan: Plan, inputs: list[Tensor]) -> None:
    made = compile_network(
        net, inputs[0][:1], engine="plan", precision="int8", calibration=inputs, rounds=1
    )
    assert list(made.facts.whole) == ["plan"]
    measured = {row["op"] for row in made.facts.rows if row["ms"]}
    assert measured >= {"max_pool"} or "max_pool_int8" in measured
    assert len(made.facts.kept) <= 2
    with torch.no_grad():
        assert (made(inputs[1]) - net(inputs[1])).abs().max() < 0.05 * net(inputs[1]).abs().max()


def test_a_layer_that_loses_far_more_stays_float32() -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 1), *(nn.Conv2d(4, 4, 1) for _ in range(3)), nn.Flatten()]
    net, x = nn.Sequential(*parts, nn.Linear(64, 3)), torch.randn(4, 3, 4, 4)
    with torch.no_grad():  # one weight a thousand times the others: they become zero
        net[2].weight *= 1e-3
        net[2].weight[:, 0, 0, 0], net[2].bias[:] = 1, 0
        net[1].weight[0], net[1].bias[0] = 0, 0  # and reads zeros
    made = compile_network(net, x, engine="numpy", precision="int8", calibration=[x])
    assert set(made.facts.kept) == {"2"}
    assert "is above 0.05" in made.facts.kept["2"]
    assert "2: error" in made.explain()
    assert [n.op for n in made.graph.nodes].count("conv") == 1
    assert calibration.far({}) == {}
    assert list(calibration.far({"a": 0.01, "b": 0.011, "c": math.nan})) == ["c"]


REFUSED = [
    ({"precision": "int8"}, "needs calibration inputs"),
    ({"precision": "int4"}, "precision='int4' is not one of"),
    ({"calibration": [torch.zeros(1, 3, 10, 10)]}, "calibration is for precision='int8'"),
    ({"precision": "int8", "calibration": []}, "calibration is empty"),
    ({"precision": "int8", "calibration": [torch.zeros(1, 3, 9, 10)]}, "give batches like the"),
    ({"precision": "int8", "calibration": torch.full((1, 3, 10, 10), torch.inf)}, "NaN or inf"),
    ({"precision": "int8", "calibration": [], "engine": "torch"}, "'auto', 'plan', 'own' or"),
    ({"precision": "int8", "calibration": [], "floor": 2.0}, "floor=2.0 is a cosine"),
    ({"precision": "int8", "calibration": torch.rand(2, 3, 10, 10) * 1e-6, "floor": 1.0,
      "engine": "numpy"}, "the floor is a cosine of 1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "match"), REFUSED)
def test_what_is_refused(net: nn.Module, given: dict, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        compile_network(net, torch.zeros(1, 3, 10, 10), **given)


def test_a_network_without_integer_layers_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no convolution of two dimensions"):
        compile_network(nn.ReLU(), torch.ones(1, 2), precision="int8", calibration=torch.ones(1, 2))


def test_a_batch_that_cannot_vary() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).reshape(2, -1)

    settings = {"engine": "numpy", "precision": "int8"}
    torch.manual_seed(0)
    net, x = Fixed(), torch.randn(4, 3)
    with pytest.raises(ArgumentError, match="the example's shapes alone"):
        compile_network(net, x, calibration=[x[:1]], **settings)
    made = compile_network(net, x, calibration=[x], **settings)
    assert made.facts.precision == "int8"
    assert not made.graph.free


CHANGES = {
    "a scale": lambda h: h["nodes"][0][3].__setitem__("scale", 0.0),
    "a scale that is none": lambda h: h["nodes"][0][3].__setitem__("scale", "1"),
    "a zero point": lambda h: h["nodes"][1][3].__setitem__("zero", 300),
    "codes beyond seven bits": lambda h: h["nodes"][1][3].__setitem__("high", 255.0),
    "codes below zero": lambda h: h["nodes"][1][3].__setitem__("low", -1.0),
    "codes from nowhere": lambda h: h["values"]["tensors_0"].__setitem__(1, "uint8"),
    "a map that is no codes": lambda h: h["nodes"][1][1].__setitem__(0, "tensors_0"),
    "a weight that is computed": lambda h: h["nodes"][1][1].__setitem__(1, "tensors_0"),
    "an added value": lambda h: h["nodes"][1][1].__setitem__(4, "tensors_0"),
    "quads": lambda h: h["values"]["tensors_0/codes"].__setitem__(0, [-1, 2, 10, 10, 4]),
    "a pool": lambda h: h["nodes"][2][3].__setitem__("stride", [1, 1]),
    "groups": lambda h: h["nodes"][1][3].__setitem__("groups", 3),
    "a row": lambda h: h["nodes"][4][1].__setitem__(1, h["nodes"][1][1][1]),
    "another type": lambda h: h["values"]["relu/codes"].__setitem__(1, "int8"),
}


def test_files(net: nn.Module, plan: Plan, inputs: list[Tensor], tmp_path: Path) -> None:
    path = plan.save(tmp_path / "net.plan")
    read = gossamer.runtime.load(path)
    assert read.facts == plan.facts
    for x in inputs:
        np.testing.assert_array_equal(read(x.numpy()), plan(x).numpy())
    data = path.read_bytes()
    for change in CHANGES.values():
        for kernel in ("numpy", "sparse-int8"):

            def both(header: dict, change=change, kernel=kernel) -> None:
                chosen = header["facts"]["chosen"]
                chosen.update({k: kernel for k in chosen if "max_pool" not in k})
                change(header)

            path.write_bytes(resealed(data, both))
            with pytest.raises(FormatError, match=r"net\.plan"):
                gossamer.runtime.load(path)
    path.write_bytes(
        resealed(data, lambda h: h["facts"]["chosen"].update({"relu/codes": "sparse-int8"}))
    )
    for x in inputs:
        np.testing.assert_array_equal(gossamer.runtime.load(path)(x.numpy()), plan(x).numpy())


def test_a_file_s_integer_plan(net: nn.Module, inputs: list[Tensor], tmp_path: Path) -> None:
    file, said = tmp_path / "model.gsm", []
    gossamer.pack.pack(net, file).close()

    def compiled(calibration: list[Tensor]) -> Plan:
        said.clear()
        return gossamer.compile(
            file, inputs[0][:1], model=net, engine="numpy", precision="int8", say=said.append,
            calibration=calibration,
        )  # fmt: skip

    first = compiled(inputs)
    assert said
    assert torch.equal(compiled(inputs)(inputs[0]), first(inputs[0]))
    assert said == []
    compiled(inputs[1:])
    assert said  # other inputs, another plan
    assert len(list(tmp_path.glob("*.plan"))) == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["compile", "mlp-64-16-10", "--rounds", "1", "--engine", "numpy", "--int8"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*common, "--data", "digits", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["precision"] == "int8"
    assert len(facts["errors"]) == 2
    with pytest.raises(SystemExit):
        cli.main([*common, "--shape", "1,8,8"])
    assert "needs calibration inputs" in capsys.readouterr().err
