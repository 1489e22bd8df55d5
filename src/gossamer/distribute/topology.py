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

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.distribute.codec import GradCodec
from gossamer.distribute.feedback import ErrorFeedback
from gossamer.distribute.group import AllGather, AllMax, AllToAll, Broadcast, Gather, Program
from gossamer.distribute.message import (
    CODES,
    EXACT,
    SUMS,
    Layout,
    Part,
    Slot,
    Writer,
    difference,
    read,
)
from gossamer.distribute.random import Key, dither_shift, parameter_hash
from gossamer.errors import ExchangeError

__all__ = ["TOPOLOGIES", "Job", "Topology"]

Topology = Literal["auto", "all_gather", "two_phase", "server"]

_UNIT = 64  # elements of a group: pieces end on one


@dataclass(frozen=True)
class Job:
    """One rank's part in one exchange.

    Attributes:
        tensors: flat and contiguous, one a slot; the average is written over them.
        shared: whether all ranks use the largest scale of all.
        shifted: whether all ranks share a random stream, shifted by rank.
    """

    codec: GradCodec
    layout: Layout
    tensors: Sequence[Tensor]
    rank: int
    size: int
    step: int
    seed: int
    shared: bool
    shifted: bool
    feedback: ErrorFeedback | None

    def rows(self) -> Iterator[tuple[Slot, Tensor]]:
        """Slots with their tensors."""
        return zip(self.layout.slots, self.tensors, strict=True)

    @property
    def device(self) -> torch.device:
        """Of the tensors."""
        return self.tensors[0].device

    def key(self, name: str) -> tuple[Key, int]:
        """Random stream and shift of a parameter, or of a piece of one."""
        rank = None if self.shifted else self.rank
        shift = dither_shift(self.rank, self.size) % 65536 if self.shifted else 0
        return Key(self.seed, self.step, rank, parameter_hash(name)), shift

    def read(self, data: Tensor, kind: int, count: int) -> list[Part]:
        """The parts of another rank's message."""
        return read(
            data,
            kind=kind,
            codec=self.codec.id,
            step=self.step,
            fingerprint=self.layout.fingerprint,
            count=count,
        )

    def message(self, writer: Writer, kind: int) -> Tensor:
        """A finished message."""
        return writer.finish(kind, self.codec.id, self.step, self.layout.fingerprint)


Exchanging = Generator[Any, Any, Any]


def _agree(job: Job, *numbers: int) -> Generator[Any, Any, list[list[int]]]:
    """Everybody's numbers, by rank; :class:`ExchangeError` where layouts or steps differ."""
    mine = [job.layout.fingerprint, job.step, *numbers]
    data = torch.tensor(mine, dtype=torch.int64, device=job.device).view(torch.uint8)
    rows = torch.stack((yield AllGather(data))).cpu().view(torch.int64).tolist()
    if any(row[0] != mine[0] for row in rows):
        text = torch.frombuffer(bytearray(job.layout.text.encode()), dtype=torch.uint8)
        text = text.to(job.device)
        size = torch.tensor([text.numel()], device=job.device).view(torch.uint8)
        sizes = torch.stack((yield AllGather(size))).cpu().view(torch.int64).flatten().tolist()
        found = yield AllGather(_padded(text, max(sizes)))
        texts = [bytes(t[:n].tolist()).decode() for t, n in zip(found, sizes, strict=True)]
        raise ExchangeError(
            f"the ranks do not exchange the same: {difference(texts)}. Build the same model with "
            "the same settings on every rank"
        )
    for rank, row in enumerate(rows):
        if row[1] != rows[0][1]:
            raise ExchangeError(
                f"rank {rank} is at step {row[1]} and rank 0 at step {rows[0][1]}: load the same "
                "checkpoint on every rank, and exchange equally often"
            )
    return [row[2:] for row in rows]


def _padded(data: Tensor, size: int) -> Tensor:
    """Bytes made longer; what follows is never read."""
    if data.numel() == size:
        return data
    out = data.new_zeros(size)
    out[: data.numel()] = data
    return out


def _wide(slot: Slot) -> torch.dtype:
    return torch.float64 if slot.dtype == torch.float64 else torch.float32


