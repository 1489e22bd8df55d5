"""Who exchanges with whom: real process groups, and any number of workers in one process.

A topology is a *program*: a generator that yields what it wants communicated and is sent what came
back. :class:`Distributed` runs one program over ``torch.distributed``; :func:`lockstep` runs the
programs of N workers side by side in one process. Both move the same bytes, so both give the same
bits. Requests:

- :class:`AllGather`: every rank's equally long bytes, to all; comes back as a list by rank.
- :class:`AllMax`: the elementwise maximum of float32.
- :class:`AllToAll`: one piece for each rank; comes back as a list by rank.
- :class:`Gather`: equally long bytes, to rank 0; None elsewhere.
- :class:`Broadcast`: from rank 0, ``length`` bytes.
- :class:`Start` any of these and go on; a handle comes back, and :class:`Wait` for it brings the
  answer. All ranks start and wait in the same order.

``last`` marks a request whose answer is the same on all ranks, which all do the same with.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.core.errors import ArgumentError, ExchangeError, FormatError
from gossamer.distribute.exchange.faults import Roll

__all__ = [
    "TIMEOUT",
    "AllGather",
    "AllMax",
    "AllToAll",
    "Broadcast",
    "Distributed",
    "Gather",
    "Group",
    "Program",
    "Request",
    "Start",
    "Wait",
    "lockstep",
]

TIMEOUT = 300.0
"""Seconds after which a rank that does not answer ends the others, unless said otherwise."""

_POLL = 1.0  # seconds between two looks for another rank's report

# The last pieces of work are kept: were gloo's thread the last to let go of its tensors, while the
# interpreter ends, the process would abort.
_last: deque[dist.Work | None] = deque(maxlen=4)


@dataclass(frozen=True)
class AllGather:
    """See the module."""

    data: Tensor
    last: bool = False


@dataclass(frozen=True)
class AllMax:
    """See the module."""

    data: Tensor
    last: bool = False


@dataclass(frozen=True)
class AllToAll:
    """See the module; ``lengths`` are those of the pieces that will come."""

    data: list[Tensor]
    lengths: list[int]
    last: bool = False


@dataclass(frozen=True)
class Gather:
    """See the module."""

    data: Tensor
    last: bool = False


@dataclass(frozen=True)
class Broadcast:
    """See the module; ``data`` is rank 0's."""

    data: Tensor | None
    length: int
    last: bool = False


Collective = AllGather | AllMax | AllToAll | Gather | Broadcast


@dataclass(frozen=True)
class Start:
    """See the module."""

    request: Collective


@dataclass(frozen=True)
class Wait:
    """See the module."""

    handle: Any


Request = Collective | Start | Wait
Program = Generator[Request, Any, Any]


@dataclass(frozen=True)
class _Flight:
    """A collective under way, and how to read its answer once it has ended."""

    work: dist.Work | None
    answer: Callable[[], Any]


class Group(Protocol):
    """Runs one rank's program."""

    rank: int
    size: int

    def run(self, program: Program) -> None:
        """Run it to its end."""


def lockstep(programs: Sequence[Program]) -> None:
    """Run the programs of all ranks, in rank order, in this process.

    A request marked ``last`` is answered to rank 0 alone, None to the others: they would do the
    same with it.
    """
    running = list(programs)
    answers: list[Any] = [None] * len(running)
    while True:
        requests: list[Request] = []
        for program, answer in zip(running, answers, strict=True):
            try:
                requests.append(program.send(answer))
            except StopIteration:
                continue
        if not requests:
            return
        answers = _answers(requests)


def _answers(requests: Sequence[Any]) -> list[Any]:
    first, size = requests[0], len(requests)
    if isinstance(first, Start):  # the handle is the answer
        return _answers([r.request for r in requests])
    if isinstance(first, Wait):
        return [r.handle for r in requests]
    if first.last:
        return [*_of_all(requests)[:1], *[None] * (size - 1)]
    return _of_all(requests)


def _of_all(requests: Sequence[Any]) -> list[Any]:
    first, size = requests[0], len(requests)
    if isinstance(first, AllGather):
        return [[r.data for r in requests]] * size
    if isinstance(first, AllMax):
        return [torch.stack([r.data for r in requests]).amax(0)] * size
    if isinstance(first, AllToAll):
        return [[r.data[rank] for r in requests] for rank in range(size)]
    if isinstance(first, Gather):
        return [[r.data for r in requests], *[None] * (size - 1)]
    return [first.data] * size


