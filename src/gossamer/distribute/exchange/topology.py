"""Who sends what to whom: three ways to the same average.

``all_gather``
    Every rank sends its codes to all, each decodes all, ranks in order. Each rank has its own
    scale, or one shared by all.
``two_phase``
    Scales are shared. Every rank sums one piece of each gradient: codes go to whom they concern
    (all to all), exact integer sums come back (all gather). What a rank sends hardly grows with N.
``server``
    Scales are shared. Codes go to rank 0, exact integer sums come back: the parameter server of
    the papers, with its traffic.

``auto`` is ``all_gather`` up to three ranks and from four on ``two_phase``, if the codec has sums.
Scales are shared by one maximum over all ranks (TernGrad, section 3.3). Messages are announced by
some bytes from each rank that say layout, step and lengths, so that ranks that do not fit find out
before they misread each other. What travels in floating point is summed in rank order and divided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from gossamer.distribute.exchange.agreement import NUMBERS, padded
from gossamer.distribute.exchange.group import (
    AllGather,
    AllToAll,
    Broadcast,
    Gather,
    Program,
    Start,
)
from gossamer.distribute.exchange.job import (
    Job,
    agree,
    decode_mean,
    decode_sums,
    message_of,
    prepared,
    scales_of,
    sums_of,
)
from gossamer.distribute.exchange.spans import SPAN, Flights, Piece, batches, spans
from gossamer.distribute.wire.message import CODES, SUMS, Slot

__all__ = ["AGREED", "TOPOLOGIES", "Topology", "program"]

Topology = Literal["auto", "all_gather", "two_phase", "server"]

_UNIT = 64  # elements of a group: cuts are between groups

# spans announced together, at first and after that: a short start, then few rounds
AGREED = (NUMBERS, 8)

Shares = list[list[Piece]]
Lengths = list[list[int]]
Way = Callable[[Job, Shares, list[Tensor], Lengths], Program]


def program(job: Job, topology: str, flights: Flights | None = None) -> Program:
    """One rank's part in an exchange, span by span.

    Args:
        flights: where the last spans are left under way, to be landed by the caller; None: the
            program ends when all have ended.
    """
    gradients = prepared(job)
    scales = yield from scales_of(job, gradients)
    values = torch.stack(scales).tolist()
    pieces = [
        Piece(slot, 0, gradient, target, scale, value, _noted(job, slot, gradient))
        for (slot, target), gradient, scale, value in zip(
            job.rows(), gradients, scales, values, strict=True
        )
    ]
    shared, way = TOPOLOGIES[topology]
    under_way = Flights() if flights is None else flights
    for batch in batches(spans(pieces, job.codec.grain, SPAN), *AGREED):
        shares = [shared(span, job.size) for span in batch]
        messages = [[message_of(job, share) for share in of_span] for of_span in shares]
        sizes = [m.numel() for of_span in messages for m in of_span]
        # the first agreement is as long on ranks of other settings, see the module of agreement
        lengths = yield from agree(job, *sizes, *[0] * (NUMBERS - len(sizes)))
        for i, (of_span, own) in enumerate(zip(shares, messages, strict=True)):
            each = slice(i * len(own), (i + 1) * len(own))
            yield from under_way.start(way(job, of_span, own, [row[each] for row in lengths]))
    if job.feedback is not None:
        for piece in pieces:
            if piece.decoded is not None:
                job.feedback.record(piece.slot.name, piece.gradient, piece.decoded)
    if flights is None:
        yield from under_way.land()


def _noted(job: Job, slot: Slot, gradient: Tensor) -> Tensor | None:
    return torch.empty_like(gradient) if job.feedback is not None and slot.coded else None


def _whole(span: list[Piece], size: int) -> Shares:
    """Everything, in one message."""
    return [span]


def _shares(span: list[Piece], size: int) -> Shares:
    """What each rank sums: a part of every piece, of whole groups."""
    steps = [-(-piece.numel // (_UNIT * size)) * _UNIT for piece in span]
    return [
        [
            piece.part(min(rank * step, piece.numel), min((rank + 1) * step, piece.numel))
            for piece, step in zip(span, steps, strict=True)
        ]
        for rank in range(size)
    ]


def _all_gather(job: Job, shares: Shares, messages: list[Tensor], lengths: Lengths) -> Program:
    (span,), (message,) = shares, messages
    found = yield Start(AllGather(_padded(message, lengths), last=True))
    decode_mean(job, span, job.read(found, CODES, [len(span)] * job.size))


def _server(job: Job, shares: Shares, messages: list[Tensor], lengths: Lengths) -> Program:
    (span,), (message,) = shares, messages
    found = yield Start(Gather(_padded(message, lengths)))
    answer = None
    if found is not None:
        answer = sums_of(job, span, job.read(found, CODES, [len(span)] * job.size))
    lengths = yield from agree(job, 0 if answer is None else answer.numel())
    data = (yield Start(Broadcast(answer, lengths[0][0], last=True))).to(job.device)
    decode_sums(job, span, job.read_from(0, data, SUMS, len(span)))


def _two_phase(job: Job, shares: Shares, messages: list[Tensor], lengths: Lengths) -> Program:
    mine = shares[job.rank]
    found = yield Start(AllToAll(messages, [row[job.rank] for row in lengths]))
    message = sums_of(job, mine, job.read(found, CODES, [len(mine)] * job.size))
    lengths = yield from agree(job, message.numel())
    found = yield Start(AllGather(_padded(message, lengths), last=True))
    for share, parts in zip(shares, job.read(found, SUMS, [*map(len, shares)]), strict=True):
        decode_sums(job, share, parts)


def _padded(message: Tensor, lengths: Lengths) -> Tensor:
    """Of the length that all ranks' messages have at most."""
    return padded(message, max(length for (length,) in lengths))


TOPOLOGIES: dict[str, tuple[Callable[[list[Piece], int], Shares], Way]] = {
    "all_gather": (_whole, _all_gather),
    "two_phase": (_shares, _two_phase),
    "server": (_whole, _server),
}
"""Name -> what each message of a span holds, and one rank's part in the exchange of a span."""
