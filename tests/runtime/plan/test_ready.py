"""Packed layers beside a plan's file: used where all of it is right, and made anew elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gossamer
import gossamer.runtime
from gossamer.core import machine
from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.arrays import Packed
from gossamer.runtime.kernels.conv import SparseConv
from gossamer.runtime.plan import planfile, ready
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.plan.plan import Plan
from gossamer.runtime.plan.stored import Stored
from resealed import resealed

built = pytest.mark.skipif(kernel("sparse_conv") is None, reason="the kernels are not built")


def network() -> nn.Sequential:
    """Sparse layers of every kind that is packed."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 36, 96), nn.ReLU(), nn.Linear(96, 10),
    )  # fmt: skip
    with torch.no_grad():
        for layer in net[::2]:
            if hasattr(layer, "weight"):
                layer.weight.mul_(torch.rand(layer.weight.shape) < 0.2)
    return net.eval()


X = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(1, 3, 8, 8)


@pytest.fixture(scope="module", params=["float32", "int8"])
def sealed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A plan's file."""
    more: dict[str, Any] = {}
    if request.param == "int8":
        more = {"precision": "int8", "calibration": [torch.randn(4, 3, 8, 8)]}
    return compiled(network(), tmp_path_factory.mktemp("plans") / "net.plan", **more).read_bytes()


def compiled(net: nn.Module, path: Path, **more: Any) -> Path:
    plan = compile_network(
        net, torch.from_numpy(X), engine="own", rounds=2, seconds=0.02, **more
    )  # fmt: skip
    return plan.save(path)


