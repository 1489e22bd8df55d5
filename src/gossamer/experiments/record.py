"""Where a figure comes from: the source's commit, the machine, and the file that says so."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from gossamer.core import machine
from gossamer.core.files import write_text

__all__ = ["commit", "hardware", "write_json"]


def hardware() -> dict[str, Any]:
    """Processor, cores, memory (bytes), accelerator and versions of this machine."""
    return {
        "cpu": machine.cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": machine.memory(),
        "gpu": machine.gpu(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


@functools.cache
def commit() -> str:
    """The source's commit; ``+dirty`` when tracked source differs from it.

    Looked up once a process: what runs is what was there when it started.
    """
    root = Path(__file__).resolve().parents[3]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode:
            return "unknown"
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", "src", "native"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+dirty" if dirty.stdout.strip() else "")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON atomically."""
    # numpy scalars become plain numbers
    text = json.dumps(data, indent=1, default=lambda value: value.item())
    write_text(path, text + "\n")
