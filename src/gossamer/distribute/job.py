"""One rank's part in an exchange: what topologies are made of."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.distribute.codec import GradCodec
from gossamer.distribute.feedback import ErrorFeedback
from gossamer.distribute.group import AllGather, AllMax
from gossamer.distribute.message import (
    Layout,
    Part,
    Slot,
    Writer,
    difference,
    read,
)
from gossamer.distribute.planes import Form
from gossamer.distribute.random import Key, dither_shift, parameter_hash
from gossamer.errors import ExchangeError

__all__ = [
    "Job",
    "add_sum",
    "agree",
    "codes",
    "decode_sum",
    "encode",
    "exact",
    "float32",
    "floats",
    "mean",
    "padded",
    "prepared",
    "scales_of",
    "sum_room",
    "wide",
]

_UNIT = 64  # elements of a group


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


def agree(job: Job, *numbers: int) -> Generator[Any, Any, list[list[int]]]:
    """Everybody's numbers, by rank; :class:`ExchangeError` where layouts or steps differ."""
    mine = [job.layout.fingerprint, job.step, *numbers]
    data = torch.tensor(mine, dtype=torch.int64, device=job.device).view(torch.uint8)
    rows = torch.stack((yield AllGather(data))).cpu().view(torch.int64).tolist()
    if any(row[0] != mine[0] for row in rows):
        text = torch.frombuffer(bytearray(job.layout.text.encode()), dtype=torch.uint8)
        text = text.to(job.device)
        size = torch.tensor([text.numel()], device=job.device).view(torch.uint8)
        sizes = torch.stack((yield AllGather(size))).cpu().view(torch.int64).flatten().tolist()
        found = yield AllGather(padded(text, max(sizes)))
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


def padded(data: Tensor, size: int) -> Tensor:
    """Bytes made longer; what follows is never read."""
    if data.numel() == size:
        return data
    out = data.new_zeros(size)
    out[: data.numel()] = data
    return out


def wide(slot: Slot) -> torch.dtype:
    """What a gradient is sent and summed in where it is not coded."""
    return torch.float64 if slot.dtype == torch.float64 else torch.float32


def prepared(job: Job) -> list[Tensor]:
    """Gradients as they are sent: float32 (exact float64 stays), errors of before added."""
    out = []
    for slot, tensor in job.rows():
        if not slot.coded:
            out.append(tensor.to(wide(slot)))
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
    yield from agree(job)
    # NaN has no place in a maximum everywhere; infinity has, and is decoded as NaN as well.
    own = torch.nan_to_num(torch.stack(scales), nan=math.inf, posinf=math.inf)
    return list((yield AllMax(own)).unbind())


def encode(
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


def exact(writer: Writer, gradient: Tensor) -> None:
    """Add a part of plain floats."""
    data = gradient.contiguous().view(torch.uint8)
    writer.space[: data.numel()] = data
    writer.add(data.numel(), None)


def floats(part: Part, slot: Slot, numel: int) -> Tensor:
    """What a part of plain floats holds."""
    if part.form is not None or part.payload.numel() != numel * wide(slot).itemsize:
        raise ExchangeError(f"a part of {part.payload.numel()} bytes does not hold {numel} floats")
    return part.payload.view(wide(slot))


def codes(parts: Sequence[Part]) -> tuple[list[Tensor], list[Form]]:
    """Payloads and forms of coded parts."""
    forms = [part.form for part in parts if part.form is not None]
    if len(forms) != len(parts):
        raise ExchangeError("a part holds floats where codes were expected")
    return [part.payload for part in parts], forms


def mean(parts: Sequence[Tensor], size: int) -> Tensor:
    """The sum, in order, divided."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total / size


@contextlib.contextmanager
def float32(target: Tensor) -> Iterator[Tensor]:
    """The tensor itself where it is float32, or one whose values it takes on."""
    if target.dtype == torch.float32:
        yield target
        return
    other = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    yield other
    target.copy_(other)


def add_sum(job: Job, slot: Slot, parts: Sequence[Part], numel: int, writer: Writer) -> None:
    """Add the sum of one gradient's parts, or of a piece's, to a message of sums."""
    if not slot.coded:
        exact(writer, mean([floats(part, slot, numel) for part in parts], job.size))
        return
    payloads, forms = codes(parts)
    sums = job.codec.sum_codes(payloads, numel, forms=forms)
    bits = job.codec.sum_bits(job.size)
    packed = job.codec.pack_sums(sums, bits, form="sparse")
    writer.space[: packed.numel()] = packed
    writer.add(packed.numel(), "sparse", parts[0].scale)


def sum_room(job: Job, slot: Slot, numel: int) -> int:
    """The most bytes a sum takes."""
    if not slot.coded:
        return numel * wide(slot).itemsize
    # sparse sums at their largest: one byte a group, all words, all signs
    groups = -(-numel // _UNIT)
    return groups + 7 + 8 * (job.codec.sum_bits(job.size) + 1) * groups


def decode_sum(job: Job, slot: Slot, part: Part, out: Tensor) -> None:
    """Write the mean that a part of sums stands for over ``out``."""
    if not slot.coded:
        out.copy_(floats(part, slot, out.numel()))
        return
    bits = job.codec.sum_bits(job.size)
    (payload,), (form,) = codes([part])
    with float32(out) as to:
        job.codec.decode_sums(payload, part.scale, to.numel(), bits, job.size, to, form=form)
