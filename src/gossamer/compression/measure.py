"""What is measured of a finished run, and how run.json says it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from gossamer.core import machine, names, nest
from gossamer.core.modes import device_of, modes_kept
from gossamer.core.timing import paired
from gossamer.datasets import Dataset, Split, batches
from gossamer.pack import Archive
from gossamer.quantize import IntegerNetwork
from gossamer.quantize.emulated import Emulated
from gossamer.report import tables

__all__ = [
    "density",
    "environment",
    "file_figures",
    "integer_figures",
    "latency",
    "same_operations",
]

_MOST_SECONDS = 5.0  # of timing, however large the network
_MOST_PAIRS = 200


def density(model: nn.Module) -> float:
    """Fraction of the compressible weights that are not zero."""
    weights = names.weights(model)
    total = sum(w.numel() for w in weights.values())
    return sum(int(torch.count_nonzero(w)) for w in weights.values()) / max(1, total)


def same_operations(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks are built of the same modules over tensors of the same shapes.

    Values do not count: a dense kernel takes as long over zeros. What a module's ``extra_repr``
    says (strides, groups, sizes) counts.
    """
    mine, others = list(one.named_modules()), list(other.named_modules())
    if len(mine) != len(others):
        return False
    for (name, a), (there, b) in zip(mine, others, strict=True):
        if name != there or type(a) is not type(b) or a.extra_repr() != b.extra_repr():
            return False
    state, rest = one.state_dict(), other.state_dict()
    return list(state) == list(rest) and all(
        _kind(state[name]) == _kind(rest[name]) for name in state
    )


def _kind(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return type(value)
    return value.shape, value.dtype, value.layout, value.device, value.is_quantized


def latency(
    dense: nn.Module,
    decoded: nn.Module,
    data: Dataset,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Milliseconds of one forward pass, batch 1, of both networks in the same engine.

    On one thread, in pairs (:func:`gossamer.core.timing.paired`): ``ratio`` is the median of the
    pairs' ratios, ``interval`` holds it with 95 %. Networks of the same operations
    (:func:`same_operations`) get no ratio: whatever the clock says of them is noise.
    """
    device = device_of(decoded)
    example = nest.moved(data.test.batch(slice(0, 1))[0], device)
    same = same_operations(dense, decoded)
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
    about = {"engine": "torch eager", "batch": 1, "threads": 1, "pairs": found.pairs}
    if same:
        each = (found.first + found.second) / 2 * 1e3
        return {
            "same_operations": True,
            "dense_ms": each,
            "compressed_ms": each,
            "ratio": None,
            "interval": None,
            **about,
            "note": "The file decodes to dense tensors of the same shapes.",
        }
    return {
        "same_operations": False,
        "dense_ms": found.first * 1e3,
        "compressed_ms": found.second * 1e3,
        "ratio": found.ratio,
        "interval": None if found.interval is None else list(found.interval),
        **about,
        "note": "",
    }


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


def file_figures(archive: Archive, data: Dataset) -> tuple[dict[str, Any], list[Any], Any]:
    """Bytes, layers and the picture of the first layer's mask, all from the file itself.

    ``archive``: open with ``keep=True``, so that nothing is decoded twice.
    """
    tensors = archive.tensors()
    layers = tables.layer_rows(archive.rows(), tensors)
    size, dense = archive.file_bytes, archive.dense_bytes
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
