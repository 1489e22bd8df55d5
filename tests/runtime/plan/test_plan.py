"""Networks compiled: the same answers as torch, bad input refused, files that run without torch."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer import cli
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.runtime.flat import flatten
from gossamer.runtime.plan import choose, planfile, reference
from gossamer.runtime.plan.capture import capture
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.plan.fuse import fused
from gossamer.runtime.plan.graph import Graph, Node, Value
from gossamer.runtime.plan.plan import Plan
from gossamer.runtime.plan.program import Step, layout
from resealed import resealed


class Block(nn.Module):
    """What fuses: batch norm, ReLU6, a residual, a strided shortcut, pools, gates, permutations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.third = nn.Conv2d(8, 16, 3, 2, dilation=2, padding=2)
        self.alone = nn.BatchNorm2d(16)
        self.head, self.tail = nn.Linear(32, 12), nn.Linear(12, 5)
        self.drop, self.ln = nn.Dropout(), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu6(self.norm(self.first(x)))
        y = F.relu(self.second(y).add_(y))
        short = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        y = F.hardswish(self.third(F.pad(y, (0, 0, 0, 0))) + short)
        y = self.alone(F.max_pool2d(y, 3, 2, 1, ceil_mode=True))
        y = torch.cat([F.adaptive_avg_pool2d(y, 1), y.amax((2, 3), keepdim=True)], 1)
        y = self.drop(y.flatten(1))
        y = self.ln(F.gelu(self.head(y)) * 2 + 1)
        z = y.view(-1, 3, 4).transpose(1, 2).softmax(-1)[:, 1]
        return {"logits": self.tail(y), "gate": torch.sigmoid(z)}


