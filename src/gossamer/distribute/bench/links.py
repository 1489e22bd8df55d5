"""Links between workers on one machine: network namespaces with a rate limit, or loopback.

Each worker gets a namespace of its own whose one interface is the end of a veth pair; the other
ends meet on a bridge in one more namespace. Both ends pass ``tc``'s token bucket, so that what a
worker sends and what it receives are limited alike. Needs root, ``ip`` and ``tc``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gossamer.core.errors import ArgumentError, GossamerError

__all__ = ["Link", "bits_a_second", "counters", "loopback", "namespaces", "unavailable"]

_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_LEAST_BURST = 256_000  # bytes; a bucket smaller than a segmented packet's 64 KB stalls


@dataclass(frozen=True)
class Link:
    """Where workers run.

    Attributes:
        kind: "namespaces" or "loopback".
        interface: its name, the same for every worker.
        rate: bits a second each way; None: not limited.
        prefixes: of every worker's command.
        shared: whether one counter counts all workers' bytes.
    """

    kind: str
    interface: str
    rate: int | None
    prefixes: tuple[tuple[str, ...], ...]
    shared: bool


def bits_a_second(rate: str) -> int:
    """``1gbit``, ``200mbit``, ``2.5gbit`` in bits a second.

    >>> bits_a_second("200mbit")
    200000000

    Raises :class:`ArgumentError` for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?bit)", rate.strip().lower())
    found = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if found < 10**5:
        raise ArgumentError(
            f"rate={rate!r} is no rate of 100kbit or more; write 1gbit, 200mbit, 500kbit"
        )
    return found


def counters(interface: str) -> tuple[int, int]:
    """Bytes sent and received by an interface so far."""
    folder = Path("/sys/class/net") / interface / "statistics"
    sent, received = (int((folder / f"{way}_bytes").read_text()) for way in ("tx", "rx"))
    return sent, received


def unavailable() -> str | None:
    """Why namespaces cannot be had here; None where they can."""
    if not hasattr(os, "geteuid"):
        return "this system has no network namespaces"
    if os.geteuid():
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install iproute2"
    try:
        with namespaces(2, 10**9):
            return None
    except GossamerError as e:
        return str(e)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GossamerError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


@contextmanager
def namespaces(workers: int, rate: int | None) -> Iterator[Link]:
    """Make a namespace a worker, joined by a bridge; all are removed at the end.

    Args:
        workers: 2 to 250.
        rate: bits a second each way; None: as fast as the machine is.

    Raises :class:`ArgumentError` for another number of workers, and
    :class:`~gossamer.core.errors.GossamerError` with the failed command where it is not permitted.
    """
    if not 2 <= workers <= 250:
        raise ArgumentError(f"workers={workers} is outside 2 to 250")
    mark = f"gossamer-{os.getpid()}"
    switch, hosts = f"{mark}-switch", [f"{mark}-{i}" for i in range(workers)]
    with ExitStack() as stack:
        for name in (switch, *hosts):
            _run("ip", "netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for i, host in enumerate(hosts):
            port = f"port{i}"
            _run("ip", "link", "add", "link0", "netns", host, "type", "veth",
                 "peer", "name", port, "netns", switch)  # fmt: skip
            _run("ip", "-n", host, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "link0")
            for where, device in ((host, "lo"), (host, "link0"), (switch, port)):
                _run("ip", "-n", where, "link", "set", device, "up")
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge")
            if rate is not None:
                # a millisecond of the rate: the kernel's timers let less through at 10 Gbit/s
                burst = max(_LEAST_BURST, rate // 8000)
                for where, device in ((host, "link0"), (switch, port)):
                    _run("ip", "netns", "exec", where, "tc", "qdisc", "add", "dev", device, "root",
                         "tbf", "rate", f"{rate}bit", "burst", f"{burst}b",
                         "latency", "50ms")  # fmt: skip
        yield Link(
            "namespaces",
            "link0",
            rate,
            tuple(("ip", "netns", "exec", host) for host in hosts),
            shared=False,
        )


def loopback(workers: int) -> Link:
    """All workers on the loopback interface, which no rate limits and one counter counts."""
    return Link("loopback", "lo", None, ((),) * workers, shared=True)
