"""One rank's part in an exchange: what topologies are made of."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.distribute.codecs.codec import GradCodec
from gossamer.distribute.codecs.feedback import ErrorFeedback
from gossamer.distribute.codecs.random import Key, dither_shift, parameter_hash
from gossamer.distribute.exchange import agreement
from gossamer.distribute.exchange.group import AllMax
from gossamer.distribute.exchange.spans import Piece
from gossamer.distribute.wire.message import CODES, SUMS, Layout, Part, Slot, Writer, read
from gossamer.distribute.wire.planes import Form

__all__ = [
    "Job",
    "agree",
    "decode_mean",
    "decode_sums",
    "message_of",
    "prepared",
    "scales_of",
    "sums_of",
]

_UNIT = 64  # elements of a group


@dataclass(frozen=True)
class Job:
    """One rank's part in one exchange.

    Attributes:
        tensors: flat and contiguous, one a slot; the average is written over them.
        shared: whether all ranks use the largest scale of all.
        shifted: whether all ranks share a random stream, shifted by rank.
        checksum: whether messages carry one.
        requantize: whether sums go as codes of their mean rather than exactly.
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
    requantize: bool
    checksum: bool
    feedback: ErrorFeedback | None

    def rows(self) -> Iterator[tuple[Slot, Tensor]]:
        """Slots with their tensors."""
        return zip(self.layout.slots, self.tensors, strict=True)

    @property
    def device(self) -> torch.device:
        """Of the tensors."""
        return self.tensors[0].device

    def key(self, name: str, start: int = 0) -> tuple[Key, int]:
        """Random stream of a parameter from an element on, and its shift."""
        rank = None if self.shifted else self.rank
        shift = dither_shift(self.rank, self.size) % 65536 if self.shifted else 0
        return Key(self.seed, self.step, rank, parameter_hash(name), start), shift

    def read(self, found: Sequence[Tensor], kind: int, counts: Sequence[int]) -> list[list[Part]]:
        """The parts of messages, by rank; :class:`FormatError` names whose is damaged."""
        return [
            self.read_from(rank, data, kind, n)
            for rank, (data, n) in enumerate(zip(found, counts, strict=True))
        ]

    def read_from(self, rank: int, data: Tensor, kind: int, count: int) -> list[Part]:
        """The parts of a rank's message; :class:`FormatError` names the rank."""
        try:
            return read(
                data,
                kind=kind,
                codec=self.codec.id,
                step=self.step,
                fingerprint=self.layout.fingerprint,
                count=count,
                checksum=self.checksum and rank != self.rank,
            )
        except FormatError as e:
            raise FormatError(f"the message of rank {rank} is damaged: {e}") from e

    def message(self, writer: Writer, kind: int) -> Tensor:
        """A finished message."""
        return writer.finish(
            kind, self.codec.id, self.step, self.layout.fingerprint, checksum=self.checksum
        )


def agree(job: Job, *numbers: int) -> Generator[Any, Any, list[list[int]]]:
    """:func:`gossamer.distribute.exchange.agreement.agree` on a job's layout and step."""
    return agreement.agree(job.layout, job.step, numbers, job.device)


def _wide(slot: Slot) -> torch.dtype:
    """What a gradient is sent and summed in where it is not coded."""
    return torch.float64 if slot.dtype == torch.float64 else torch.float32


def prepared(job: Job) -> list[Tensor]:
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


def scales_of(job: Job, gradients: Sequence[Tensor]) -> Generator[Any, Any, list[Tensor]]:
    """One scale a coded gradient, 0 for the others; shared if the job says so."""
    zero = torch.zeros((), device=job.device)
    pairs = zip(job.layout.slots, gradients, strict=True)
    scales = [job.codec.scale(g) if slot.coded else zero for slot, g in pairs]
    if not job.shared:
        return scales
    yield from agree(job, *[0] * agreement.NUMBERS)
    # NaN has no place in a maximum everywhere; infinity has, and is decoded as NaN as well.
    own = torch.nan_to_num(torch.stack(scales), nan=math.inf, posinf=math.inf)
    return list((yield AllMax(own)).unbind())


def message_of(job: Job, pieces: Sequence[Piece]) -> Tensor:
    """A message with the codes of pieces, or their floats; notes what they decode to."""
    room = [
        job.codec.payload_bytes(p.numel) if p.slot.coded else p.numel * p.gradient.element_size()
        for p in pieces
    ]
    writer = Writer(room, job.device)
    for piece in pieces:
        if not piece.slot.coded:
            _exact(writer, piece.gradient)
            continue
        # an empty piece may begin in the middle of a group, at the gradient's end
        key, shift = job.key(piece.slot.name, piece.start if piece.numel else 0)
        payload, form = job.codec.encode_smallest(
            piece.gradient, piece.scale, key, shift=shift, out=writer.space
        )
        if piece.decoded is not None:
            value = job.codec.decode(payload, piece.value, piece.numel, form=form)
            piece.decoded.copy_(value)
        writer.add(payload.numel(), form, piece.value)
    return job.message(writer, CODES)