def trained(net: nn.Module) -> nn.Module:
    """Statistics and weights that are not those of a fresh network."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                nn.init.normal_(tensor, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return trained(Block())


@pytest.fixture(scope="module")
def plan(net: nn.Module) -> Plan:
    return compile_network(net, torch.randn(2, 3, 10, 10), engine="plan", rounds=1)


def same(net: nn.Module, plan: Plan, x: Tensor) -> None:
    with torch.no_grad():
        wanted, got = net(x), plan(x)
    assert wanted.keys() == got.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_plan_gives_what_the_network_gives(net: nn.Module, plan: Plan) -> None:
    for count in (1, 2, 5, 3, 7, 9):
        same(net, plan, torch.randn(count, 3, 10, 10))
    empty = plan(torch.zeros(0, 3, 10, 10))
    assert [tuple(v.shape) for v in empty.values()] == [(0, 5), (0, 3)]
    with torch.no_grad():
        holed = torch.randn(2, 3, 10, 10)
        holed[0, 1, 4, 4], holed[1, 0, 0, 0] = torch.nan, torch.inf
        assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(
            net(holed).values(), plan(holed).values(), strict=True))  # fmt: skip
    x = np.random.default_rng(0).standard_normal((2, 3, 10, 10)).astype(np.float32)
    assert isinstance(plan(x)["logits"], np.ndarray)
    turned = plan(np.asfortranarray(x)[:, :, ::-1][:, :, ::-1])
    assert np.array_equal(turned["gate"], plan(x)["gate"])


def test_what_was_fused_computes_the_same(net: nn.Module) -> None:
    x = torch.randn(3, 3, 10, 10)
    flat, tensors, _ = flatten(net, x)
    whole = capture(flat, tensors)
    small = fused(whole.graph)
    kinds = [node.op for node in small.nodes]
    assert len(kinds) < len(whole.graph.nodes)
    assert kinds.count("affine") == 1  # behind a pool there is nothing to fold it into
    convolutions = [node for node in small.nodes if node.op == "conv"]
    assert [n.activation[0] for n in convolutions] == ["clamp", "relu", "hardswish"]
    assert [bool(n.inputs[3]) for n in convolutions] == [False, True, True]
    assert [n.attributes["names"] for n in small.islands] == [["amax"]]
    values = choose.values_of(small, whole.islands, [x.numpy()], 3)
    with torch.no_grad():
        wanted = flat(x)
    for name, tensor in zip(small.outputs, wanted, strict=True):
        np.testing.assert_allclose(values[name], tensor.numpy(), rtol=1e-4, atol=1e-5)
    for graph in (whole.graph, small):
        assert "N" in str(graph)
        assert graph.free


def test_a_plan_explains_itself(plan: Plan) -> None:
    text = plan.explain()
    for part in ("first", "conv+clamp", "1.000", "torch: amax", "amax: no operator of a plan",
                 "numpy", "any batch", "relative difference", "whole    plan"):  # fmt: skip
        assert part in text
    assert json.loads(json.dumps(plan.facts.rows))[0]["layer"] == "first"


def test_calls_side_by_side(net: nn.Module, plan: Plan) -> None:
    xs = [torch.randn(1 + i % 3, 3, 10, 10) for i in range(12)]
    got: dict[int, Tensor] = {}

    def work(start: int) -> None:
        for i in range(start, 12, 3):
            for _ in range(3):
                got[i] = plan(xs[i])["logits"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(xs):
        torch.testing.assert_close(got[i], plan(x)["logits"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((torch.zeros(2, 3, 10, 9),), r"input is \(2, 3, 10, 9\); the plan is for float32 \(N, 3,"),
        ((torch.zeros(3, 10, 10),), r"input is \(3, 10, 10\)"),
        ((torch.zeros(1, 3, 10, 10).double(),), "input is float64; the plan is for float32"),
        ((torch.zeros(1), torch.zeros(1)), "2 inputs where the network takes 1: input"),
        ((), "0 inputs"),
    ],
)
def test_inputs_that_do_not_fit(plan: Plan, given: tuple, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        plan(*given)
    with pytest.raises(ArgumentError, match="argument 'x': the plan takes inputs in order"):
        plan(x=torch.zeros(1, 3, 10, 10))


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return (y if x.sum() > 0 else -y), y * scale


def test_a_network_that_decides_by_values_runs_in_torch() -> None:
    net = Deciding().eval()
    made = compile_network(net, {"x": torch.ones(2, 4), "scale": 2.0}, rounds=1)
    assert made.facts.engine == "torch"
    assert "its forward decides by the values" in made.explain()
    for x in (torch.ones(3, 4), -torch.ones(3, 4)):
        with torch.no_grad():
            for a, b in zip(made(x=x), net(x, 2.0), strict=True):
                torch.testing.assert_close(a, b)
    with pytest.raises(ArgumentError, match="by name: x, scale"):
        made(torch.ones(3, 4))
    with pytest.raises(ArgumentError, match="in torch, which a file does not hold"):
        made.save("never.plan")
    with pytest.raises(ArgumentError, match="cannot be exported"):
        compile_network(net, torch.ones(2, 4), engine="plan")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.out = nn.Embedding(11, 6), nn.RNN(6, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(F.relu(self.rnn(self.words(ids).transpose(0, 1))[0])).transpose(0, 1)


def test_what_has_no_operator_runs_in_torch() -> None:
    net = Recurrent().eval()
    ids = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
    made = compile_network(net, ids, engine="plan", rounds=1)
    assert [n.attributes["names"] for n in made.graph.islands] == [["rnn_tanh"]]
    for count in (3, 1, 4):
        ids = torch.randint(11, (count, 5), generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            torch.testing.assert_close(made(ids), net(ids), rtol=1e-4, atol=1e-6)
    with pytest.raises(IndexError, match="beyond the 11 rows"):
        made(torch.full((2, 5), 11))


def test_a_network_that_keeps_something_runs_in_torch() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x * 2

    made = compile_network(Counting(), torch.ones(2, 3), rounds=1)
    assert "the network writes model.calls at each call" in made.explain()
    assert torch.equal(made(torch.ones(1, 3)), torch.full((1, 3), 2.0))


def test_a_batch_that_cannot_vary() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1) * 2

    class Two(nn.Module):  # captured with any batch, it would take what torch refuses
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] not in (2, 4):
                raise ValueError("a batch of two or four")
            return x * 2

    assert not compile_network(Two(), torch.ones(2, 3), engine="numpy").graph.free
    made = compile_network(Fixed(), torch.ones(4, 3), engine="numpy")
    assert not made.graph.free
    assert made(torch.ones(4, 3)).shape == (2, 6)
    with pytest.raises(ArgumentError, match="its shapes are the example's"):
        made(torch.ones(2, 3))


LAYERS = {
    "conv": lambda c: nn.Conv2d(c, 6, 3, padding=1),
    "strided": lambda c: nn.Conv2d(c, 4, 3, stride=2, padding=1, bias=False),
    "depthwise": lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c),
    "norm": nn.BatchNorm2d, "relu": lambda c: nn.ReLU(), "silu": lambda c: nn.SiLU(inplace=True),
    "max": lambda c: nn.MaxPool2d(2, ceil_mode=True), "pad": lambda c: nn.ZeroPad2d(1),
    "avg": lambda c: nn.AvgPool2d(3, 1, 1), "elu": lambda c: nn.ELU(), "gelu": lambda c: nn.GELU(),
}  # fmt: skip


@pytest.mark.parametrize(
    "seed", [17, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4))]
)
def test_random_networks(seed: int) -> None:
    torch.manual_seed(seed)
    picks = torch.randint(len(LAYERS), (7,)).tolist()
    layers: list[nn.Module] = []
    channels = 3
    for pick in picks:
        layers.append(list(LAYERS.values())[pick](channels))
        channels = nn.Sequential(*layers).eval()(torch.zeros(1, 3, 12, 12)).shape[1]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))
    net = trained(net)
    flat, tensors, _ = flatten(net, torch.randn(2, 3, 12, 12))
    graph = fused(capture(flat, tensors).graph)
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        wanted = net(x.clone()).numpy()  # the first layer of some works in place
    got = reference.run(graph, [x.numpy()])[graph.outputs[0]]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=str(graph))


@given(st.data())
def test_values_that_live_at_once_share_no_memory(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    values = {"v0": Value((-1, data.draw(st.integers(1, 40))))}
    nodes = []
    for i in range(1, count + 1):
        read = data.draw(st.sampled_from(list(values)))
        op = data.draw(st.sampled_from(["unary", "unary", "reshape"]))
        attributes = {"activation": ["relu"]} if op == "unary" else {"shape": [-1, 7]}
        nodes.append(Node(op, (read,), (f"v{i}",), attributes))
        size = values[read] if op == "reshape" else Value((-1, data.draw(st.integers(1, 40))))
        values[f"v{i}"] = size
    outputs = (f"v{count}", data.draw(st.sampled_from(list(values))))
    graph = Graph(("v0",), outputs, tuple(nodes), values, {})
    steps = [Step("numpy", (n,), n.inputs, n.outputs, None) for n in nodes if n.op != "reshape"]
    batch = data.draw(st.integers(1, 3))
    places, total = layout(graph, steps, batch)
    root = {n.name: n.inputs[0] for n in nodes if n.op == "reshape"}

    def origin(name: str) -> str:
        return origin(root[name]) if name in root else name

    last: dict[str, int] = dict.fromkeys(map(origin, outputs), len(steps))
    first = {"v0": 0}
    last.setdefault("v0", len(steps))
    for number, step in enumerate(steps):
        first[step.nodes[0].name] = number
        for name in (*step.inputs, *step.outputs):
            last[origin(name)] = max(last.get(origin(name), 0), number)
    for a, b in itertools.combinations(first, 2):
        if first[a] <= last[b] and first[b] <= last[a]:
            ends = [(places[n], places[n] + 4 * batch * values[n].shape[1]) for n in (a, b)]
            assert ends[0][1] <= ends[1][0] or ends[1][1] <= ends[0][0]
            assert max(e for _, e in ends) <= total


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned network's packed file."""
    folder = tmp_path_factory.mktemp("compiled")
    net = trained(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)))
    with torch.no_grad():
        net[3].weight[torch.rand_like(net[3].weight) < 0.8] = 0
    (folder / "net.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), "
        "nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))\n"
    )
    gossamer.pack.pack(net, folder / "model.gsm").close()
    return folder / "model.gsm"


