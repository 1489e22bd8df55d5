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
Scales are shared by one maximum over all ranks (TernGrad, section 3.3). Every exchange starts with
48 bytes or so from each rank that say layout and step, so that ranks that do not fit find out
before they misread each other. What travels in floating point is summed in rank order and divided.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.distribute.group import AllGather, AllToAll, Broadcast, Gather, Program
from gossamer.distribute.job import (
    Job,
    add_sum,
    agree,
    codes,
    decode_sum,
    encode,
    exact,
    float32,
    floats,
    mean,
    padded,
    prepared,
    scales_of,
    sum_room,
)
from gossamer.distribute.message import CODES, SUMS, Writer

__all__ = ["TOPOLOGIES", "Topology"]

Topology = Literal["auto", "all_gather", "two_phase", "server"]

_UNIT = 64  # elements of a group: pieces end on one


def _whole(job: Job) -> Generator[Any, Any, Tensor]:
    """This rank's message with every gradient in full."""
    gradients = prepared(job)
    scales = yield from scales_of(job, gradients)
    values = torch.stack(scales).tolist()
    room = [
        job.codec.payload_bytes(slot.numel) if slot.coded else g.numel() * g.element_size()
        for slot, g in zip(job.layout.slots, gradients, strict=True)
    ]
    writer = Writer(room, job.device)
    for slot, g, scale, value in zip(job.layout.slots, gradients, scales, values, strict=True):
        if not slot.coded:
            exact(writer, g)
            continue
        decoded = encode(job, writer, slot.name, g, scale, value)
        if job.feedback is not None and decoded is not None:
            job.feedback.record(slot.name, g, decoded)
    return job.message(writer, CODES)


def _all_gather(job: Job) -> Program:
    message = yield from _whole(job)
    lengths = yield from agree(job, message.numel())
    most = max(length for (length,) in lengths)
    found = yield AllGather(padded(message, most), last=True)
    messages = [job.read(data, CODES, len(job.layout.slots)) for data in found]
    for i, (slot, tensor) in enumerate(job.rows()):
        parts = [parts[i] for parts in messages]
        if not slot.coded:
            tensor.copy_(mean([floats(part, slot, slot.numel) for part in parts], job.size))
            continue
        payloads, forms = codes(parts)
        scales = torch.tensor([part.scale for part in parts], device=job.device)
        with float32(tensor) as out:
            job.codec.decode_mean(payloads, scales, out, job.size, forms=forms)


def _server(job: Job) -> Program:
    message = yield from _whole(job)
    lengths = yield from agree(job, message.numel())
    found = yield Gather(padded(message, max(length for (length,) in lengths)))
    count, answer = len(job.layout.slots), None
    if found is not None:
        messages = [job.read(data, CODES, count) for data in found]
        writer = Writer([sum_room(job, s, s.numel) for s in job.layout.slots], job.device)
        for i, slot in enumerate(job.layout.slots):
            add_sum(job, slot, [parts[i] for parts in messages], slot.numel, writer)
        answer = job.message(writer, SUMS)
    lengths = yield from agree(job, 0 if answer is None else answer.numel())
    data = (yield Broadcast(answer, lengths[0][0], last=True)).to(job.device)
    parts = job.read(data, SUMS, count)
    for (slot, tensor), part in zip(job.rows(), parts, strict=True):
        decode_sum(job, slot, part, tensor)


def _pieces(numel: int, size: int) -> list[slice]:
    """One piece a rank, of whole groups; the same whatever bucket a gradient is in."""
    step = -(-numel // (_UNIT * size)) * _UNIT
    return [slice(min(r * step, numel), min((r + 1) * step, numel)) for r in range(size)]


def _two_phase(job: Job) -> Program:
    slots, gradients = job.layout.slots, prepared(job)
    scales = yield from scales_of(job, gradients)
    values = torch.stack(scales).tolist()
    cuts = [_pieces(slot.numel, job.size) for slot in slots]
    keep = job.feedback is not None
    decoded = [
        torch.empty_like(g) if keep and slot.coded else None
        for slot, g in zip(slots, gradients, strict=True)
    ]
    messages = []
    for rank in range(job.size):
        parts = [g[cut[rank]] for g, cut in zip(gradients, cuts, strict=True)]
        room = [
            job.codec.payload_bytes(g.numel()) if slot.coded else g.numel() * g.element_size()
            for slot, g in zip(slots, parts, strict=True)
        ]
        writer = Writer(room, job.device)
        for i, (slot, g) in enumerate(zip(slots, parts, strict=True)):
            if not slot.coded:
                exact(writer, g)
                continue
            # a piece has a random stream of its own
            found = encode(job, writer, f"{slot.name}/{rank}", g, scales[i], values[i])
            if (whole := decoded[i]) is not None and found is not None:
                whole[cuts[i][rank]] = found
        messages.append(job.message(writer, CODES))
    if job.feedback is not None:
        for slot, g, own in zip(slots, gradients, decoded, strict=True):
            if own is not None:
                job.feedback.record(slot.name, g, own)
    lengths = yield from agree(job, *(m.numel() for m in messages))
    found = yield AllToAll(messages, [row[job.rank] for row in lengths])
    theirs = [job.read(data, CODES, len(slots)) for data in found]
    sizes = [[cut[r].stop - cut[r].start for cut in cuts] for r in range(job.size)]
    mine = sizes[job.rank]
    writer = Writer([sum_room(job, s, n) for s, n in zip(slots, mine, strict=True)], job.device)
    for i, slot in enumerate(slots):
        add_sum(job, slot, [parts[i] for parts in theirs], mine[i], writer)
    message = job.message(writer, SUMS)
    lengths = yield from agree(job, message.numel())
    most = max(length for (length,) in lengths)
    found = yield AllGather(padded(message, most), last=True)
    for rank, data in enumerate(found):
        for i, part in enumerate(job.read(data, SUMS, len(slots))):
            decode_sum(job, slots[i], part, job.tensors[i][cuts[i][rank]])


TOPOLOGIES: dict[str, Callable[[Job], Program]] = {
    "all_gather": _all_gather,
    "two_phase": _two_phase,
    "server": _server,
}
