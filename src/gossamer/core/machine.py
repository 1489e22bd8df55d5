"""What this machine is, as results name it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["cpu", "gpu", "memory"]


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def gpu() -> str | None:
    """The first accelerator's name; None without one."""
    import torch  # the processor's name needs none of it

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def memory() -> int:
    """Bytes of memory; 0 where the system does not say."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0
