"""Packed plans: arrays in every form, the file and its answers, and what is damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gossamer import cli
from gossamer.core.errors import FormatError
from gossamer.runtime.plan import packed, planfile
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.plan.facts import Contents, Facts
from gossamer.runtime.plan.graph import Graph, Node, Value
from gossamer.runtime.plan.packed_arrays import noise, unpacked
from gossamer.runtime.plan.packed_arrays import packed as form_of
from gossamer.runtime.plan.plan import Plan
from gossamer.runtime.plan.sealed import PACKED

PLAIN, PLANES, VALUES, BLOCKS, NOISE = range(5)


def blocks(shape: tuple[int, ...], kept: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    o, i, h, w = shape
    live = rng.random((o, i // 4, 1, h, w)) < kept
    codes = rng.integers(-40, 41, (o, i // 4, 4, h, w)) // 8
    return (codes * live).astype(np.int8).reshape(shape)


ARRAYS = {
    "a few numbers": (np.float32([1, -0.0, np.nan]), PLAIN),
    "none": (np.zeros((0, 3), np.float32), PLAIN),
    "no dimension": (np.array(3, np.int64), PLAIN),
    "like exponents": (np.random.default_rng(0).normal(size=3000).astype(np.float32), PLANES),
    "few values": (np.random.default_rng(0).integers(0, 5, (40, 30)) * np.float32(0.1), VALUES),
    "blocks": (blocks((32, 32, 3, 3), 0.3), BLOCKS),
    "no block": (np.zeros((8, 8, 3, 3), np.int8), PLANES),
    "the example": (noise((1, 3, 8, 8)), NOISE),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_forms(name: str) -> None:
    array, form = ARRAYS[name]
    part = form_of(array)
    assert part[0] == form
    found = unpacked(part, str(array.dtype), array.shape, "it")
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()


@given(
    st.sampled_from(["int8", "float32", "int64", "uint8"]),
    st.lists(st.integers(1, 9), max_size=4),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 3, 200]),
)
def test_any_array(dtype: str, shape: list[int], seed: int, values: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
    array = rng.integers(0, values, size).astype(np.uint8).view(dtype).reshape(shape)
    found = unpacked(form_of(array), dtype, shape, "it")
    assert found.tobytes() == array.tobytes()


def test_the_example_s_inputs_never_change() -> None:
    # Files hold answers to them: another draw would refuse every one.
    assert (63.75 * noise((4,)) + 127.5).tolist() == [127, 156, 43, 164]
    assert float(np.abs(noise((1000,))).max()) <= 2


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        return self.head(F.relu(self.norm(self.second(x)) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.manual_seed(0)
    net = Small().eval()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 2)
        net.second.weight.copy_(torch.from_numpy(blocks((16, 16, 3, 3), 0.4) * np.float32(0.03)))
    x = torch.randn(8, 3, 12, 12)
    return compile_network(net, x[:1], engine="numpy", precision="int8", calibration=[x])


def test_a_packed_plan_answers_as_the_plan(plan: Plan, tmp_path: Path) -> None:
    plain, path = plan.save(tmp_path / "net.plan"), plan.save(tmp_path / "s.plan", small=True)
    assert path.stat().st_size < plain.stat().st_size / 3
    read = Plan.load(path)
    x = np.random.default_rng(1).normal(size=(5, 3, 12, 12)).astype(np.float32)
    wanted = plan(x)
    assert np.abs(read(x) - wanted).max() <= 0.02 * np.abs(wanted).max()
    # the codes are the grid's: nothing of the weight is lost
    codes = next(a for n, a in read.graph.constants.items() if n.endswith("/codes") and (
        a.shape == (16, 16, 3, 3)
    ))  # fmt: skip
    assert np.array_equal(codes, blocks((16, 16, 3, 3), 0.4))
    # what it expands to is a plan's file of its own, which a packed one is made of again
    whole = packed.expanded(path.read_bytes(), "s.plan")
    plain.write_bytes(whole)
    np.testing.assert_array_equal(Plan.load(plain)(x), read(x))
    assert packed.pack_bytes(whole) == path.read_bytes()
    assert planfile.header(path) == planfile.header(plain)


def test_light_operators_need_no_other_engine(plan: Plan) -> None:
    nodes = {node.name: node.op for node in plan.graph.nodes}
    facts = Facts(**{**vars(plan.facts), "chosen": dict.fromkeys(nodes, "onnxruntime")})
    chosen = packed.small(Contents(plan.graph, facts, plan.forms, plan.names, plan.probe))
    assert {nodes[n] for n, k in chosen.facts.chosen.items() if k == "numpy"} >= {"mean"}
    big = Graph(
        ("x",), ("y",), (Node("linear", ("x", "@w", "", ""), ("y",), {"activation": None}),),
        {"x": Value((-1, 200)), "y": Value((-1, 100))}, {"@w": np.ones((100, 200), np.float32)},
    )  # fmt: skip
    facts = Facts(**{**vars(facts), "chosen": {"y": "onnxruntime"}, "precision": "float32"})
    kept = packed.small(Contents(big, facts, (None, None), ("x",), ((), ())))
    assert kept.facts.chosen == {"y": "onnxruntime"}


def test_it_runs_without_torch(plan: Plan, tmp_path: Path) -> None:
    path = plan.save(tmp_path / "s.plan", small=True)
    code = (
        "import sys, numpy as np, gossamer.runtime\n"
        f"gossamer.runtime.load({str(path)!r})(np.zeros((2, 3, 12, 12), np.float32))\n"
        "print(*[name for name in ('torch', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_damaged_files(plan: Plan, tmp_path: Path) -> None:
    path = plan.save(tmp_path / "s.plan", small=True)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    pieces = [data[:n] for n in (8, 9, 20, len(data) // 2, len(data) - 1)] + [data + b"\0"]
    for at in rng.integers(8, len(data), 150):
        pieces.append(data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :])
    whole, same, named = packed.expanded(data, "s.plan"), 0, 0
    for piece in pieces:
        path.write_bytes(piece)
        try:
            Plan.load(path)
        except FormatError as e:
            named += "s.plan" in str(e)
        else:  # bits that fill a byte up: what it expands to, and its digest, are the same
            assert packed.expanded(piece, "s.plan") == whole
            same += 1
    assert named + same == len(pieces)
    assert same <= 5
    with pytest.raises(FormatError, match="no file of this kind"):
        packed.pack_bytes(data)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["compile", "mlp-64-16-10", "--rounds", "1", "--engine", "numpy", "--small"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*common, "--data", "digits", "--to", str(tmp_path / "s.plan")])
    assert (tmp_path / "s.plan").read_bytes()[:8] == PACKED
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"[12]"):
        cli.main([*common, "--data", "digits"])
    assert "--small" in capsys.readouterr().err