def fresh() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()


def test_a_file_s_plan_is_kept_beside_it_and_checked(file: Path, tmp_path: Path) -> None:
    here = tmp_path / "model.gsm"
    here.write_bytes(file.read_bytes())
    x, said = torch.randn(1, 1, 8, 8), []

    def compiled(**more: object) -> Plan:
        said.clear()
        options = {"model": fresh(), "engine": "plan", "rounds": 1, **more}
        return gossamer.compile(here, x, say=said.append, **options)

    wanted = gossamer.load(here, fresh())(x)
    torch.testing.assert_close(compiled()(x), wanted)
    assert any("timing" in line for line in said)
    (kept,) = tmp_path.glob("*.plan")
    torch.testing.assert_close(compiled()(x), wanted)
    assert said == []  # nothing was measured again
    held = kept.read_bytes()
    kept.write_bytes(held[:-40] + bytes([held[-40] ^ 1]) + held[-39:])
    torch.testing.assert_close(compiled()(x), wanted)
    assert "its digest differs" in said[0]
    assert kept.read_bytes() != held[:-40]
    other = fresh()
    with torch.no_grad():
        other[0].weight.add_(1)  # another network's plan under this one's name
    lie = compile_network(other, x, engine="plan", rounds=1)
    lie.save(kept, planfile.header(kept)["key"])
    torch.testing.assert_close(compiled()(x), wanted)
    assert "gives something else than torch" in said[0]
    compiled(threads=2)
    assert len(list(tmp_path.glob("*.plan"))) == 2
    with pytest.raises(ArgumentError, match="give the network that they are of"):
        gossamer.compile(here, x)


