"""Dynamic-precision fixed point: numbers on power-of-two grids, and the search of the grid.

Qiu et al., *Going Deeper with Embedded FPGA Platform for Convolutional Neural Network*, FPGA 2016,
section 5.  A number of ``bw`` bits and fractional length ``f_l`` is two's complement,

    n = sum_i B_i 2^(-f_l) 2^i,

so it is an integer code in [-2^(bw-1), 2^(bw-1) - 1] times 2^(-f_l), without a zero point; f_l may
be negative and may exceed bw.  The fractional length minimises sum |W - W(bw, f_l)| (weight
phase), or sum |x - x(bw, f_l)| between a layer's float output and its fixed-point output, computed
from quantised inputs (data phase).

Rounding is to nearest, ties to even, as in ``torch.round`` and ONNX's QuantizeLinear; values
beyond the range saturate.  The paper states neither.

The paper searches "adjacent domains" of the f_l without overflow.  Here the search stops where
nothing better can follow, so that it is the minimum over all f_l:

- Without overflow the grid of f_l contains that of every smaller f_l: rounding error never grows
  with f_l.  So for a tensor against itself the best f_l is no smaller than the start, and
  against another target t every smaller f_l errs by at least sum |x - x(f_l)| - sum |x - t|.
- A larger f_l errs by at least sum max(|t| - 2^(bw-1-f_l), 0), which never falls with f_l.

Of equal errors the start is taken, then the nearest below it, then above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError

__all__ = [
    "Format",
    "error",
    "no_overflow",
    "quantize",
    "search",
    "search_pairs",
    "to_codes",
    "to_fixed_point",
]

MOST_BITS = 16
_MOST_FRAC = 512  # far beyond any float32 value, and 2^f is still a float64
_SLACK = 1 + 1e-9  # a sum's own rounding must not end the search early


@dataclass(frozen=True)
class Format:
    """Two's complement of ``bits`` bits (2 to 16), in units of ``2^-frac``.

    >>> Format(8, 7).low, Format(8, 7).high, Format(8, 7).step
    (-128, 127, 0.0078125)

    Raises :class:`ArgumentError` for bits outside 2 to 16 and a frac beyond 512 either way.
    """

    bits: int
    frac: int

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        check_bits(self.bits, "bits")
        if isinstance(self.frac, bool) or not isinstance(self.frac, int):
            raise ArgumentError(f"frac={self.frac!r} must be a whole number")
        if abs(self.frac) > _MOST_FRAC:
            raise ArgumentError(
                f"frac={self.frac} is beyond {_MOST_FRAC} either way; rescale the values"
            )

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def step(self) -> float:
        """What one unit of the code is worth."""
        return math.ldexp(1.0, -self.frac)


def check_bits(bits: int, name: str) -> None:
    """Raise :class:`ArgumentError` for bits outside 2 to 16."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= MOST_BITS:
        raise ArgumentError(f"{name}={bits!r} is outside 2 to {MOST_BITS} (two's complement bits)")


def to_codes(tensor: Tensor, form: Format) -> Tensor:
    """Integer codes of values, float64: round half to even, then saturate.

    >>> to_codes(torch.tensor([0.5, 1.5, -0.5, 9.0, -9.0]), Format(3, 0)).tolist()
    [0.0, 2.0, 0.0, 3.0, -4.0]
    """
    scaled = tensor.double() * math.ldexp(1.0, form.frac)
    # -0.0 + 0.0 is 0.0: a code has one zero
    return torch.round(scaled).clamp_(form.low, form.high).add_(0.0)


