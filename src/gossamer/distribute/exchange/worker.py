"""The thread that exchanges gradients beside the backward pass, one bucket after the other."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.futures import Future

from gossamer.distribute.exchange.group import Distributed, Program, Request
from gossamer.distribute.exchange.spans import Flights

__all__ = ["Worker"]

_IDLE = 1.0  # seconds between two looks for other ranks' reports when there is nothing to do

_Task = tuple[Program, Request | None, Tensor, Future[Tensor], bool]


class Worker:
    """One thread that runs programs in the order they come; after a failure all others fail.

    Attributes:
        flights: for the programs, to leave what travels in.
        failure: what went wrong.
    """

    def __init__(self, group: Distributed) -> None:
        self._group = group
        self.flights = Flights()
        self._answers: list[tuple[Future[Tensor], Tensor]] = []
        self._jobs: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._open = 0
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="gossamer-exchange", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread must not outlive the interpreter

    def submit(
        self,
        program: Program,
        request: Request | None,
        result: Tensor,
        future: Future[Tensor],
        last: bool,
    ) -> None:
        """Run a started program when its turn comes.

        After the ``last`` one and what it leaves under way, all results go to their futures.
        """
        with self._idle:
            self._open += 1
        self._jobs.put((program, request, result, future, last))

    def drain(self) -> None:
        """Wait until nothing is open; raise what went wrong."""
        with self._idle:
            self._idle.wait_for(lambda: not self._open)
        self.check()

    def check(self) -> None:
        """Raise what went wrong."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the thread; one that waits for a dead rank is left behind."""
        atexit.unregister(self.close)
        self._jobs.put(None)
        self._thread.join(_IDLE)

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE)
            except queue.Empty:
                self._guard(self._group.watch)
                continue
            if job is None:
                return
            program, request, result, future, last = job
            self._answers.append((future, result))
            self._guard(partial(self._run, result, program, request))
            if last:
                self._guard(partial(self._run, result, self.flights.land()))
            if last or self.failure is not None:
                program.close()
                self._answer()

    def _answer(self) -> None:
        for future, result in self._answers:
            if self.failure is None:
                future.set_result(result)
            else:
                future.set_exception(self.failure)  # type: ignore[arg-type]  # its stub's slip
        with self._idle:
            self._open -= len(self._answers)
            self._idle.notify_all()
        self._answers.clear()

    def _run(self, result: Tensor, program: Program, request: Request | None = None) -> None:
        with torch.no_grad():
            if request is None:
                request = self._group.start(program)
            self._group.go_on(program, request)
            if result.is_cuda:
                torch.cuda.current_stream(result.device).synchronize()

    def _guard(self, action: Callable[[], None]) -> None:
        # The thread's caller is the main thread's next wait: whatever went wrong is raised there.
        if self.failure is None:
            try:
                action()
            except Exception as e:
                self.failure = e
