"""What is measured of a finished run, and how run.json says it."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import names
from gossamer.datasets import Dataset
from gossamer.pack import Archive
from gossamer.report import tables
from gossamer.training.evaluation import device_of, modes_kept

__all__ = ["density", "environment", "file_figures", "latency"]

_LEAST_SECONDS = 0.4  # of timing, however small the network
_MOST_SECONDS = 5.0
_LEAST_RUNS = 20


def density(model: nn.Module) -> float:
    """Fraction of the compressible weights that are not zero."""
    weights = names.weights(model)
    total = sum(w.numel() for w in weights.values())
    return sum(int(torch.count_nonzero(w)) for w in weights.values()) / max(1, total)


def latency(dense: nn.Module, decoded: nn.Module, data: Dataset) -> dict[str, Any]:
    """Milliseconds of one forward pass, batch 1, of both networks in the same engine.

    Runs are interleaved, the least of each counts.
    """
    device = device_of(decoded)
    example = data.test.batch(slice(0, 1))[0].to(device)
    best = [float("inf"), float("inf")]
    with torch.inference_mode(), modes_kept(dense), modes_kept(decoded):
        dense.eval()
        decoded.eval()
        started, runs = time.perf_counter(), 0
        while True:
            for i, network in enumerate((dense, decoded)):
                start = time.perf_counter()
                network(example)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                best[i] = min(best[i], time.perf_counter() - start)
            runs += 1
            spent = time.perf_counter() - started
            if spent > _MOST_SECONDS or (runs >= _LEAST_RUNS and spent > _LEAST_SECONDS):
                break
    ratio = best[0] / best[1]
    faster = ratio >= 1.1
    return {
        "dense_ms": best[0] * 1e3,
        "compressed_ms": best[1] * 1e3,
        "ratio": ratio,
        "engine": "torch eager",
        "batch": 1,
        "note": ""
        if faster
        else "The file decodes to dense tensors of the same shapes: it is smaller, and no speed-up "
        "is claimed.",
    }


def environment() -> tuple[dict[str, Any], dict[str, Any]]:
    """Versions, and the machine."""
    try:
        own = version("gossamer")
    except PackageNotFoundError:
        own = "source"
    versions = {"gossamer": own, "torch": torch.__version__, "python": platform.python_version()}
    hardware = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return versions, hardware


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def file_figures(file: Path, data: Dataset) -> tuple[dict[str, Any], list[Any], Any]:
    """Bytes, layers and the picture of the first layer's mask, all from the file itself."""
    with Archive(file, max_bytes=1 << 62) as archive:
        tensors = archive.tensors()
        layers = tables.layer_rows(archive.rows(), tensors)
        size, dense = archive.file_bytes, archive.dense_bytes
        parts = archive.parts()
    figures = {"dense": dense, "file": size, "ratio": dense / size, "parts": parts}
    return figures, layers, tables.first_layer_image(tensors, data.in_shape)