def quantize(tensor: Tensor, bits: int, frac: int) -> Tensor:
    """The nearest values ``code * 2^-frac``, in the tensor's dtype.

    >>> quantize(torch.tensor([0.3, -0.8, 5.0]), 4, 2)
    tensor([ 0.2500, -0.7500,  1.7500])

    Raises :class:`ArgumentError` for bits outside 2 to 16, NaN or infinity, and a dtype that does
    not hold the values exactly (bfloat16 beyond 8 bits, float16 beyond 11).
    """
    form = Format(bits, frac)
    check_finite(tensor, "tensor")
    wide = to_codes(tensor, form) * form.step
    values = wide.to(tensor.dtype)
    if not torch.equal(values.double(), wide):
        raise ArgumentError(
            f"{tensor.dtype} does not hold {bits} bits with frac={frac} exactly; use float32"
        )
    return values


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise :class:`ArgumentError` for a tensor that is no float, or holds NaN or infinity."""
    if not tensor.is_floating_point():
        raise ArgumentError(f"{name} is {tensor.dtype}; give floating-point values")
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise ArgumentError(f"{name} holds {bad} values that are NaN or infinite; clean it first")


def error(tensor: Tensor, bits: int, frac: int, *, target: Tensor | None = None) -> float:
    """sum |target - tensor(bits, frac)|; the target is the tensor itself where not given."""
    return _error([(tensor, tensor if target is None else target)], Format(bits, frac))[0]


def _error(pairs: Sequence[tuple[Tensor, Tensor]], form: Format) -> tuple[float, float]:
    """Error against the targets, and against the values themselves."""
    off = own = 0.0
    for values, target in pairs:
        rounded = to_codes(values, form) * form.step
        mine = float((values - rounded).abs_().sum())
        own += mine
        off += mine if target is values else float((target - rounded).abs_().sum())
    return off, own


def no_overflow(low: float, high: float, bits: int) -> int:
    """The largest fractional length at which neither value saturates; 0 when both are 0.

    >>> no_overflow(-1.0, 0.9, 8), no_overflow(0.0, 1.0, 8)
    (7, 6)
    """
    top, bottom = (1 << (bits - 1)) - 1, -(1 << (bits - 1))
    most = max(abs(low), abs(high))
    if most == 0:
        return 0

    def fits(frac: int) -> bool:
        # Python's round() is to nearest, ties to even, and exact
        return round(math.ldexp(high, frac)) <= top and round(math.ldexp(low, frac)) >= bottom

    frac = bits - 1 - math.frexp(most)[1]
    while fits(frac + 1):
        frac += 1
    while not fits(frac):
        frac -= 1
    return frac


def search(tensor: Tensor, bits: int, *, target: Tensor | None = None) -> int:
    """The fractional length of least sum |target - tensor(bits, frac)|.

    Args:
        tensor: values to be quantised, any shape.
        bits: 2 to 16.
        target: what they are compared with, of the same shape; the tensor itself where not given.

    Returns the minimum over all lengths. Against a target these start ``bits + 1`` below the
    length without overflow, where every value rounds to zero, and end where every value is cut
    off to next to nothing.

    >>> search(torch.tensor([0.5, -0.25, 0.125]), 4)
    3

    Raises :class:`ArgumentError` for bits outside 2 to 16, NaN or infinity, and shapes that differ.
    """
    if target is not None and target.shape != tensor.shape:
        raise ArgumentError(f"target {tuple(target.shape)} differs from {tuple(tensor.shape)}")
    return search_pairs([(tensor, tensor if target is None else target)], bits)


def search_pairs(pairs: Sequence[tuple[Tensor, Tensor]], bits: int) -> int:
    """:func:`search` over several tensors at once: one length for all; (values, target) each.

    Raises :class:`ArgumentError` as :func:`search` does.
    """
    check_bits(bits, "bits")
    for values, target in pairs:
        check_finite(values, "tensor")
        check_finite(target, "target")
    # a tensor against itself stays one object: it is searched upwards only
    pairs = [
        (once, once if target is values else target.double())
        for values, target in pairs
        for once in (values.double(),)
        if values.numel()
    ]
    low = min((float(v.min()) for v, _ in pairs), default=0.0)
    high = max((float(v.max()) for v, _ in pairs), default=0.0)
    start = no_overflow(low, high, bits)
    if low == high == 0:
        return start
    itself = all(t is v for v, t in pairs)
    apart = 0.0 if itself else sum(float((v - t).abs().sum()) for v, t in pairs)
    least, chosen = _error(pairs, Format(bits, start))[0], start
    for frac in range(start - 1, start - bits - 2, -1) if not itself else ():
        off, own = _error(pairs, Format(bits, frac))
        if off < least:
            least, chosen = off, frac
        if own - apart > least * _SLACK:
            break
    count = sum(v.numel() for v, _ in pairs)
    # From here on every value of the tensor saturates far below the largest: see no_overflow.
    for frac in range(start + 1, start + bits + 3 + count.bit_length()):
        form = Format(bits, frac)
        lost = sum(float((t.abs() + form.low * form.step).clamp_(min=0).sum()) for _, t in pairs)
        if lost > least * _SLACK:
            break
        off, _ = _error(pairs, form)
        if off < least:
            least, chosen = off, frac
    return chosen


def to_fixed_point(tensor: Tensor, bits: int, frac: int | None = None) -> Quantized:
    """Codes and code book of a tensor in fixed point; the fractional length is searched.

    >>> to_fixed_point(torch.tensor([0.5, -0.25, 0.1]), 3).codebook
    tensor([ 0.0000, -0.2500,  0.5000])

    Raises :class:`ArgumentError` as :func:`quantize` does.
    """
    check_finite(tensor, "tensor")
    return Quantized.of(quantize(tensor, bits, search(tensor, bits) if frac is None else frac))
