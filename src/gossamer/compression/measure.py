"""What is measured of a finished run, and how run.json says it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import nn

from gossamer.compression import eight_bits
from gossamer.core import flops, machine, names, nest
from gossamer.core.errors import ArgumentError
from gossamer.core.modes import device_of, modes_kept
from gossamer.core.same import same_operations
from gossamer.core.timing import Paired, paired
from gossamer.datasets import Dataset, Split, batches
from gossamer.pack import Archive
from gossamer.quantize import IntegerNetwork
from gossamer.quantize.emulated import Emulated
from gossamer.report import tables
from gossamer.runtime.engines import ENGINES, Subject, installed
from gossamer.runtime.plan.door import compile_network
from gossamer.training.tasks import Task

__all__ = [
    "density",
    "environment",
    "file_figures",
    "integer_figures",
    "latency",
    "operations",
    "tensor_bytes",
]

_MOST_SECONDS = 5.0  # of timing, however large the network
_MOST_PAIRS = 200
_MOST_EXPORTED = 1 << 28  # bytes of tensors; larger networks are timed in torch alone


def density(model: nn.Module) -> float:
    """Fraction of the compressible weights that are not zero."""
    weights = names.weights(model)
    total = sum(w.numel() for w in weights.values())
    return sum(int(torch.count_nonzero(w)) for w in weights.values()) / max(1, total)


def latency(
    dense: nn.Module,
    decoded: nn.Module,
    data: Dataset,
    *,
    exported: bool | None = None,
    planned: bool | Literal["int8"] = False,
    task: Task | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Milliseconds of one forward pass, batch 1, of both networks in the same engine, and notes.

    On one thread, in pairs (:func:`gossamer.core.timing.paired`), in torch and, where the
    operations changed, in onnxruntime, which is what the figures are of where it takes both
    networks: ``ratio`` is the median of the pairs' ratios, ``interval`` holds it with 95 %, and
    ``rows`` has them for each engine. Networks of the same operations (:mod:`gossamer.core.same`)
    get no ratio: whatever the clock says of them is noise. A fixed-point network has no speed in
    torch, which emulates it; None where there is no other engine.

    Args:
        exported: whether to ask onnxruntime; None: where it is installed.
        planned: compile both networks too (:mod:`gossamer.runtime.plan`); zeros are left out
            there, so that the figures are of that, whatever the operations are. ``int8``: the
            decoded one in the plan that is fastest, eight bits allowed, the dense one in eight
            bits (:mod:`gossamer.compression.eight_bits`).
        task: what the score of such a plan is; None: by the targets.
    """
    device = device_of(decoded)
    example = nest.moved(data.test.batch(slice(0, 1))[0], device)
    emulated = isinstance(decoded, Emulated)
    same = not emulated and same_operations(dense, decoded)
    rows: list[dict[str, Any]] = []
    told: list[str] = []
    if not emulated:
        with torch.inference_mode(), modes_kept(dense), modes_kept(decoded):
            dense.eval()
            decoded.eval()
            found = paired(
                lambda: nest.feed(dense, example),
                lambda: nest.feed(decoded, example),
                pairs=_MOST_PAIRS,
                seconds=_MOST_SECONDS,
                device=device,
                clock=clock,
            )
        rows.append(_row("torch eager", found, same))
    if exported is None:
        exported = installed("onnxruntime")
        if emulated and not exported:
            told.append("latency was not measured: pip install 'gossamer[onnx]'")
    size = sum(t.numel() * t.element_size() for t in dense.state_dict().values())
    if exported and not same and device.type == "cpu" and size <= _MOST_EXPORTED:
        try:
            rows.append(_row("onnxruntime", _exported(dense, decoded, example, clock), same))
        except ArgumentError as e:
            told.append(f"latency in onnxruntime was not measured: {str(e)[:300]}")
    small: dict[str, Any] = {}
    if planned and not emulated and device.type == "cpu":
        try:
            if planned == "int8":
                name, found, small = eight_bits.timed(dense, decoded, data, task, _timing(clock))
                rows.append(_row(name, found, False))
            else:
                rows.append(_row("gossamer plan", _planned(dense, decoded, example, clock), False))
            same = False
        except ArgumentError as e:
            told.append(f"latency of the plans was not measured: {str(e)[:300]}")
    if not rows:
        return None, told
    last = rows[-1]
    return small | {
        "same_operations": same,
        "dense_ms": last["before_ms"],
        "compressed_ms": last["after_ms"],
        **{key: last[key] for key in ("ratio", "interval", "engine", "batch", "threads", "pairs")},
        "rows": rows,
        "note": "The file decodes to dense tensors of the same shapes." if same else "",
    }, told