def _exact(writer: Writer, gradient: Tensor) -> None:
    """Add a part of plain floats."""
    data = gradient.contiguous().view(torch.uint8)
    writer.space[: data.numel()] = data
    writer.add(data.numel(), None)


def _floats(part: Part, piece: Piece) -> Tensor:
    """What a part of plain floats holds."""
    dtype = _wide(piece.slot)
    if part.form is not None or part.payload.numel() != piece.numel * dtype.itemsize:
        raise FormatError(
            f"a part of {part.payload.numel()} bytes does not hold {piece.numel} floats"
        )
    return part.payload.view(dtype)


def _codes(parts: Sequence[Part]) -> tuple[list[Tensor], list[Form]]:
    """Payloads and forms of coded parts."""
    forms = [part.form for part in parts if part.form is not None]
    if len(forms) != len(parts):
        raise FormatError("a part holds floats where codes were expected")
    return [part.payload for part in parts], forms


def _mean(parts: Sequence[Tensor], size: int) -> Tensor:
    """The sum, in order, divided."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total / size


@contextlib.contextmanager
def _float32(target: Tensor) -> Iterator[Tensor]:
    """The tensor itself where it is float32, or one whose values it takes on."""
    if target.dtype == torch.float32:
        yield target
        return
    other = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    yield other
    target.copy_(other)


def sums_of(job: Job, pieces: Sequence[Piece], messages: Sequence[Sequence[Part]]) -> Tensor:
    """A message with the sums of pieces over all ranks' messages."""
    writer = Writer([_sum_room(job, piece) for piece in pieces], job.device)
    for i, piece in enumerate(pieces):
        parts = [parts[i] for parts in messages]
        if not piece.slot.coded:
            _exact(writer, _mean([_floats(part, piece) for part in parts], job.size))
            continue
        payloads, forms = _codes(parts)
        if job.requantize:
            _coded_again(job, piece, payloads, forms, parts[0].scale, writer)
            continue
        sums = job.codec.sum_codes(payloads, piece.numel, forms=forms)
        packed = job.codec.pack_sums(sums, job.codec.sum_bits(job.size), form="sparse")
        writer.space[: packed.numel()] = packed
        writer.add(packed.numel(), "sparse", parts[0].scale)
    return job.message(writer, SUMS)


def _coded_again(
    job: Job, piece: Piece, payloads: list[Tensor], forms: list[Form], scale: float, writer: Writer
) -> None:
    """Add the codes of a mean, under the scale that it is of.

    No mean is larger than that. A scale and a random stream of the owner's would depend on where
    gradients are cut, and so on what shares a bucket.
    """
    mean = torch.empty(piece.numel, dtype=torch.float32, device=job.device)
    job.codec.decode_mean(payloads, [scale] * job.size, mean, job.size, forms=forms)
    name, start = f"{piece.slot.name}/mean", piece.start if piece.numel else 0
    key = Key(job.seed, job.step, None, parameter_hash(name), start)
    payload, form = job.codec.encode_smallest(mean, scale, key, out=writer.space)
    writer.add(payload.numel(), form, scale)


def _sum_room(job: Job, piece: Piece) -> int:
    if not piece.slot.coded:
        return piece.numel * _wide(piece.slot).itemsize
    if job.requantize:
        return job.codec.payload_bytes(piece.numel)
    # sparse sums at their largest: one byte a group, all words, all signs
    groups = -(-piece.numel // _UNIT)
    return groups + 7 + 8 * (job.codec.sum_bits(job.size) + 1) * groups


def decode_mean(job: Job, pieces: Sequence[Piece], messages: Sequence[Sequence[Part]]) -> None:
    """Write the means of all ranks' codes over the pieces' targets."""
    for i, piece in enumerate(pieces):
        parts = [parts[i] for parts in messages]
        if not piece.slot.coded:
            piece.target.copy_(_mean([_floats(part, piece) for part in parts], job.size))
            continue
        payloads, forms = _codes(parts)
        scales = torch.tensor([part.scale for part in parts], device=job.device)
        with _float32(piece.target) as out:
            job.codec.decode_mean(payloads, scales, out, job.size, forms=forms)


def decode_sums(job: Job, pieces: Sequence[Piece], parts: Sequence[Part]) -> None:
    """Write the means that a message of sums stands for over the pieces' targets."""
    bits = job.codec.sum_bits(job.size)
    for piece, part in zip(pieces, parts, strict=True):
        if not piece.slot.coded:
            piece.target.copy_(_floats(part, piece))
            continue
        (payload,), (form,) = _codes([part])
        with _float32(piece.target) as to:
            if job.requantize:
                job.codec.decode_mean([payload], [part.scale], to, 1, forms=form)
                continue
            job.codec.decode_sums(payload, part.scale, to.numel(), bits, job.size, to, form=form)
