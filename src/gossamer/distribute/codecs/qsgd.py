"""QSGD: s levels between 0 and the gradient's length.

Alistarh, Grubic, Li, Tomioka, Vojnovic, *QSGD: Communication-Efficient SGD via Gradient
Quantization and Encoding*, NeurIPS 2017, arXiv 1610.02132, section 3.1:
``Q(g) = |g|_2 sign(g) xi``, xi one of 0, 1/s .. 1, drawn from the two neighbours of
``|g_i| / |g|_2``: unbiased, ``E|Q(g) - g|**2 <= min(n / s**2, sqrt(n) / s) |g|_2**2``. Section 4:
buckets of d consecutive elements, each with its own length, so that the error grows with sqrt(d).

Sent as sign and magnitude planes with gapless signs, not as the paper's Elias codes. With buckets,
the payload starts with their lengths as float32, padded to 8 bytes; gradients are divided by them
before encoding and the tensor's own scale is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.distribute.codecs.backends import statistics
from gossamer.distribute.codecs.codec import GradCodec, flat, room
from gossamer.distribute.codecs.eager import Layout, lane_sums
from gossamer.distribute.codecs.random import Key
from gossamer.distribute.wire.planes import Form

__all__ = ["QSGD"]


@final
@dataclass(frozen=True)
class QSGD(GradCodec):
    """QSGD.

    Attributes:
        steps: the paper's s, from 1 to 255.
        bucket: elements that share a length, a multiple of 64, or ``None`` for the whole tensor.
    """

    steps: int
    bucket: int | None = None
    id: ClassVar[int] = 3

    def __post_init__(self) -> None:
        """Check."""
        if not isinstance(self.steps, int) or not 1 <= self.steps <= 255:
            raise ArgumentError(f"steps={self.steps!r} must be 1 to 255")
        whole = isinstance(self.bucket, int)
        if self.bucket is not None and (not whole or self.bucket < 64 or self.bucket % 64):
            raise ArgumentError(f"bucket={self.bucket!r} must be a multiple of 64, or None")

    @property
    def name(self) -> str:
        """``qsgd-<steps>``."""
        return f"qsgd-{self.steps}"

    @property
    def layout(self) -> Layout:
        """``steps`` levels."""
        return Layout(levels=self.steps, planes=self.steps.bit_length())

    @property
    def sums(self) -> bool:
        """Not with buckets: their lengths differ from worker to worker."""
        return self.bucket is None

    @property
    def grain(self) -> int:
        """A bucket."""
        return self.bucket or super().grain

    @property
    def forms(self) -> tuple[Form, ...]:
        """Planes and sparse."""
        return ("planes", "sparse")

    def scale(self, g: Tensor) -> Tensor:
        """The gradient's length; with buckets 1."""
        g = flat(g, "g")
        _, squares, largest = statistics(g)
        if self.bucket is None:
            return squares.sqrt().float() + largest * 0
        return torch.ones_like(largest) + largest * 0

    def encode(
        self,
        g: Tensor,
        scale: Tensor | float,
        key: Key,
        *,
        form: Form = "planes",
        shift: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Codes of a gradient as bytes, after the buckets' lengths."""
        if self.bucket is None:
            return super().encode(g, scale, key, form=form, shift=shift, out=out)
        g = flat(g, "g")
        out = room(out, self.payload_bytes(g.numel(), form), g.device)
        head = self._head(g.numel())
        rows = pad(g, (0, -g.numel() % self.bucket)).reshape(-1, self.bucket)
        lengths = lane_sums(rows.double().square()).sqrt().float()
        out[:head] = 0
        out[: 4 * len(lengths)] = lengths.view(torch.uint8)
        unit = (rows / torch.where(lengths > 0, lengths, 1)[:, None]).reshape(-1)[: g.numel()]
        codes = self._whole().encode(unit, scale, key, form=form, shift=shift, out=out[head:])
        return out[: head + codes.numel()]

    def decode_mean(
        self,
        payloads: Sequence[Tensor],
        scales: Tensor | Sequence[Tensor | float],
        out: Tensor,
        divisor: int,
        *,
        forms: Form | Sequence[Form] = "planes",
    ) -> None:
        """Write the mean over ``out``; with buckets, each worker's lengths times its codes."""
        if self.bucket is None:
            return super().decode_mean(payloads, scales, out, divisor, forms=forms)
        out = flat(out, "out")
        names = self._scaled(payloads, scales, divisor, forms)
        head, total = self._head(out.numel()), torch.zeros_like(out)
        count = -(-out.numel() // self.bucket)
        one = torch.empty_like(out)
        for payload, scale, form in zip(payloads, scales, names, strict=True):
            if payload.numel() < head:
                raise FormatError(f"a payload of {payload.numel()} bytes without its {head} first")
            lengths = payload[: 4 * count].clone().view(torch.float32)
            self._whole().decode_mean([payload[head:]], [float(scale)], one, 1, forms=form)
            total += one * lengths.repeat_interleave(self.bucket)[: out.numel()]
        out.copy_(total).mul_(torch.tensor(1 / divisor, dtype=torch.float32))

    def payload_bytes(self, numel: int, form: Form = "planes") -> int:
        """Bytes of a payload, lengths of the buckets among them."""
        return self._head(numel) + super().payload_bytes(numel, form)

    def _whole(self) -> QSGD:
        return replace(self, bucket=None)

    def _head(self, numel: int) -> int:
        if self.bucket is None:
            return 0
        count = -(-numel // self.bucket)
        return 4 * (count + count % 2)