def _exported(
    dense: nn.Module, decoded: nn.Module, example: Any, clock: Callable[[], float]
) -> Paired:
    """Both networks in onnxruntime; a fixed-point one in its own formats."""
    calls = []
    for name, model in (("before", dense), ("after", decoded)):
        engine = "onnxruntime-int8" if isinstance(model, Emulated) else "onnxruntime"
        subject = Subject(name, model, example)
        calls.append(ENGINES[engine].prepare(subject, subject.rows(1), 1).run)
    return _timing(clock)(*calls)


def _timing(clock: Callable[[], float]) -> Callable[..., Paired]:
    """Pairs of calls, so many and no longer."""
    return partial(paired, pairs=_MOST_PAIRS, seconds=_MOST_SECONDS, clock=clock)


def _planned(
    dense: nn.Module, decoded: nn.Module, example: Any, clock: Callable[[], float]
) -> Paired:
    """Both networks compiled, each by what is fastest for it."""
    plans = [compile_network(model, example) for model in (dense, decoded)]
    arrays = [t.numpy() for t in nest.leaves(example)]
    calls = [partial(plan.arrays, arrays, plan.batch(arrays)) for plan in plans]
    return _timing(clock)(*calls)


def _row(engine: str, found: Paired, same: bool) -> dict[str, Any]:
    """A row of run.json."""
    each = (found.first + found.second) / 2 * 1e3
    return {
        "engine": engine,
        "batch": 1,
        "threads": 1,
        "before_ms": each if same else found.first * 1e3,
        "after_ms": each if same else found.second * 1e3,
        "ratio": None if same else found.ratio,
        "interval": None if same or found.interval is None else list(found.interval),
        "pairs": found.pairs,
    }


def operations(
    dense: nn.Module, decoded: nn.Module, data: Dataset
) -> tuple[dict[str, Any] | None, list[str]]:
    """Multiplications of one example before and after (:mod:`gossamer.core.flops`), and notes."""
    if isinstance(decoded, Emulated):  # its steps are integers in the clothes of float64
        return None, []
    example = data.test.batch(slice(0, 1))[0]
    try:
        return {
            when: flops.count(model, example).totals()
            for when, model in (("before", dense), ("after", decoded))
        }, []
    except ArgumentError as e:
        return None, [f"operations were not counted: {str(e)[:300]}"]


def environment() -> tuple[dict[str, Any], dict[str, Any]]:
    """Versions, and the machine."""
    try:
        own = version("gossamer")
    except PackageNotFoundError:
        own = "source"
    versions = {"gossamer": own, "torch": torch.__version__, "python": platform.python_version()}
    hardware = {
        "cpu": machine.cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": machine.gpu(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return versions, hardware


def tensor_bytes(model: nn.Module) -> int:
    """Of everything a network's state holds, shared tensors once."""
    state = model.state_dict(keep_vars=True).values()
    distinct = {id(t): t for t in state if isinstance(t, torch.Tensor)}.values()
    return sum(t.numel() * t.element_size() for t in distinct)


def file_figures(
    archive: Archive, data: Dataset, dense: int | None = None
) -> tuple[dict[str, Any], list[Any], Any]:
    """Bytes, layers and the picture of the first layer's mask, all from the file itself.

    Args:
        archive: open with ``keep=True``, so that nothing is decoded twice.
        dense: bytes of the network before; None: of the tensors in the file, which are its.
    """
    tensors = archive.tensors()
    layers = tables.layer_rows(archive.rows(), tensors)
    size, dense = archive.file_bytes, archive.dense_bytes if dense is None else dense
    parts = archive.parts()
    figures = {"dense": dense, "file": size, "ratio": dense / size, "parts": parts}
    return figures, layers, tables.first_layer_image(tensors, data.in_shape)


@torch.no_grad()
def integer_figures(model: Emulated, split: Split) -> dict[str, Any]:
    """The network on integers alone over a split: whether every bit agrees, and of class indices
    the right answers.
    """
    integers = IntegerNetwork(model.net())
    correct, total, same = 0, 0, True
    labels = split.targets
    counted = (
        isinstance(labels, torch.Tensor) and labels.ndim == 1 and not (labels.is_floating_point())
    )
    for inputs, targets in batches(split, 500, generator=None):
        x, y = inputs.cpu(), nest.moved(targets, "cpu")
        found = integers(x)
        same = same and torch.equal(found, model(x))
        total += len(x)
        if counted:
            correct += int((found.argmax(-1) == y).sum())
    figures = {"identical": same, "total": total}
    return figures | ({"correct": correct, "accuracy": correct / total} if counted else {})
