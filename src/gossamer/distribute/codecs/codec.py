"""What all gradient codecs share: payloads, averages, exact sums.

A codec is a frozen set of settings without state. Codes are integers in ``[-levels, levels]``; a
worker's value is ``scale / levels * code``. All back ends give the same bits
(:mod:`gossamer.distribute.codecs.backends`); :mod:`gossamer.distribute.codecs.eager` states the
arithmetic,
:mod:`gossamer.distribute.wire.planes` the bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.distribute.codecs.backends import backend, module
from gossamer.distribute.codecs.eager import Layout
from gossamer.distribute.codecs.random import Key
from gossamer.distribute.codecs.scales import clip_slope
from gossamer.distribute.wire import planes
from gossamer.distribute.wire.planes import FORMS, Form

__all__ = ["GradCodec", "backend", "clip_slope", "flat", "room"]

LIMIT = 1 << 33
"""Elements a tensor must stay below: the generator counts so far."""


class GradCodec(ABC):
    """Gradients to a few bits and back.

    Attributes:
        id: number on the wire.
        name: how people call it.
        levels: codes lie in ``[-levels, levels]``.
        sums: whether exact integer sums of codes make sense, if workers share a scale.
        unbiased: whether the expected value is the gradient (clipped or not: see ``bias``).
    """

    id: ClassVar[int]
    unbiased: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """How people call it."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Levels and bit planes."""

    @property
    def levels(self) -> int:
        """The largest code."""
        return self.layout.levels

    @property
    def sums(self) -> bool:
        """Whether exact integer sums of codes make sense under a shared scale."""
        return True

    @property
    def grain(self) -> int:
        """Elements that are coded together, a multiple of 64: a gradient may be cut between."""
        return planes.GROUP

    @property
    def bias(self) -> float:
        """Slope of the expected value of a Gaussian gradient, 1 where unbiased."""
        return 1.0

    @property
    def forms(self) -> tuple[Form, ...]:
        """Forms of a payload there are, see :mod:`gossamer.distribute.wire.planes`."""
        if self.layout.half:
            return ("planes",)
        return FORMS if self.layout.planes == 1 else ("planes", "sparse")

    @abstractmethod
    def scale(self, g: Tensor) -> Tensor:
        """The scale of a gradient: float32 ``()``, NaN if the gradient is not finite."""

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
        """Codes of a gradient as bytes.

        Args:
            g: float32, any shape, contiguous, fewer than 2**33 elements.
            scale: the gradient's own, or one shared by all workers and no smaller.
            key: names the random stream.
            form: of :attr:`forms`.
            shift: added to the stream's 16-bit words (:func:`~.random.dither_shift`).
            out: uint8 with room for :meth:`payload_bytes`; allocated if not given.

        Returns the payload, uint8: a view of ``out``, as long as the form needs.
        Raises :class:`ArgumentError` for other tensors, an unknown form or too small an ``out``.
        """
        g = flat(g, "g")
        self._check(form)
        if not 0 <= shift < 65536:
            raise ArgumentError(f"shift={shift} must lie in 0..65535")
        out = room(out, self.payload_bytes(g.numel(), form), g.device)
        scale = torch.as_tensor(scale, dtype=torch.float32, device=g.device).reshape(())
        return out[: module(g).encode(g, scale, self.layout, key, shift, form, out)]

    def encode_smallest(
        self,
        g: Tensor,
        scale: Tensor | float,
        key: Key,
        *,
        shift: int = 0,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Form]:
        """:meth:`encode` in whichever of planes and sparse takes fewer bytes, and which it was.

        ``out`` needs room for planes; base 3 is never chosen: sparse is smaller up to 60 % non-zero
        and faster.
        """
        if "sparse" not in self.forms:
            return self.encode(g, scale, key, shift=shift, out=out), "planes"
        payload = self.encode(g, scale, key, form="sparse", shift=shift, out=out)
        if payload.numel() < self.payload_bytes(g.numel(), "planes"):
            return payload, "sparse"
        return self.encode(g, scale, key, shift=shift, out=out), "planes"

    def decode(
        self, payload: Tensor, scale: Tensor | float, numel: int, *, form: Form = "planes"
    ) -> Tensor:
        """One worker's values: float32 ``(numel,)``. Raises as :meth:`decode_mean`."""
        out = torch.empty(numel, dtype=torch.float32, device=payload.device)
        self.decode_mean([payload], [float(scale)], out, 1, forms=form)
        return out

    def decode_mean(
        self,
        payloads: Sequence[Tensor],
        scales: Tensor | Sequence[Tensor | float],
        out: Tensor,
        divisor: int,
        *,
        forms: Form | Sequence[Form] = "planes",
    ) -> None:
        """Write ``sum_r scale_r / levels * code_r / divisor``, ranks in order, over ``out``.

        Args:
            payloads: of one gradient, one a rank.
            scales: one a rank; NaN everywhere results if one is not finite.
            out: float32, contiguous; its size is the gradient's.
            divisor: the number of workers.
            forms: of each payload, or of all.

        Raises :class:`~gossamer.core.errors.FormatError` for a payload of the wrong length or with
        bits set where none can be, :class:`ArgumentError` for other arguments; ``out`` is then as
        it was.
        """
        out = flat(out, "out")
        names = self._scaled(payloads, scales, divisor, forms)
        values = torch.as_tensor(scales, dtype=torch.float32, device=out.device)
        module(out).decode_mean(payloads, names, values, self.layout, out, divisor)

    def sum_codes(
        self, payloads: Sequence[Tensor], numel: int, *, forms: Form | Sequence[Form] = "planes"
    ) -> Tensor:
        """The exact sum of several workers' codes under a shared scale.

        ``(numel,)`` of the smallest of int8, int16, int32 that holds any sum. Raises as
        :meth:`decode_mean`.
        """
        self._need_sums()
        names = self._forms(payloads, forms)
        sums: Tensor = module(payloads[0]).sum_codes(payloads, names, numel, self.layout)
        return sums

    def sum_bits(self, workers: int) -> int:
        """Bits of one sum of ``workers`` codes: ceil(log2(2 workers levels + 1))."""
        return (2 * workers * self.levels).bit_length()

    def pack_sums(self, sums: Tensor, bits: int, *, form: Form = "planes") -> Tensor:
        """Sums as bytes, uint8, ``bits`` bits each (``planes``) or fewer, by group (``sparse``)."""
        self._need_sums()
        if sums.dtype not in (torch.int8, torch.int16, torch.int32) or not 1 <= bits <= 31:
            raise ArgumentError(
                f"sums of {sums.dtype} in bits={bits}: int8, int16 or int32 in 1 to 31 bits"
            )
        if form not in ("planes", "sparse"):
            raise ArgumentError(f"form={form!r}: sums go as 'planes' or 'sparse'")
        packed: Tensor = module(sums).pack_sums(sums.reshape(-1), bits, form)
        return packed

    def decode_sums(
        self,
        packed: Tensor,
        scale: Tensor | float,
        numel: int,
        bits: int,
        divisor: int,
        out: Tensor,
        *,
        form: Form = "planes",
    ) -> None:
        """Write the mean, ``S * (scale / (levels * divisor))``, of packed sums S over ``out``.

        Raises :class:`~gossamer.core.errors.FormatError` for bytes that cannot be, with ``out`` as
        it was; NaN everywhere if the scale is not finite.
        """
        self._need_sums()
        out = flat(out, "out")
        if out.numel() != numel or divisor < 1 or not 1 <= bits <= 31:
            raise ArgumentError(
                f"numel={numel}, divisor={divisor}, bits={bits} with an out of {out.numel()}: as "
                "large as out, 1 or more, 1 to 31"
            )
        if form not in ("planes", "sparse"):
            raise ArgumentError(f"form={form!r}: sums go as 'planes' or 'sparse'")
        value = torch.as_tensor(scale, dtype=torch.float32, device=out.device).reshape(())
        module(out).decode_sums(packed, bits, form, value / self._mean_of(divisor), out)

    def _mean_of(self, divisor: int) -> float:
        """What a shared scale is divided by to become the value of a sum's unit."""
        return float(self.levels * divisor)

    def payload_bytes(self, numel: int, form: Form = "planes") -> int:
        """Bytes of a payload; of ``sparse`` the most there can be."""
        self._check(form)
        return planes.payload_bytes(numel, self.layout.planes, form)

    def _check(self, form: Form) -> None:
        if form not in self.forms:
            raise ArgumentError(
                f"form={form!r} is not one of {', '.join(self.forms)}, those of {self.name}"
            )

    def _forms(self, payloads: Sequence[Tensor], forms: Form | Sequence[Form]) -> list[Form]:
        if not payloads:
            raise ArgumentError("payloads is empty; give one a rank")
        names: list[Form] = [forms] * len(payloads) if isinstance(forms, str) else list(forms)
        if len(names) != len(payloads):
            raise ArgumentError(f"{len(names)} forms for {len(payloads)} payloads")
        for form, payload in zip(names, payloads, strict=True):
            self._check(form)
            if payload.dtype != torch.uint8 or payload.ndim != 1:
                raise ArgumentError(f"a payload of {payload.dtype} is not flat uint8")
        return names

    def _scaled(
        self,
        payloads: Sequence[Tensor],
        scales: Tensor | Sequence[Tensor | float],
        divisor: int,
        forms: Form | Sequence[Form],
    ) -> list[Form]:
        names = self._forms(payloads, forms)
        if len(scales) != len(names) or divisor < 1:
            raise ArgumentError(
                f"{len(scales)} scales for {len(names)} payloads, divisor={divisor}: one scale a "
                "payload, divisor 1 or more"
            )
        return names

    def _need_sums(self) -> None:
        if not self.sums:
            raise ArgumentError(f"{self.name} has no exact sums: use the all_gather topology")


def flat(tensor: Tensor, what: str) -> Tensor:
    """A view of one dimension; :class:`ArgumentError` unless contiguous float32 and not huge."""
    if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.numel() >= LIMIT:
        raise ArgumentError(
            f"{what} is {tensor.dtype} of {tuple(tensor.shape)}, strides {tensor.stride()}: it "
            "must be contiguous float32 of fewer than 2**33 elements; call .float().contiguous()"
        )
    return tensor.detach().view(-1)


def room(out: Tensor | None, need: int, device: torch.device) -> Tensor:
    """``out`` if it holds ``need`` bytes, or new ones."""
    if out is None:
        return torch.empty(need, dtype=torch.uint8, device=device)
    if out.dtype != torch.uint8 or out.ndim != 1 or not out.is_contiguous() or out.numel() < need:
        raise ArgumentError(
            f"out is {out.dtype} of {tuple(out.shape)}: it must be flat uint8 of {need} or more"
        )
    return out
