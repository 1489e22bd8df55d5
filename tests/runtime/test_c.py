"""The C library: the same answers as from Python, clear errors, several threads at once.

It is built by the system's compiler: quickly, with the portable kernels alone. GOSSAMER_C_FLAGS in
the environment gives other flags (the longer job's: every instruction set, sanitizers).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer.runtime import include
from gossamer.runtime.plan import planfile
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.plan.plan import Plan
from resealed import resealed

CXX, CC = shutil.which(os.environ.get("CXX", "c++")), shutil.which(os.environ.get("CC", "cc"))
FLAGS = os.environ.get("GOSSAMER_C_FLAGS", "-O0 -DGOSSAMER_PORTABLE").split()
EXAMPLE = Path(__file__).parents[2] / "examples" / "c" / "classify.c"
STATUS = ["ok", "file", "format", "unsupported", "argument", "memory", "differs", "internal"]

pytestmark = pytest.mark.skipif(
    CXX is None or CC is None, reason="no C and C++ compiler (cc, c++) on the path"
)


class Tensors(ctypes.Structure):
    _fields_ = (("dtype", ctypes.c_int), ("rank", ctypes.c_int32), ("shape", ctypes.c_int64 * 16))


class Network:
    """A plan's file through the C library."""

    def __init__(self, lib: ctypes.CDLL, data: bytes) -> None:
        self.lib, self.net, message = lib, ctypes.c_void_p(), ctypes.create_string_buffer(256)
        status = lib.gossamer_load_bytes(
            data, ctypes.c_size_t(len(data)), ctypes.byref(self.net), message
        )
        self.status, self.message = STATUS[status], message.value.decode()
        assert (self.status == "ok") == bool(self.net)
        assert (self.status == "ok") == (self.message == "")

    def __call__(
        self, inputs: Sequence[np.ndarray], like: Sequence[np.ndarray], batch: int, threads: int = 1
    ) -> tuple[str, list[np.ndarray], str]:
        """Status, outputs of these shapes, message."""
        outputs = [np.full_like(a, 77) for a in like]
        given = (ctypes.c_void_p * len(inputs))(*(a.ctypes.data for a in inputs))
        taken = (ctypes.c_void_p * len(outputs))(*(a.ctypes.data for a in outputs))
        message = ctypes.create_string_buffer(256)
        status = self.lib.gossamer_run(
            self.net, ctypes.c_int64(batch), given, taken, threads, message
        )
        return STATUS[status], outputs, message.value.decode()

    def __del__(self) -> None:
        self.lib.gossamer_free(self.net)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the library, and the example linked with it."""
    folder = tmp_path_factory.mktemp("c")
    source = include()
    library = folder / "libgossamer.so"
    warn = ["-Wall", "-Wextra"]
    build = [CXX, "-std=c++17", "-ffp-contract=off", "-fPIC", "-pthread", *warn, *FLAGS, "-shared"]
    subprocess.run([*build, source / "gossamer.cpp", "-o", library], check=True)
    example = [CC, "-std=c99", "-pedantic", *warn, f"-I{source}", EXAMPLE, library]
    subprocess.run([*example, f"-Wl,-rpath,{folder}", "-o", folder / "classify"], check=True)
    return folder


@pytest.fixture(scope="module")
def lib(built: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(built / "libgossamer.so"))
    found.gossamer_memory.restype = ctypes.c_size_t
    found.gossamer_elements.restype = ctypes.c_size_t
    found.gossamer_bytes.restype = ctypes.c_size_t
    return found


def pruned(net: nn.Module, density: float = 0.3) -> nn.Module:
    for p in net.parameters():
        if p.ndim > 1:
            p.data[torch.rand_like(p) > density] = 0
    return net.eval()


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return pruned(gossamer.nets.build("lenet-5"))


def plan_of(net: nn.Module, x: Any, int8: bool = False) -> Plan:
    more: dict[str, Any] = {"precision": "int8", "calibration": [x]} if int8 else {}
    return compile_network(net, x, engine="numpy", rounds=1, **more)


def same(
    lib: ctypes.CDLL, plan: Plan, path: Path, inputs: Sequence[np.ndarray], **how: Any
) -> None:
    """From C as from Python: floats within a few of their last bits, integers' the same bits."""
    batch = plan.batch(inputs)
    wanted = plan.arrays(inputs, batch)
    network = Network(lib, plan.save(path).read_bytes())
    assert (network.status, network.message) == ("ok", "")
    for _ in range(2):
        status, outputs, message = network(inputs, wanted, batch, **how)
        assert (status, message) == ("ok", "")
        for a, b in zip(wanted, outputs, strict=True):
            bound = 0 if plan.facts.precision == "int8" else 3e-6 * np.abs(a).max(initial=0)
            np.testing.assert_allclose(b, a, rtol=0, atol=bound)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution, a pool and a linear layer: cheap enough to be loaded again and again."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    plan = plan_of(pruned(nn.Sequential(*layers)), torch.randn(2, 1, 8, 8))
    return plan.save(tmp_path_factory.mktemp("plans") / "small.plan")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    plan = plan_of(lenet(), torch.randn(2, 1, 28, 28))
    return plan.save(tmp_path_factory.mktemp("plans") / "lenet.plan")