def _prepared(job: Job) -> list[Tensor]:
    """Gradients as they are sent: float32 (exact float64 stays), errors of before added."""
    out = []
    for slot, tensor in job.rows():
        if not slot.coded:
            out.append(tensor.to(_wide(slot)))
        elif job.feedback is None:
            out.append(tensor.float())
        else:
            out.append(job.feedback.correct(slot.name, tensor.float()))
    return out


def _scales(job: Job, gradients: Sequence[Tensor]) -> Generator[Any, Any, list[Tensor]]:
    """One scale a coded gradient, 0 for the others; shared if the job says so."""
    zero = torch.zeros((), device=job.device)
    pairs = zip(job.layout.slots, gradients, strict=True)
    scales = [job.codec.scale(g) if slot.coded else zero for slot, g in pairs]
    if not job.shared:
        return scales
    yield from _agree(job)
    # NaN has no place in a maximum everywhere; infinity has, and is decoded as NaN as well.
    own = torch.nan_to_num(torch.stack(scales), nan=math.inf, posinf=math.inf)
    return list((yield AllMax(own)).unbind())


def _encode(
    job: Job, writer: Writer, name: str, gradient: Tensor, scale: Tensor, value: float
) -> Tensor | None:
    """Add a coded part; what it decodes to, if error feedback needs it."""
    key, shift = job.key(name)
    payload, form = job.codec.encode_smallest(gradient, scale, key, shift=shift, out=writer.space)
    decoded = None
    if job.feedback is not None:
        decoded = job.codec.decode(payload, value, gradient.numel(), form=form)
    writer.add(payload.numel(), form, value)
    return decoded


def _exact(writer: Writer, gradient: Tensor) -> None:
    data = gradient.contiguous().view(torch.uint8)
    writer.space[: data.numel()] = data
    writer.add(data.numel(), EXACT, 0.0)


def _floats(part: Part, like: Tensor) -> Tensor:
    if part.form != EXACT or part.payload.numel() != like.numel() * like.element_size():
        raise ExchangeError(f"a part of {part.payload.numel()} bytes is not {like.numel()} floats")
    return part.payload.view(like.dtype)


def _mean(parts: Sequence[Tensor], size: int) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total / size


def _into(target: Tensor, decode: Callable[[Tensor], None]) -> None:
    """Decode straight into a float32 tensor, or by way of one."""
    if target.dtype == torch.float32:
        decode(target)
        return
    wide = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    decode(wide)
    target.copy_(wide)


def _whole(job: Job) -> Generator[Any, Any, Tensor]:
    """This rank's message with every gradient in full."""
    gradients = _prepared(job)
    scales = yield from _scales(job, gradients)
    values = torch.stack(scales).tolist()
    room = [
        job.codec.payload_bytes(slot.numel) if slot.coded else g.numel() * g.element_size()
        for slot, g in zip(job.layout.slots, gradients, strict=True)
    ]
    writer = Writer(room, job.device)
    for slot, g, scale, value in zip(job.layout.slots, gradients, scales, values, strict=True):
        if not slot.coded:
            _exact(writer, g)
            continue
        decoded = _encode(job, writer, slot.name, g, scale, value)
        if job.feedback is not None and decoded is not None:
            job.feedback.record(slot.name, g, decoded)
    return job.message(writer, CODES)


def _all_gather(job: Job) -> Program:
    message = yield from _whole(job)
    lengths = yield from _agree(job, message.numel())
    most = max(length for (length,) in lengths)
    found = yield AllGather(_padded(message, most), last=True)
    messages = [job.read(data, CODES, len(job.layout.slots)) for data in found]
    for i, (slot, tensor) in enumerate(job.rows()):
        parts = [parts[i] for parts in messages]
        if not slot.coded:
            like = tensor.new_empty(slot.numel, dtype=_wide(slot))
            tensor.copy_(_mean([_floats(part, like) for part in parts], job.size))
            continue
        payloads, forms = [p.payload for p in parts], [p.form for p in parts]
        scales = torch.tensor([p.scale for p in parts], device=job.device)
        _into(
            tensor,
            lambda out: job.codec.decode_mean(payloads, scales, out, job.size, forms=forms),
        )


