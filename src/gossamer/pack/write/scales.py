"""Find the integers and scales that a tensor's rows or groups were made of, from values alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.pack.format.scales import CODES, LEAST, Scales, as_rows, product, scale_dtype
from gossamer.pack.format.values import BY_TORCH, Bits, DType

__all__ = ["find_scales"]

_GROUPS = (1024, 512, 256, 128, 64, 32, 16, 8)
_STEPS = 128  # the smallest magnitude of a group is at most so many steps
_SIGNED = 1 << 11  # up to which float16 holds every integer, and a negative zero beside them
_LOOKED_AT = 64  # entries of a group that say whether there may be a scale
_SAMPLES = 8
_AT_ONCE = 1 << 17
_DIGITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, torch.float64: 52}
_HALF, _WIDE, _NARROW = (BY_TORCH[t] for t in (torch.float16, torch.int16, torch.int8))


def find_scales(bits: Bits, dtype: DType, shape: tuple[int, ...]) -> tuple[Scales, Bits] | None:
    """Scales and codes whose products are the tensor, bit for bit; None where there are none.

    Rows of the first two axes are tried whole and in groups, the largest first. Natural weights
    are refused by a few entries.

    Args:
        bits: flat bit patterns.
        dtype: their element type.
        shape: of the tensor.
    """
    if dtype.torch not in _DIGITS or len(shape) < 2:
        return None
    for axis, group in _candidates(shape):
        rows = as_rows(bits, shape, axis)
        if all(_fits(part, dtype) for part in _some(rows, group)):
            found = _all(rows, axis, group, dtype, shape)
            if found is not None:
                return found
    return None


def _candidates(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    total = int(np.prod(shape))
    widths = [(axis, total // shape[axis]) for axis in (0, 1) if shape[axis] > 1]
    widths = [(axis, cols) for axis, cols in widths if cols >= LEAST]
    yield from widths
    for group in _GROUPS:
        yield from ((axis, group) for axis, cols in widths if group < cols)


def _some(rows: Bits, group: int) -> Iterator[Bits]:
    """The first entries of groups from all over the tensor that are not empty."""
    groups = -(-rows.shape[1] // group)
    count = len(rows) * groups
    for number in np.linspace(0, count - 1, min(_SAMPLES, count)).astype(np.int64):
        row, at = divmod(int(number), groups)
        part = rows[row, at * group : (at + 1) * group][:_LOOKED_AT]
        if part.any():
            yield part[None]


def _values(bits: Bits, dtype: DType) -> NDArray[np.float64]:
    if dtype.torch == torch.bfloat16:
        bits = bits.astype("<u4") << np.uint32(16)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return bits.view(f"<f{bits.dtype.itemsize}").astype(np.float64)


def _fits(part: Bits, dtype: DType) -> bool:
    """Whether one group has a scale; all guesses at once, for most tensors have none."""
    values = _values(part, dtype)
    if not np.isfinite(values).all():
        return False
    size = np.abs(values)
    if not size.any():  # negative zeros
        return True
    guesses = size[size > 0].min() / np.arange(1, _STEPS + 1)
    if not _integers(size, guesses, dtype).any():
        return False
    return _fit(values, part, dtype) is not None


def _all(
    rows: Bits, axis: int, group: int, dtype: DType, shape: tuple[int, ...]
) -> tuple[Scales, Bits] | None:
    count, cols = rows.shape
    groups = -(-cols // group)
    kind = f"<f{scale_dtype(dtype).size}"
    scales = np.empty((count, groups), kind)
    codes = np.empty((count, groups * group), np.float64 if dtype.size == 8 else np.float32)
    step = max(1, _AT_ONCE // (groups * group))
    for start in range(0, count, step):
        part = rows[start : start + step]
        if groups * group > cols:  # zeros fit any scale
            part = np.pad(part, ((0, 0), (0, groups * group - cols)))
        cut = np.ascontiguousarray(part).reshape(-1, group)
        values = _values(cut, dtype)
        if not np.isfinite(values).all():
            return None
        fitted = _fit(values, cut, dtype)
        if fitted is None:
            return None
        scale, k = fitted
        scales[start : start + step] = scale.reshape(-1, groups)
        codes[start : start + step] = k.reshape(-1, groups * group)
    flat = scales.reshape(-1)
    empty = flat == 0
    if empty.all():
        return None
    # what is repeated costs little
    last = np.maximum.accumulate(np.where(empty, 0, np.arange(len(flat))))
    flat[:] = flat[last]
    flat[flat == 0] = flat[~empty][0]
    k = codes[:, :cols]
    most = float(np.abs(k).max())
    signed = bool(np.any(np.signbit(k) & (k == 0)))
    if signed and most > _SIGNED:
        return None
    kind_of = _HALF if signed else _NARROW if most <= 127 else _WIDE
    sizes = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    back = np.moveaxis(k.reshape(sizes), 0, axis).astype(CODES[kind_of.code])
    coded = np.ascontiguousarray(back).reshape(-1).view(kind_of.bits)
    return Scales(axis, group, scales, kind_of), coded


def _fit(
    values: NDArray[np.float64], bits: Bits, dtype: DType
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """A scale of each group (0 where all is zero) and its integers; None unless all groups fit.

    A group's smallest magnitude is 1, 2, 3 ... steps: the first that leaves integers is taken.
    """
    size = np.abs(values)
    least = np.where(size > 0, size, np.inf).min(1)
    scale = np.zeros(len(values))
    k = np.copysign(0.0, values)
    todo = np.flatnonzero(np.isfinite(least))
    for steps in range(1, _STEPS + 1):
        if not len(todo):
            return scale, k
        maybe = todo[_integers(size[todo], least[todo] / steps, dtype)]
        if not len(maybe):
            continue
        low, high, codes = _narrowed(size[maybe], least[maybe] / steps, dtype)
        codes = np.copysign(codes, values[maybe])
        for step in _between(low, high, dtype):
            fits = (scale[maybe] == 0) & (product(codes, step[:, None], dtype) == bits[maybe]).all(
                1
            )
            scale[maybe[fits]], k[maybe[fits]] = step[fits], codes[fits]
        todo = todo[scale[todo] == 0]
    return None if len(todo) else (scale, k)


def _integers(
    size: NDArray[np.float64], step: NDArray[np.float64], dtype: DType
) -> NDArray[np.bool_]:
    """Where magnitudes are integers times the step, as nearly as roundings leave them."""
    with np.errstate(all="ignore"):  # a ratio beyond all codes fits none, be it infinite
        ratio = size / step[:, None]
        codes = np.rint(ratio)
        slack = 2.0 ** (1 - _DIGITS[dtype.torch]) * codes + 1e-9
        fits: NDArray[np.bool_] = (np.abs(ratio - codes) <= slack) & (codes <= _most(dtype))
        return np.all(fits, axis=1)


def _most(dtype: DType) -> int:
    """The largest code: beyond it any number is a multiple, or 16 bits do not hold it."""
    return min((1 << _DIGITS[dtype.torch]) - 1, (1 << 15) - 1)


def _narrowed(
    size: NDArray[np.float64], step: NDArray[np.float64], dtype: DType
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The interval in which all entries leave the step, and their integers.

    Each entry allows what rounds to it. Small ones, whose integers are sure, narrow the interval
    until those of the large ones are.
    """
    ulp = 2.0 ** -_DIGITS[dtype.torch]
    low, high = step * (1 - ulp), step * (1 + ulp)
    for _ in range(4):
        codes = np.rint(size / ((low + high) / 2)[:, None])
        sure = (codes > 0) & (codes * ((high - low) / low)[:, None] < 0.5)
        with np.errstate(divide="ignore", invalid="ignore"):
            low = np.maximum(low, np.where(sure, size * (1 - ulp) / codes, 0).max(1))
            high = np.minimum(high, np.where(sure, size * (1 + ulp) / codes, np.inf).min(1))
        if (sure | (codes == 0)).all():
            break
    return low, high, np.rint(size / ((low + high) / 2)[:, None])


def _between(
    low: NDArray[np.float64], high: NDArray[np.float64], dtype: DType
) -> Iterator[NDArray[np.float64]]:
    """Steps in an interval: the one of fewest digits, which takes fewest bytes, then others."""
    middle = (low + high) / 2
    if scale_dtype(dtype).size == 8:
        yield middle
        return
    part, exponent = np.frexp(middle)
    short = np.zeros(len(middle))
    for digits in range(24, 0, -1):
        rounded = np.ldexp(np.rint(np.ldexp(part, digits)), exponent - digits)
        short = np.where((low <= rounded) & (rounded <= high), rounded, short)
    single = middle.astype(np.float32)
    for step in (short, single, np.nextafter(single, np.float32(0)), np.nextafter(single, np.inf)):
        yield step.astype(np.float32).astype(np.float64)