def test_the_example_runs_a_file(built: Path, file: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 1, 28, 28)).astype(np.float32)
    x.tofile(tmp_path / "x.f32")
    run = [built / "classify", file, tmp_path / "x.f32"]
    found = subprocess.run(run, check=True, capture_output=True, text=True)
    wanted = Plan.load(file)(x)
    np.testing.assert_allclose([float(v) for v in found.stdout.split()], wanted[0], rtol=2e-5)
    broken = tmp_path / "broken.plan"
    broken.write_bytes(file.read_bytes()[:-1])
    for path, code, text in ((broken, 2, "format: damaged"), (tmp_path / "no", 1, "No such file")):
        failed = subprocess.run([run[0], path, run[2]], capture_output=True, text=True)
        assert failed.returncode == code
        assert text in failed.stderr


class Many(nn.Module):
    """Operators that LeNet has not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.third = nn.Conv2d(8, 12, (3, 2), (2, 3), dilation=(2, 1), padding=2)
        self.alone, self.ln = nn.BatchNorm2d(12), nn.LayerNorm(12)
        self.table, self.line = nn.Embedding(9, 6), nn.Conv1d(6, 4, 3, 2, padding=1, groups=2)
        self.head, self.scale = nn.Linear(12, 12), nn.Parameter(torch.randn(3, 1))
        self.alone.running_mean.normal_()

    def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu6(self.first(x))
        y = F.silu(self.second(y) + y)
        y = F.hardswish(self.third(F.pad(y, (1, 0, 0, 2), value=0.5)))
        y = F.max_pool2d(self.alone(F.leaky_relu(y)), 3, 2, 1, ceil_mode=True)
        y = y + F.avg_pool2d(y, 3, 1, 1, count_include_pad=False)
        y = y + (y.abs() + 1).pow(-0.75)
        z = self.ln(F.gelu(self.head(y.mean((2, 3)))) * 2 + 1)
        a = z.view(-1, 3, 4).transpose(1, 2).softmax(-1) @ (self.scale * z.view(-1, 3, 4))
        e = F.elu(self.line(self.table(i).transpose(1, 2)))
        e = F.avg_pool1d(e, 2, 1, padding=1).flatten(1)
        return torch.cat([e, torch.tanh(a[:, 1])], 1), torch.minimum(a, a.transpose(1, 2)[:, 1:2])


def test_the_operators_of_float32(lib: ctypes.CDLL, tmp_path: Path) -> None:
    net = pruned(Many())
    x, i = torch.randn(2, 3, 11, 9), torch.randint(0, 9, (2, 7))
    plan = plan_of(net, (x, i))
    operators = {node.op for node in plan.graph.nodes}
    assert len(operators) >= 17, operators
    for batch, threads in ((1, 1), (3, 2)):
        arrays = [torch.randn(batch, 3, 11, 9).numpy(), torch.randint(0, 9, (batch, 7)).numpy()]
        same(lib, plan, tmp_path / "many.plan", arrays, threads=threads)
    network = Network(lib, (tmp_path / "many.plan").read_bytes())
    arrays = [x.numpy(), np.full((2, 7), 9)]
    status, _, message = network(arrays, plan.arrays([x.numpy(), i.numpy()], 2), 2)
    assert (status, "beyond the 9 rows" in message) == ("argument", True)


def test_weights_of_few_values(lib: ctypes.CDLL, tmp_path: Path) -> None:
    """Each coding of the file: a book for all, for each row, and behind a bitmap."""
    net = nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 70), nn.Linear(70, 64)).eval()
    with torch.no_grad():
        rows = torch.rand(80, 1) + 0.1
        net[0].weight.copy_(torch.randint(-7, 8, (80, 96)) * rows)
        net[2].weight.copy_(torch.randint(0, 4, (70, 80)) / 8 - 0.25)
        net[3].weight.copy_(torch.sign(torch.randn(64, 70)) * (torch.rand(64, 70) < 0.1) / 16)
    plan = plan_of(net, torch.randn(2, 96))
    same(lib, plan, tmp_path / "few.plan", [torch.randn(5, 96).numpy()])
    data = (tmp_path / "few.plan").read_bytes()
    assert b'"few"' in data
    assert b'"sparse few"' in data


def test_what_it_does_not_run_is_said(lib: ctypes.CDLL, tmp_path: Path) -> None:
    plan = plan_of(nn.Conv3d(1, 2, 3).eval(), torch.randn(1, 1, 4, 4, 4))
    network = Network(lib, plan.save(tmp_path / "net.plan").read_bytes())
    assert network.status == "unsupported"
    assert "a convolution of three dimensions" in network.message


@pytest.mark.parametrize("op", ["conv_w8", "linear_w8", "round_u8"])
def test_operators_of_other_engines_are_told(lib: ctypes.CDLL, small: Path, op: str) -> None:
    def change(header: dict[str, Any]) -> None:
        header["nodes"][0][0] = op

    network = Network(lib, resealed(small.read_bytes(), change))
    assert network.status == "unsupported"
    assert network.message == f"operator {op} is of other engines; compile with engine='plan'"


class Recurrent(nn.Module):
    """Two layers, both directions, and states that are given."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], units: int) -> None:
        super().__init__()
        self.steps = kind(5, units, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * units, 3)

    def forward(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        lstm = isinstance(self.steps, nn.LSTM)
        y, state = self.steps(x, (first, first / 2) if lstm else first)
        return self.head(y), state[1] if lstm else state


@pytest.mark.parametrize(("kind", "density"), [(nn.LSTM, 1.0), (nn.LSTM, 0.3), (nn.GRU, 0.3)])
def test_recurrent_layers(
    lib: ctypes.CDLL, tmp_path: Path, kind: type[nn.LSTM] | type[nn.GRU], density: float
) -> None:
    torch.manual_seed(0)
    x, first = torch.randn(3, 7, 5), torch.randn(4, 3, 19)
    net = pruned(Recurrent(kind, 19), density)
    plan = compile_network(net, (x, first), engine="numpy")
    same(lib, plan, tmp_path / "steps.plan", [x.numpy(), first.numpy()])
    alone = compile_network(pruned(kind(5, 6), density), torch.randn(4, 1, 5), engine="numpy")
    same(lib, alone, tmp_path / "alone.plan", [torch.randn(4, 1, 5).numpy()], threads=2)


class Mixed(nn.Module):
    """Integers through a pool, a residual, groups that come in twos, and rows of odd lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.c, self.head = nn.Conv2d(6, 9, 3, 2, dilation=2, padding=1), nn.Linear(36, 33)
        self.tail = nn.Linear(33, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        y = F.relu(self.c(F.relu(self.b(y) + y)))
        return self.tail(F.relu(self.head(F.max_pool2d(y, 2, 2).flatten(1))))


@pytest.mark.parametrize("density", [0.25, 0.9])
def test_the_operators_of_integers(lib: ctypes.CDLL, tmp_path: Path, density: float) -> None:
    x = torch.randn(3, 3, 10, 10)
    plan = plan_of(pruned(Mixed(), density), x, int8=True)
    operators = {node.op for node in plan.graph.nodes}
    assert {"quantize", "conv_int8", "linear_int8", "max_pool_int8"} <= operators
    same(lib, plan, tmp_path / "mixed.plan", [x.numpy()])
    same(lib, plan, tmp_path / "mixed.plan", [x[:1].numpy()], threads=2)


class Shortcut(nn.Module):
    """Codes through a slice and a padding."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.c = nn.Conv2d(16, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.a(x) + 1)
        more = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.c(F.relu(self.b(y) + more))


def test_codes_that_are_moved(lib: ctypes.CDLL, tmp_path: Path) -> None:
    x = torch.randn(3, 3, 9, 10)
    plan = plan_of(pruned(Shortcut(), 0.5), x, int8=True)
    kinds = {node.op: plan.graph.values[node.name].dtype for node in plan.graph.nodes}
    assert kinds["slice"] == kinds["pad"] == "uint8"
    same(lib, plan, tmp_path / "moved.plan", [x.numpy()])


def test_threads_share_a_network(lib: ctypes.CDLL, small: Path) -> None:
    network, plan = Network(lib, small.read_bytes()), Plan.load(small)
    rng = np.random.default_rng(1)
    cases = [rng.standard_normal((n, 1, 8, 8)).astype(np.float32) for n in (1, 2, 1, 3)]
    wanted = [plan.arrays([x], len(x)) for x in cases]
    results: dict[int, list[np.ndarray]] = {}

    def work(k: int) -> None:
        for _ in range(3):
            results[k] = network([cases[k]], wanted[k], len(cases[k]))[1]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, outputs in results.items():
        np.testing.assert_allclose(outputs[0], wanted[k][0], rtol=0, atol=1e-5)


def test_arguments_are_checked(lib: ctypes.CDLL, small: Path) -> None:
    network, x = Network(lib, small.read_bytes()), np.zeros((1, 1, 8, 8), np.float32)
    like = [np.zeros((2, 5), np.float32)]
    shape = Tensors()
    assert lib.gossamer_input(network.net, ctypes.c_size_t(0), ctypes.byref(shape)) == 0
    assert (shape.dtype, shape.rank, list(shape.shape[:5])) == (0, 4, [-1, 1, 8, 8, 0])
    assert lib.gossamer_bytes(ctypes.byref(shape), ctypes.c_int64(3)) == 3 * 64 * 4
    assert lib.gossamer_bytes(ctypes.byref(shape), ctypes.c_int64(1 << 62)) == 0
    assert STATUS[lib.gossamer_output(network.net, ctypes.c_size_t(1), None)] == "argument"
    assert network([x], like, 0)[0] == "ok"  # an empty batch: nothing is done
    assert network([x], like, -1)[0] == "argument"
    assert network([x], like, 1, threads=0)[0] == "argument"
    for bad in (np.nan, np.inf):
        status, _, message = network([np.full_like(x, bad)], like, 1)
        assert (status, message) == ("argument", "input 0 is NaN or infinite somewhere")
    before = lib.gossamer_memory(network.net, ctypes.c_int64(1))
    assert before == planfile.read(small)[1].bytes(1)  # the layout is Python's
    lib.gossamer_limit(network.net, ctypes.c_size_t(before - 1))
    status, _, message = network([np.repeat(x, 2, axis=0)], like, 2)
    assert (status, "gossamer_limit" in message) == ("memory", True)


def test_damaged_files_are_refused(lib: ctypes.CDLL, small: Path) -> None:
    data = small.read_bytes()
    for size in (0, 7, 47, 48, 1000, len(data) - 1):
        assert Network(lib, data[:size]).status == "format"
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    assert "digest" in Network(lib, bytes(flipped)).message


def node(op: str) -> Any:
    return lambda h: next(n for n in h["nodes"] if n[0] == op)


CHANGES: dict[str, tuple[Any, str]] = {
    "no such operator": (lambda h: h["nodes"][0].__setitem__(0, "system"), "format"),
    "an island": (lambda h: h["nodes"][0].__setitem__(0, "torch"), "unsupported"),
    "fewer inputs": (lambda h: h["nodes"][0][1].pop(), "format"),
    "reads what is not there": (lambda h: h["nodes"][0][1].__setitem__(0, "ghost"), "format"),
    "reads what comes later": (
        lambda h: h["nodes"][0][1].__setitem__(0, h["outputs"][0]), "format"),
    "gives twice": (lambda h: h["nodes"].append(h["nodes"][-1]), "format"),
    "no output": (lambda h: h["outputs"].__setitem__(0, "ghost"), "format"),
    "another attribute": (lambda h: h["nodes"][0][3].update(extra=1), "format"),
    "a stride of zero": (lambda h: node("conv")(h)[3].update(stride=[0, 1]), "format"),
    "a huge dilation": (lambda h: node("conv")(h)[3].update(dilation=[1 << 40, 1]), "format"),
    "groups": (lambda h: node("conv")(h)[3].update(groups=7), "format"),
    "negative padding": (lambda h: node("conv")(h)[3].update(padding=[[-9, 0], [0, 0]]), "format"),
    "another window": (lambda h: node("max_pool")(h)[3].update(kernel=[3, 3]), "format"),
    "an array beyond": (lambda h: h["arrays"][0].__setitem__(4, 1 << 62), "format"),
    "a negative array": (lambda h: h["arrays"][0].__setitem__(4, -64), "format"),
    "an array too long": (lambda h: h["arrays"][1].__setitem__(2, [1 << 20]), "format"),
    "a larger weight": (lambda h: h["arrays"][0][2].__setitem__(0, 1 << 40), "format"),
    "a string for a size": (lambda h: h["arrays"][0].__setitem__(4, "0"), "format"),
    "a larger value": (
        lambda h: [v[0].__setitem__(1, 1 << 27) for v in h["values"].values()], "format"),
    "a smaller value": (
        lambda h: [v[0].__setitem__(-1, 1) for v in h["values"].values()], "format"),
    "another type": (lambda h: [v.__setitem__(1, "int8") for v in h["values"].values()], "format"),
    "deep": (lambda h: h.__setitem__("key", json.loads("[" * 90 + "]" * 90)), "format"),
    "another answer": (lambda h: node("conv")(h)[3].update(activation=["tanh"]), "differs"),
    "another example": (lambda h: h.update(probe=[1, 0]), "format"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_hostile_headers_are_refused(lib: ctypes.CDLL, small: Path, name: str) -> None:
    change, wanted = CHANGES[name]
    network = Network(lib, resealed(small.read_bytes(), change))
    assert network.status == wanted, network.message


def test_random_damage_never_crashes(lib: ctypes.CDLL, small: Path) -> None:
    rng = np.random.default_rng(2)

    def change(header: dict[str, Any]) -> None:
        numbers: list[tuple[Any, Any]] = []

        def visit(value: Any) -> None:
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(part, (dict, list)):
                    visit(part)
                elif isinstance(part, int):
                    numbers.append((value, key))

        visit([header[k] for k in ("nodes", "values", "arrays", "probe")])
        for _ in range(rng.integers(1, 3)):
            where, key = numbers[rng.integers(len(numbers))]
            where[key] = int(
                rng.choice([-(1 << 62), -3, -1, 0, 1, 2, 5, 65, 70000, 1 << 31, 1 << 50])
            )

    data, seen = small.read_bytes(), set()
    for _ in range(60):
        seen.add(Network(lib, resealed(data, change)).status)
    assert "format" in seen
    assert seen <= {"ok", "format", "unsupported", "memory", "differs"}