class Distributed:
    """A process group of ``torch.distributed``, gloo or NCCL.

    Args:
        process_group: None: the default one, or a single worker where there is none.
        timeout: seconds a rank may keep the others waiting. A killed rank is noticed at once.

    A failure raises :class:`~gossamer.core.errors.ExchangeError` on every rank that is left, naming
    the ranks that do not answer, at most ``timeout`` and some 6 seconds after it.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, *, timeout: float = TIMEOUT
    ) -> None:
        if not timeout > 0:
            raise ArgumentError(f"timeout={timeout} must be more than 0 seconds")
        self.timeout = timeout
        self.rank, self.size = 0, 1
        self._given: dist.ProcessGroup | None = None
        self.roll: Roll | None = None
        if not (dist.is_available() and dist.is_initialized()):
            return
        group = dist.group.WORLD if process_group is None else process_group
        if group is None or group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ArgumentError("process_group does not have this process among its members")
        # The default group is looked up, not held: destroy_process_group() is to end its threads,
        # which must not outlive the interpreter.
        self._given = process_group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.nccl = dist.get_backend(group) == "nccl"
        self.roll = Roll(group, self.rank, self.size) if self.size > 1 else None

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group."""
        group = dist.group.WORLD if self._given is None else self._given
        if group is None:
            raise ExchangeError("the process group has been destroyed; make a new Distributed")
        return group

    def run(self, program: Program) -> None:
        """Run a program to its end."""
        self.go_on(program, self.start(program))

    def start(self, program: Program) -> Request | None:
        """Run a program up to its first request, without communicating."""
        with self.telling():
            return next(program, None)

    def go_on(self, program: Program, request: Request | None) -> None:
        """Run a started program to its end."""
        if self.roll is None:
            if request is not None:
                lockstep([_resumed(program, request)])
            return
        with self.telling():
            try:
                while request is not None:
                    request = program.send(self._answer(request))
            except StopIteration:
                return

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the others of an error in here: they would wait for this rank until the timeout.

        Bytes of another rank that make no sense become an :class:`ExchangeError`.
        """
        try:
            yield
        except FormatError as e:
            self.tell(e)
            raise ExchangeError(str(e)) from e
        except Exception as e:
            self.tell(e)
            raise

    def tell(self, error: BaseException) -> None:
        """Tell the others why this rank stops, unless it is that others have."""
        if self.roll is not None and not isinstance(error, ExchangeError) and dist.is_initialized():
            self.roll.leave(f"rank {self.rank} failed: {type(error).__name__}: {error}")

    def _answer(self, request: Request) -> Any:
        if isinstance(request, Start):
            return self._begin(request.request)
        return self._end(request.handle if isinstance(request, Wait) else self._begin(request))

    def _begin(self, request: Collective) -> _Flight:
        device = torch.device("cuda", torch.cuda.current_device()) if self.nccl else "cpu"
        begin: Callable[[], dist.Work | None]
        if isinstance(request, AllToAll):
            home = request.data[0].device
            data = torch.cat(request.data).to(device)
            out = data.new_empty(sum(request.lengths))
            sent = [piece.numel() for piece in request.data]
            begin = partial(dist.all_to_all_single, out, data, request.lengths, sent)
            return self._flying(begin, lambda: list(out.to(home).split(request.lengths)))
        if isinstance(request, Broadcast):
            home = torch.device("cpu") if request.data is None else request.data.device
            if request.data is None:
                data = torch.empty(request.length, dtype=torch.uint8, device=device)
            else:
                data = request.data.to(device)
            begin = partial(dist.broadcast, data, dist.get_global_rank(self.group, 0))
            return self._flying(begin, lambda: data.to(home))
        home = request.data.device
        data = request.data.to(device)
        if isinstance(request, AllMax):
            data = data.clone()
            begin = partial(dist.all_reduce, data, dist.ReduceOp.MAX)
            return self._flying(begin, lambda: data.to(home))
        if isinstance(request, AllGather):
            out = data.new_empty(self.size * data.numel())
            begin = partial(_all_gather, out, data)
            return self._flying(begin, lambda: list(out.to(home).view(self.size, -1)))
        parts = [torch.empty_like(data) for _ in range(self.size)] if self.rank == 0 else None
        begin = partial(dist.gather, data, parts, dist.get_global_rank(self.group, 0))
        return self._flying(begin, lambda: parts and [part.to(home) for part in parts])

    def _flying(self, begin: Callable[..., dist.Work | None], answer: Callable[[], Any]) -> _Flight:
        try:
            work = begin(group=self.group, async_op=True)
        except RuntimeError as e:
            raise self._failed(str(e)) from e
        _last.append(work)
        return _Flight(work, answer)

    def _end(self, flight: _Flight) -> Any:
        deadline = time.monotonic() + self.timeout
        work = flight.work
        while work is not None:
            left = deadline - time.monotonic()
            try:
                if self.nccl:  # its own watchdog has the timeout
                    work.wait()
                else:
                    work.wait(timedelta(seconds=max(0.01, min(_POLL, left))))
                break
            except RuntimeError as e:
                if work.is_completed():
                    raise self._failed(str(e)) from e
            if left <= _POLL:
                raise self._failed(f"no answer within timeout={self.timeout:g} seconds")
            self.watch()
        return flight.answer()

    def watch(self) -> None:
        """Raise :class:`ExchangeError` if another rank has reported a failure."""
        if self.roll is None or not dist.is_initialized():
            return
        if (told := self.roll.look()) is not None:
            raise self._failed(told)

    def _failed(self, reason: str) -> ExchangeError:
        if self.roll is None:
            return ExchangeError(reason)
        told = f"rank {self.rank} saw: {reason.splitlines()[0][:200]}"
        self.roll.report(told)
        return ExchangeError(self.roll.call(told))


def _resumed(program: Program, request: Request) -> Program:
    answer = yield request
    while True:
        try:
            request = program.send(answer)
        except StopIteration:
            return
        answer = yield request


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