def test_a_plan_s_file_runs_without_torch(file: Path, tmp_path: Path) -> None:
    net, x = gossamer.load(file, fresh()), torch.randn(2, 1, 8, 8)
    path = compile_network(net, x, engine="numpy").save(tmp_path / "net.plan")
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys, numpy as np, gossamer.runtime\n"
        f"plan = gossamer.runtime.load({str(path)!r})\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, plan(np.load({str(tmp_path / 'x.npy')!r})))\n"
        "assert 'torch' not in sys.modules and plan.facts.check\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "y.npy")), net(x))


CHANGES = {
    "an operator": lambda h: h["nodes"][0].__setitem__(0, "evil"),
    "an attribute": lambda h: h["nodes"][0][3].pop("groups"),
    "a stride": lambda h: h["nodes"][0][3].__setitem__("stride", [0, 0]),
    "a window": lambda h: h["nodes"][0][3].__setitem__("padding", [[0, 0], [900, 0]]),
    "an input": lambda h: h["nodes"][1][1].__setitem__(0, "nowhere"),
    "a cycle": lambda h: h["nodes"].reverse(),
    "a shape": lambda h: h["values"]["relu"].__setitem__(0, [-1, 4, 6, 7]),
    "a size": lambda h: h["values"]["relu"].__setitem__(0, [-1, 1 << 40]),
    "a type": lambda h: h["values"]["relu"].__setitem__(1, "object"),
    "a place": lambda h: h["arrays"][0].__setitem__(4, 1 << 50),
    "a place before": lambda h: h["arrays"][0].__setitem__(4, -64),
    "a weight": lambda h: h["arrays"][1].__setitem__(2, [5]),
    "a form": lambda h: h["forms"].__setitem__(1, ["tuple", [None, None]]),
    "a fact": lambda h: h["facts"].pop("chosen"),
    "a kernel": lambda h: h["facts"]["chosen"].pop("relu"),
    "a function": lambda h: h["nodes"][0][3].__setitem__("activation", ["exec"]),
    "the example": lambda h: h.__setitem__("probe", [0, 2]),
    "nothing": lambda h: h.clear(),
}


def test_files_that_are_damaged_or_hostile(file: Path, tmp_path: Path) -> None:
    net = gossamer.load(file, fresh())
    path = compile_network(net, torch.randn(1, 1, 8, 8), engine="numpy").save(tmp_path / "a.plan")
    data = path.read_bytes()
    pieces = [b"", b"GSMPLAN1", data[:-1], data[:100], b"x" + data[1:], data + b"\0"]
    pieces += [resealed(data, change) for change in CHANGES.values()]
    for piece in pieces:
        path.write_bytes(piece)
        with pytest.raises(FormatError, match=r"a\.plan"):
            gossamer.runtime.load(path)
    path.write_bytes(resealed(data, lambda h: h["facts"]["chosen"].update(relu="unheard-of")))
    assert any("numpy in its place" in note for note in gossamer.runtime.load(path).facts.notes)


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"{file.parent / 'net.py'}:build"
    arguments = [str(file), "--model", model, "--shape", "1,8,8", "--rounds", "1"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["compile", *arguments, "--engine", "plan", "--to", str(tmp_path / "a.plan")])
    assert "conv+relu" in capsys.readouterr().out
    assert gossamer.runtime.load(tmp_path / "a.plan")(np.zeros((1, 1, 8, 8), np.float32)).shape == (
        1,
        10,
    )
    with pytest.raises(SystemExit, match="0"):
        cli.main(["compile", *arguments, "--engine", "numpy", "--json"])
    assert json.loads(capsys.readouterr().out)["engine"] == "numpy"
    with pytest.raises(SystemExit):
        cli.main(["compile", *arguments, "--engine", "fastest"])
    assert "engine='fastest' is not one of 'auto'" in capsys.readouterr().err
