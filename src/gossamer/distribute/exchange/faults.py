"""What happens when a rank is killed, hangs or fails: a roll call through the group's store.

The rank that notices first leaves a report in the store. All who wait look there every second,
answer the call, and raise one error that names the ranks that did not answer in time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["Roll"]

T = TypeVar("T")

_CALL = 4.0  # seconds for all who are there to answer
_ASK = 2.0  # seconds for the store to answer


class Roll:
    """One group's reports and answers, as seen from one rank.

    The store is the default group's: where its host is the process that died, nothing can be asked,
    and that is what is told.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        # torch has no public way to the store of a running group
        self._store = distributed_c10d._get_default_store()
        self._prefix = f"gossamer/{group.group_name}"
        self.rank, self.size = rank, size
        self._lost = False

    def leave(self, reason: str) -> None:
        """Tell the others why this rank stops, without a call of theirs."""
        deadline = time.monotonic() + _CALL
        self.report(reason, leave=True)
        self._linger(set(range(1, self.size)), deadline)

    def report(self, reason: str, *, leave: bool = False) -> None:
        """Tell the others, unless another rank has told already; ``leave``: answer no call."""

        def tell() -> None:
            if not self._store.check([f"{self._prefix}/failed"]):
                self._store.set(f"{self._prefix}/failed", reason)
            self._store.set(f"{self._prefix}/here/{self.rank}", "1")
            if leave:
                self._store.set(f"{self._prefix}/done/{self.rank}", "1")

        self._ask(tell)

    def look(self) -> str | None:
        """The first report, if there is one and the store can be asked."""

        def read() -> str | None:
            key = f"{self._prefix}/failed"
            return self._store.get(key).decode() if self._store.check([key]) else None

        return self._ask(read)

    def call(self, reason: str) -> str:
        """The first report (or ``reason``), and who does not answer within some seconds."""
        deadline = time.monotonic() + _CALL
        silent = set(range(self.size)) - {self.rank}
        while silent and not self._lost and time.monotonic() < deadline:
            silent = {rank for rank in silent if not self._there("here", rank)}
            time.sleep(0.1)
        told = self.look() or reason
        self._ask(lambda: self._store.set(f"{self._prefix}/done/{self.rank}", "1"))
        self._linger(set(range(1, self.size)) - silent, deadline + _CALL)
        if self._lost:
            return (
                f"{told}; the store that rank 0 (or the launcher) keeps does not answer either: "
                "that process is killed or hangs. Restart all ranks from the last checkpoint"
            )
        if not silent:
            return f"{told}; all ranks have stopped. Restart from the last checkpoint"
        ranks = ", ".join(map(str, sorted(silent)))
        return (
            f"rank{'s' * (len(silent) > 1)} {ranks} of {self.size} did not answer within "
            f"{_CALL:g} seconds: killed, hung or ended by an error of its own ({told}). Restart "
            "all ranks from the last checkpoint"
        )

    def _linger(self, others: set[int], deadline: float) -> None:
        """On rank 0, in whose process the store may live: let the others finish asking."""
        while self.rank == 0 and others and not self._lost and time.monotonic() < deadline:
            others = {rank for rank in others if not self._there("done", rank)}
            time.sleep(0.1)

    def _there(self, what: str, rank: int) -> bool:
        return bool(self._ask(partial(self._store.check, [f"{self._prefix}/{what}/{rank}"])))

    def _ask(self, question: Callable[[], T]) -> T | None:
        # A store whose host is stopped answers never: ask from a thread that may be left behind.
        if self._lost:
            return None
        answers: list[T] = []
        failures: list[RuntimeError] = []

        def run() -> None:
            try:
                answers.append(question())
            except RuntimeError as e:
                failures.append(e)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(_ASK)
        if answers:
            return answers[0]
        self._lost = True
        return None
