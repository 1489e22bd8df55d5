"""What all gradient codecs share: scales, payloads, averages, and the choice of a back end.

A codec is a frozen set of settings without state. Codes are integers in ``[-levels, levels]``; a
worker's value is ``scale / levels * code``. Three back ends give the same bits: ``native`` (the
compiled kernel, CPU), ``triton`` (CUDA) and ``eager`` (torch, anywhere); the last is the oracle,
see :mod:`gossamer.distribute.eager` for the arithmetic and :mod:`gossamer.distribute.planes` for
the bytes.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gossamer.distribute import compiled, eager, planes
from gossamer.distribute.eager import Layout
from gossamer.distribute.planes import FORMS, Form
from gossamer.distribute.random import Key
from gossamer.errors import ArgumentError
from gossamer.native import kernel

__all__ = [
    "GradCodec",
    "Scaler",
    "backend",
    "check_clip",
    "clip_slope",
    "clipped_scale",
    "flat",
    "room",
    "statistics",
]

Scaler = Literal["max", "sigma"]

LIMIT = 1 << 33
"""Elements a tensor must stay below: the generator counts so far."""


@cache
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend(tensor: Tensor) -> str:
    """``native``, ``triton`` or ``eager``: what works on this tensor."""
    if tensor.device.type == "cpu":
        return "native" if kernel("exchange") is not None else "eager"
    return "triton" if tensor.is_cuda and _triton_found() else "eager"


def _module(tensor: Tensor) -> ModuleType:
    name = backend(tensor)
    if name == "triton":
        # imported here: triton is there on CUDA machines only
        return importlib.import_module("gossamer.distribute.triton_kernels")
    return compiled if name == "native" else eager


def statistics(g: Tensor, absolute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gossamer.distribute.eager.statistics` of flat float32, by the tensor's back end."""
    found: tuple[Tensor, Tensor, Tensor] = _module(g).statistics(g, absolute)
    return found


def clip_slope(clip: float | None) -> float:
    """``E[x f(x)] / E[x**2]`` of a Gaussian x under clipping f at ``clip`` standard deviations.

    What clipping does to the expected gradient: 1 is unbiased. Equals ``erf(clip / sqrt(2))``.

    >>> round(clip_slope(2.5), 4), clip_slope(None)
    (0.9876, 1.0)
    """
    return 1.0 if clip is None else math.erf(clip / math.sqrt(2))


def check_clip(clip: float | None, scaler: Scaler) -> None:
    """Raise :class:`ArgumentError` unless the pair can be used."""
    if scaler not in ("max", "sigma"):
        raise ArgumentError(f"scaler={scaler!r} is not one of 'max', 'sigma'")
    if clip is None and scaler == "sigma":
        raise ArgumentError("scaler='sigma' needs clip, in standard deviations")
    if clip is not None and not 0 < clip < math.inf:
        raise ArgumentError(f"clip={clip} must lie above 0; None is no clipping")


def clipped_scale(g: Tensor, clip: float | None, scaler: Scaler) -> Tensor:
    """The largest value sent of flat float32 ``g``: float32 ``()``, NaN if g is not finite.

    With sigma the standard deviation about the mean (of n values, divided by n): ``max`` gives
    min(max|g|, clip sigma), the largest magnitude after clipping (TernGrad, equation 13 and on);
    ``sigma`` gives clip sigma even where no gradient is so large (TernGrad's published code, and
    Hou et al.). ``clip=None``: max|g|, and so where sigma is 0, as of a single element, which
    either rule would turn to 0.
    """
    total, squares, largest = statistics(g)
    if clip is None or not g.numel():
        return largest
    mean, square = total / g.numel(), squares / g.numel()
    variance = square - mean * mean
    bound = (variance.clamp(min=0).sqrt() * clip).float()
    if scaler == "max":
        bound = torch.minimum(largest, bound)
    # what rounding leaves of equal elements' variance is none
    return torch.where(variance > 1e-12 * square, bound, largest) + largest * 0


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
    def bias(self) -> float:
        """Slope of the expected value of a Gaussian gradient, 1 where unbiased."""
        return 1.0

    @property
    def forms(self) -> tuple[Form, ...]:
        """Forms of a payload there are, see :mod:`gossamer.distribute.planes`."""
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
        return out[: _module(g).encode(g, scale, self.layout, key, shift, form, out)]

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

        Raises :class:`~gossamer.errors.FormatError` for a payload of the wrong length or with bits
        set where none can be, :class:`ArgumentError` for other arguments; ``out`` is then as it
        was.
        """
        out = flat(out, "out")
        names = self._forms(payloads, forms)
        if len(scales) != len(names) or divisor < 1:
            raise ArgumentError(
                f"{len(scales)} scales for {len(names)} payloads, divisor={divisor}: one scale a "
                "payload, divisor 1 or more"
            )
        values = torch.as_tensor(scales, dtype=torch.float32, device=out.device)
        _module(out).decode_mean(payloads, names, values, self.layout, out, divisor)

    def sum_codes(
        self, payloads: Sequence[Tensor], numel: int, *, forms: Form | Sequence[Form] = "planes"
    ) -> Tensor:
        """The exact sum of several workers' codes under a shared scale.

        ``(numel,)`` of the smallest of int8, int16, int32 that holds any sum. Raises as
        :meth:`decode_mean`.
        """
        self._need_sums()
        names = self._forms(payloads, forms)
        sums: Tensor = _module(payloads[0]).sum_codes(payloads, names, numel, self.layout)
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
        packed: Tensor = _module(sums).pack_sums(sums.reshape(-1), bits, form)
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

        Raises :class:`~gossamer.errors.FormatError` for bytes that cannot be, with ``out`` as it
        was; NaN everywhere if the scale is not finite.
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
        _module(out).decode_sums(packed, bits, form, value / self._mean_of(divisor), out)

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