@pytest.fixture
def file(sealed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan whose layers are large enough to be kept."""
    monkeypatch.setattr(planfile, "FEWEST", 0)
    (tmp_path / "net.plan").write_bytes(sealed)
    return tmp_path / "net.plan"


def kept(file: Path) -> Path:
    (found,) = file.parent.glob("*.ready")
    return found


def packed(plan: Plan) -> dict[str, Packed]:
    assert isinstance(plan.graph.constants, Stored)
    return dict(plan.graph.constants.packed)


@built
def test_layers_are_kept_and_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gossamer.runtime.load(file)
    assert packed(first)
    held = kept(file).read_bytes()
    monkeypatch.setattr(Stored, "__getitem__", _no_weights(Stored.__getitem__, first))
    second = gossamer.runtime.load(file)
    assert second(X).tobytes() == first(X).tobytes()
    assert not second.facts.notes
    assert packed(second).keys() == packed(first).keys()
    for node, one in packed(second).items():
        for name, value in one.parts.items():
            assert np.array_equal(value, packed(first)[node].parts[name]), (node, name)
    assert kept(file).read_bytes() == held
    assert not [p for p in file.parent.iterdir() if p.suffix not in (".plan", ".ready")]


def _no_weights(old: Callable[[Stored, str], np.ndarray], plan: Plan) -> Any:
    """Constants without the weights that are packed: nobody is to decode those."""
    weights = {n.inputs[1] for n in plan.graph.nodes if n.name in packed(plan)}

    def get(self: Stored, name: str) -> np.ndarray:
        assert name not in weights, f"{name} is decoded"
        return old(self, name)

    return get


@built
def test_the_first_load_makes_no_dense_weight(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gossamer.runtime.load(file, cache=False)
    assert not list(file.parent.glob("*.ready"))
    sparse = {n for n, one in packed(plan).items() if type(one).__name__ != "RowBooks"}
    assert sparse
    few = {n: one for n, one in packed(plan).items() if n not in sparse}
    assert isinstance(plan.graph.constants, Stored)
    for name in few:
        del plan.graph.constants.packed[name]
    monkeypatch.setattr(Stored, "__getitem__", _no_weights(Stored.__getitem__, plan))
    assert gossamer.runtime.load(file, cache=False)(X).tobytes() == plan(X).tobytes()


@built
def test_damage_is_noticed_and_mended(file: Path) -> None:
    wanted = gossamer.runtime.load(file)(X)
    path = kept(file)
    good = path.read_bytes()
    places = np.random.default_rng(0).integers(0, 8 * len(good), 40)
    for place in (*places, 0, 8 * len(good) - 1):  # a bit anywhere
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        _mended(file, path, bytes(bad), good, wanted)
    for bad in (b"", good[:-1], good[: len(good) // 2], good[:40], good + b"\0", good[::-1]):
        _mended(file, path, bad, good, wanted)


def _mended(file: Path, path: Path, bad: bytes, good: bytes, wanted: np.ndarray) -> None:
    path.write_bytes(bad)
    plan = gossamer.runtime.load(file)
    assert plan(X).tobytes() == wanted.tobytes()
    assert any("are made anew" in note for note in plan.facts.notes)
    assert path.read_bytes() == good


def _of(header: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(parts for _, found, parts in header["layers"] if found == kind)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "another plan": lambda h: h["key"].__setitem__("plan", "0" * 64),
    "another processor": lambda h: h["key"].__setitem__("processor", "Z80"),
    "other layouts": lambda h: h["key"].__setitem__("layouts", ready.LAYOUTS + 1),
    "a kind": lambda h: h["layers"][0].__setitem__(1, "Popen"),
    "a module": lambda h: h["layers"][0].__setitem__(1, "os.system"),
    "a part less": lambda h: h["layers"][0][2].popitem(),
    "a part more": lambda h: h["layers"][0][2].__setitem__("more", 1),
    "a shape": lambda h: h["layers"][0][2].__setitem__("shape", [7, 7, 7, 7]),
    "a place": lambda h: h["layers"][0][2]["starts"]["array"].__setitem__(2, 1 << 40),
    "a length": lambda h: h["layers"][0][2]["starts"]["array"].__setitem__(1, 1 << 40),
    "a length below": lambda h: h["layers"][0][2]["starts"]["array"].__setitem__(1, -1),
    "a type": lambda h: h["layers"][0][2]["starts"]["array"].__setitem__(0, "object"),
    "no layers": lambda h: h.pop("layers"),
    "layers swapped": lambda h: h["layers"].__setitem__(
        slice(0, 2), [[b[0], *a[1:]] for a, b in zip(h["layers"], h["layers"][1::-1], strict=False)]
    ),
}  # fmt: skip


@built
def test_hostile_files_are_read_no_further(file: Path) -> None:
    """Sealed with a digest that fits, so that what is in them must be refused."""
    wanted = gossamer.runtime.load(file)(X)
    path = kept(file)
    good = path.read_bytes()
    for name, change in HOSTILE.items():
        path.write_bytes(resealed(good, change))
        plan = gossamer.runtime.load(file)
        assert plan(X).tobytes() == wanted.tobytes(), name
        assert any("are made anew" in note for note in plan.facts.notes), name
        assert path.read_bytes() == good, name


@built
def test_layers_that_give_something_else_are_packed_anew(file: Path) -> None:
    """Whole, sealed and of this very plan, but with other weights: the example tells."""
    first = gossamer.runtime.load(file)
    wanted, digest = first(X), file.read_bytes()[-32:]
    lie = packed(first)
    node, one = next((n, p) for n, p in lie.items() if isinstance(p, SparseConv))
    lie[node] = SparseConv(**one.parts | {"values": one.values[::-1].copy()})
    ready.write(file, digest, lie)
    plan = gossamer.runtime.load(file)
    assert plan(X).tobytes() == wanted.tobytes()
    assert any("gives something else here" in note for note in plan.facts.notes)


@built
def test_another_plan_or_processor_has_its_own_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gossamer.runtime.load(file)
    monkeypatch.setattr(machine, "cpu", lambda: "Another Processor (R) 9000")
    monkeypatch.setattr(ready, "cpu", machine.cpu)
    gossamer.runtime.load(file)
    names = {p.name for p in file.parent.glob("*.ready")}
    assert len(names) == 2
    assert any(".another-processor-r-9000." in name for name in names)
    with torch.no_grad():
        net = network()
        net[0].weight.mul_(2)
    compiled(net, file)
    wanted = net(torch.from_numpy(X)).detach().numpy()
    assert np.allclose(gossamer.runtime.load(file)(X), wanted, atol=1e-5)
    assert len(list(file.parent.glob("*.ready"))) == 3


@built
def test_a_folder_that_cannot_be_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(ready, "write", full)
    plan = gossamer.runtime.load(file)
    assert plan.facts.notes == ["no packed layers were left beside the file: read-only"]
    plan(X)


_TOGETHER = """
import sys, numpy as np, gossamer.runtime
from pathlib import Path
from gossamer.runtime.plan import planfile
planfile.FEWEST = 0
x = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(1, 3, 8, 8)
wanted = np.load(sys.argv[2])
path, ready = Path(sys.argv[1]), Path(sys.argv[3])
for i in range(40):
    plan = gossamer.runtime.load(path)
    assert plan(x).tobytes() == wanted.tobytes()
    assert not plan.facts.notes, plan.facts.notes  # whole files alone are ever seen
    if i % 3 == int(sys.argv[4]):
        ready.unlink(missing_ok=True)
"""


@built
def test_several_processes_write_and_read_at_once(file: Path) -> None:
    """Some take the file away all the while, so that all of them write it again and again."""
    np.save(file.with_suffix(".npy"), gossamer.runtime.load(file)(X))
    known = str(kept(file))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _TOGETHER, str(file), str(file.with_suffix(".npy")), known,
             str(i)],
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(4)
    ]  # fmt: skip
    for one in running:
        _, said = one.communicate(timeout=300)
        assert one.returncode == 0, said
    assert not list(file.parent.glob("*.tmp"))
    gossamer.runtime.load(file)
    assert not gossamer.runtime.load(file).facts.notes


def test_small_plans_leave_no_file(tmp_path: Path) -> None:
    path = compiled(network(), tmp_path / "net.plan")
    assert path.stat().st_size < planfile.FEWEST
    gossamer.runtime.load(path)
    assert list(tmp_path.iterdir()) == [path]


def test_little_is_imported(tmp_path: Path) -> None:
    """What makes a cold start: no torch, no other engine, and few of Python's own packages."""
    path = compiled(network(), tmp_path / "net.plan")
    code = (
        "import sys, numpy as np\n"
        "before = set(sys.modules)\n"
        "import gossamer.runtime\n"
        f"gossamer.runtime.load({str(path)!r})(np.zeros((1, 3, 8, 8), np.float32))\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {name.partition(".")[0] for name in done.stdout.split()}
    few = {"__future__", "_json", "_sha2", "_sha256", "atexit", "gossamer"}
    assert found <= few | {"importlib"}, found  # which finds a package that is installed editable


def test_a_packed_file_runs_by_the_plan_beside_it(tmp_path: Path) -> None:
    here = tmp_path / "a[b]*.gsm"
    net, x = network(), torch.from_numpy(X)
    gossamer.pack.pack(net, here).close()
    with pytest.raises(ArgumentError, match="run 'gossamer compile"):
        gossamer.runtime.load(here)
    made = gossamer.compile(here, x, model=network(), engine="own", rounds=1, seconds=0.01)
    code = (
        "import sys, numpy as np, gossamer.runtime\n"
        "y = gossamer.runtime.load(sys.argv[1])(np.load(sys.argv[2]))\n"
        "assert 'torch' not in sys.modules\n"
        "np.save(sys.argv[2], y)\n"
    )
    np.save(tmp_path / "x.npy", X)
    arguments = [sys.executable, "-c", code, str(here), str(tmp_path / "x.npy")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "x.npy").tobytes() == made(X).tobytes()
    (plan,) = tmp_path.glob("*.plan")
    (tmp_path / "another.plan").write_bytes(plan.read_bytes())  # not of this file's name
    plan.with_name("a[b]*.damaged.plan").write_bytes(plan.read_bytes()[:-1])
    assert gossamer.runtime.load(here)(X).tobytes() == made(X).tobytes()
    with torch.no_grad():
        net[0].weight.mul_(2)
    gossamer.pack.pack(net, here).close()  # the plan is of the file that was here
    with pytest.raises(ArgumentError, match="1 there are of another file of this name"):
        gossamer.runtime.load(here)
