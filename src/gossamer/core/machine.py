"""What this machine is, as results name it."""

from __future__ import annotations

import os

__all__ = ["cpu", "gpu", "memory"]


def cpu() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:  # one block for each processor, the first will do
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()


def gpu() -> str | None:
    """The first accelerator's name; None without one."""
    import torch  # the processor's name needs none of it

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def memory() -> int:
    """Bytes of memory; 0 where the system does not say."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0