def _sum(job: Job, slot: Slot, parts: Sequence[Part], numel: int, writer: Writer) -> None:
    """Add the sum of one gradient's parts, or of a piece's, to a message of sums."""
    if not slot.coded:
        like = torch.empty(numel, dtype=_wide(slot), device=job.device)
        _exact(writer, _mean([_floats(part, like) for part in parts], job.size))
        return
    forms = [p.form for p in parts]
    sums = job.codec.sum_codes([p.payload for p in parts], numel, forms=forms)
    bits = job.codec.sum_bits(job.size)
    packed = job.codec.pack_sums(sums, bits, form="sparse")
    writer.space[: packed.numel()] = packed
    writer.add(packed.numel(), "sparse", parts[0].scale)


def _sum_room(job: Job, slot: Slot, numel: int) -> int:
    if not slot.coded:
        return numel * (8 if slot.dtype == torch.float64 else 4)
    # sparse sums at their largest: one byte a group, all words, all signs
    groups = -(-numel // _UNIT)
    return groups + 7 + 8 * (job.codec.sum_bits(job.size) + 1) * groups


def _decode(job: Job, slot: Slot, part: Part, out: Tensor) -> None:
    if not slot.coded:
        like = torch.empty(out.numel(), dtype=_wide(slot), device=out.device)
        out.copy_(_floats(part, like))
        return
    bits = job.codec.sum_bits(job.size)
    _into(
        out,
        lambda wide: job.codec.decode_sums(
            part.payload, part.scale, wide.numel(), bits, job.size, wide, form=part.form
        ),
    )


def _server(job: Job) -> Program:
    message = yield from _whole(job)
    lengths = yield from _agree(job, message.numel())
    found = yield Gather(_padded(message, max(length for (length,) in lengths)))
    count, answer = len(job.layout.slots), None
    if found is not None:
        messages = [job.read(data, CODES, count) for data in found]
        writer = Writer([_sum_room(job, s, s.numel) for s in job.layout.slots], job.device)
        for i, slot in enumerate(job.layout.slots):
            _sum(job, slot, [parts[i] for parts in messages], slot.numel, writer)
        answer = job.message(writer, SUMS)
    lengths = yield from _agree(job, 0 if answer is None else answer.numel())
    data = (yield Broadcast(answer, lengths[0][0], last=True)).to(job.device)
    parts = job.read(data, SUMS, count)
    for (slot, tensor), part in zip(job.rows(), parts, strict=True):
        _decode(job, slot, part, tensor)


def _pieces(numel: int, size: int) -> list[slice]:
    """One piece a rank, of whole groups; the same whatever bucket a gradient is in."""
    step = -(-numel // (_UNIT * size)) * _UNIT
    return [slice(min(r * step, numel), min((r + 1) * step, numel)) for r in range(size)]


def _two_phase(job: Job) -> Program:
    slots, gradients = job.layout.slots, _prepared(job)
    scales = yield from _scales(job, gradients)
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
                _exact(writer, g)
                continue
            # a piece has a random stream of its own
            found = _encode(job, writer, f"{slot.name}/{rank}", g, scales[i], values[i])
            if (whole := decoded[i]) is not None and found is not None:
                whole[cuts[i][rank]] = found
        messages.append(job.message(writer, CODES))
    if job.feedback is not None:
        for slot, g, own in zip(slots, gradients, decoded, strict=True):
            if own is not None:
                job.feedback.record(slot.name, g, own)
    lengths = yield from _agree(job, *(m.numel() for m in messages))
    found = yield AllToAll(messages, [row[job.rank] for row in lengths])
    theirs = [job.read(data, CODES, len(slots)) for data in found]
    sizes = [[cut[r].stop - cut[r].start for cut in cuts] for r in range(job.size)]
    mine = sizes[job.rank]
    writer = Writer([_sum_room(job, s, n) for s, n in zip(slots, mine, strict=True)], job.device)
    for i, slot in enumerate(slots):
        _sum(job, slot, [parts[i] for parts in theirs], mine[i], writer)
    message = job.message(writer, SUMS)
    lengths = yield from _agree(job, message.numel())
    most = max(length for (length,) in lengths)
    found = yield AllGather(_padded(message, most), last=True)
    for rank, data in enumerate(found):
        for i, part in enumerate(job.read(data, SUMS, len(slots))):
            _decode(job, slots[i], part, job.tensors[i][cuts[i][rank]])


TOPOLOGIES: dict[str, Callable[[Job], Program]] = {
    "all_gather": _all_gather,
    "two_phase": _two_phase,
    "server": _server,
}
