"""A bucket goes span by span: while one travels, the next is encoded and the last is decoded.

Spans are cut by the gradients' sizes alone, so that all ranks cut alike. Random numbers belong to a
parameter's elements (:mod:`gossamer.distribute.codecs.random`), so that cuts change no bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from torch import Tensor

from gossamer.distribute.exchange.group import Program, Request, Start, Wait
from gossamer.distribute.wire.message import Slot

__all__ = ["SPAN", "Flights", "Piece", "batches", "spans"]

SPAN = 1 << 22
"""Elements of a span: 0.7 MB of ternary codes, 6 ms at 1 Gbit/s."""

_UNDER_WAY = 2  # spans that travel while others are encoded or decoded

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a gradient.

    Attributes:
        start: the first one's number in the parameter.
        gradient: what is sent, flat.
        target: where the average goes, flat.
        scale: of the whole gradient, float32 ``()``, and as a number.
        decoded: where to note what this rank's codes stand for; None: nobody asks.
    """

    slot: Slot
    start: int
    gradient: Tensor
    target: Tensor
    scale: Tensor
    value: float
    decoded: Tensor | None

    @property
    def numel(self) -> int:
        """Elements."""
        return self.gradient.numel()

    def part(self, start: int, stop: int) -> Piece:
        """Elements ``start .. stop`` of this piece."""
        cut = slice(start, stop)
        return replace(
            self,
            start=self.start + start,
            gradient=self.gradient[cut],
            target=self.target[cut],
            decoded=None if self.decoded is None else self.decoded[cut],
        )


def spans(pieces: Sequence[Piece], grain: int, size: int) -> Iterator[list[Piece]]:
    """Pieces in order, cut into lists of about ``size`` elements.

    Args:
        grain: inner cuts are at multiples of this many elements.
        size: elements a span ends after; a span is at most ``size + grain - 1`` long.
    """
    span: list[Piece] = []
    left = size
    for piece in pieces:
        at = 0
        while piece.numel - at > left:
            stop = min(at + -(-left // grain) * grain, piece.numel)
            yield [*span, piece.part(at, stop)]
            span, left, at = [], size, stop
        if at < piece.numel or not piece.numel:
            span.append(piece.part(at, piece.numel))
            left -= piece.numel - at
    if span:
        yield span


def batches(items: Iterable[T], first: int, then: int) -> Iterator[list[T]]:
    """Lists of ``first`` items, then of ``then``.

    >>> list(batches("abcdefgh", 1, 3))
    [['a'], ['b', 'c', 'd'], ['e', 'f', 'g'], ['h']]
    """
    rest, size = iter(items), first
    while batch := list(islice(rest, size)):
        yield batch
        size = then


class Flights:
    """Programs that do not depend on each other, overlapped.

    Each is answered what it asks to :class:`Start` once that has come; until then it travels while
    the next program runs up to its own. Other requests hold all up. The order is the same on all
    ranks, whatever time each takes.
    """

    def __init__(self) -> None:
        # handles, and whether the answer is the last
        self._under_way: deque[tuple[Program, Any, bool]] = deque()

    def start(self, program: Program) -> Generator[Request, Any, None]:
        """Run a program until it waits; go on with earlier ones if too many do."""
        yield from self._on(program, None)
        while len(self._under_way) > _UNDER_WAY:
            yield from self._first()

    def land(self) -> Generator[Request, Any, None]:
        """Run all programs to their ends."""
        while self._under_way:
            yield from self._first()

    def _on(self, program: Program, answer: Any) -> Generator[Request, Any, None]:
        try:
            request = program.send(answer)
            while not isinstance(request, Start):
                request = program.send((yield request))
        except StopIteration:
            return
        self._under_way.append((program, (yield request), request.request.last))

    def _first(self) -> Generator[Request, Any, None]:
        program, handle, last = self._under_way.popleft()
        answer = yield Wait(handle)
        if last and answer is None:  # rank 0 does the same for all
            program.close()
        else:
            yield from self._on(program, answer)
