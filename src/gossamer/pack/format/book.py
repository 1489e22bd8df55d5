"""The code book in as few bytes as its values allow: narrower floats, deltas, or only a step.

Each form is tried and checked bit for bit; ``docs/format.md`` ("Code book") has the layout.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from gossamer.pack.coders.limits import Reader, unzigzag, varint, zigzag
from gossamer.pack.format.values import BY_CODE, MAX_DISTINCT, Bits, DType

__all__ = ["decode_book", "encode_book", "find_grid", "grid_values", "read_step"]

_F32, _F16, _BF16, _F64 = (BY_CODE[c] for c in (0, 1, 2, 3))
_ELEMENTS: tuple[DType | None, ...] = (None, _F16, _BF16, _F32)
_PLAIN, _DELTA, _GRID, _WIDE_GRID = range(4)
_CONTIGUOUS = 1 << 4
_DELTA_MOST = 4096
_GRID_MOST = 4096


def encode_book(book: Bits, dtype: DType, *, plain: bool = False) -> bytes:
    """The smallest form that gives back ``book`` exactly.

    Args:
        book: distinct non-zero bit patterns in ascending order of value.
        dtype: their element type.
        plain: the patterns as they are, for the paper's own layout.
    """
    count = varint(len(book))
    forms = [bytes([_PLAIN << 2]) + count + book.tobytes()]
    if not plain and len(book):
        for element, narrow in enumerate(_ELEMENTS):
            kind = dtype if narrow is None else narrow
            bits = book if narrow is None else _narrowed(book, dtype, narrow)
            if bits is None:
                continue
            forms.append(bytes([element | _PLAIN << 2]) + count + bits.tobytes())
            if len(book) <= _DELTA_MOST:
                forms.append(bytes([element | _DELTA << 2]) + count + _deltas(bits, kind))
        grid = _grid(book, dtype) if len(book) <= _GRID_MOST else None
        if grid is not None:
            forms.append(grid)
    return min(forms, key=len)


def decode_book(reader: Reader, dtype: DType, most: int = MAX_DISTINCT) -> Bits:
    """The patterns, distinct, non-zero and ascending; FormatError otherwise.

    ``most``: elements of the tensor, which cannot hold more values than that. A grid names many
    in a few bytes.
    """
    form = reader.u8("code book form")
    element, coding = _ELEMENTS[form & 3], form >> 2 & 3
    flags = form >> 4
    if flags > (1 if coding >= _GRID else 0) or (
        element and (coding >= _GRID or not _narrows(dtype, element))
    ):
        raise reader.fail(f"code book form {form:#04x} does not fit {dtype.name}")
    count = reader.varint("code book size", min(most, MAX_DISTINCT, (1 << 8 * dtype.size) - 1))
    kind = element or dtype
    if coding >= _GRID:
        book = _decode_grid(reader, dtype, count, coding, bool(flags))
    else:
        if coding == _PLAIN:
            raw = reader.take(count * kind.size, "code book")
            book = np.frombuffer(raw, kind.bits)
        else:
            book = _decode_deltas(reader, kind, count)
        if element is not None:
            book = _widened(book, element, dtype)
    keys = dtype.keys(book)
    if np.any(keys[1:] <= keys[:-1]) or np.any(book == 0):
        raise reader.fail("code book is not ascending, or holds zero")
    return book


# Narrower floats ----------------------------------------------------------------------------


def _narrows(dtype: DType, to: DType) -> bool:
    return (dtype is _F32 and to in (_F16, _BF16)) or (dtype is _F64 and to is _F32)


def _narrowed(bits: Bits, dtype: DType, to: DType) -> Bits | None:
    if not _narrows(dtype, to):
        return None
    if to is _BF16:
        narrow = (bits >> np.uint32(16)).astype("<u2")
    else:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            value = bits.view(f"<f{dtype.size}").astype(f"<f{to.size}")
        narrow = value.view(to.bits)
    return narrow if np.array_equal(_widened(narrow, to, dtype), bits) else None


def _widened(bits: Bits, narrow: DType, dtype: DType) -> Bits:
    if narrow is _BF16:
        return bits.astype("<u4") << np.uint32(16)
    with np.errstate(invalid="ignore"):
        return bits.view(f"<f{narrow.size}").astype(f"<f{dtype.size}").view(dtype.bits)


# Deltas of magnitudes, Rice coded ------------------------------------------------------------


def _split(bits: Bits, kind: DType) -> tuple[list[int], list[int]]:
    """Magnitudes of the negative and of the non-negative entries, each ascending."""
    n = kind.negatives(bits)
    below, above = bits[:n][::-1], bits[n:]
    # Integers: -1, -2, ... as 0, 1, ...
    below = below & below.dtype.type(kind.sign - 1) if kind.kind == "float" else ~below
    return [int(v) for v in below], [int(v) for v in above]


def _deltas(bits: Bits, kind: DType) -> bytes:
    below, above = _split(bits, kind)
    head = varint(len(below))
    deltas: list[int] = []
    for part in (below, above):
        if part:
            head += part[0].to_bytes(kind.size, "little")
            deltas += [b - a - 1 for a, b in itertools.pairwise(part)]
    if not deltas:
        return head
    shifts = range(8 * kind.size)
    lengths = [sum((d >> s) + 1 + s for d in deltas) for s in shifts]
    shift = int(np.argmin(lengths))
    out: list[str] = []
    for d in deltas:
        out.append(
            "1" * (d >> shift) + "0" + (f"{d & (1 << shift) - 1:0{shift}b}" if shift else "")
        )
    text = "".join(out)
    text += "0" * (-len(text) % 8)
    return head + bytes([shift]) + int(text, 2).to_bytes(len(text) // 8, "big")


def _decode_deltas(reader: Reader, kind: DType, count: int) -> Bits:
    n = reader.varint("negative code book entries", count)
    if n and kind.kind == "unsigned":
        raise reader.fail(f"code book has {n} negative entries of an unsigned type")
    firsts = [
        int.from_bytes(reader.take(kind.size, "code book"), "little") if part else 0
        for part in (n, count - n)
    ]
    rest = max(0, n - 1) + max(0, count - n - 1)
    deltas = iter(_decode_rice(reader, kind, rest) if rest else [])
    top = (1 << 8 * kind.size - (kind.kind != "unsigned")) - 1
    parts: list[list[int]] = []
    for first, length in zip(firsts, (n, count - n), strict=True):
        part = [first] if length else []
        for _ in range(length - 1):
            part.append(part[-1] + next(deltas) + 1)
        if part and part[-1] > top:
            raise reader.fail("code book entry is out of range")
        parts.append(part)
    below = np.array(parts[0][::-1], np.uint64).astype(kind.bits)
    above = np.array(parts[1], np.uint64).astype(kind.bits)
    below = below | below.dtype.type(kind.sign) if kind.kind == "float" else ~below
    return np.concatenate([below, above])


def _decode_rice(reader: Reader, kind: DType, count: int) -> list[int]:
    """Read ``count`` Rice numbers, then skip to the next whole byte."""
    shift = reader.u8("code book shift")
    if shift >= 8 * kind.size:
        raise reader.fail(f"code book shift {shift} exceeds {8 * kind.size - 1}")
    data, read, text = reader.data[reader.at :], 0, ""
    at, out = 0, list[int]()
    for _ in range(count):
        while (end := text.find("0", at)) < 0 or end + shift >= len(text):
            # As much again: a file of ones is looked at once, not over and over.
            bite = bytes(data[read : read + max(64, read)])
            if not bite:
                reader.take(len(data) + 1, "code book")
            text += f"{int.from_bytes(bite, 'big'):0{8 * len(bite)}b}"
            read += len(bite)
        low = text[end + 1 : end + 1 + shift]
        out.append(end - at << shift | int(low or "0", 2))
        at = end + 1 + shift
    reader.take((at + 7) // 8, "code book")
    return out


# Uniform grids: k * step ----------------------------------------------------------------------


def grid_values(k: NDArray[np.generic], step: float | NDArray[np.float64], dtype: DType) -> Bits:
    """``k * step`` in double precision, rounded once to the dtype (bfloat16: through float32)."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        product = k.astype(np.float64) * step
        if dtype is _BF16:
            single = product.astype("<f4").view("<u4")
            odd = single >> np.uint32(16) & np.uint32(1)
            return (single + np.uint32(0x7FFF) + odd >> np.uint32(16)).astype("<u2")
        return product.astype(f"<f{dtype.size}").view(dtype.bits)


def _as_float(bits: Bits, dtype: DType) -> NDArray[np.float64]:
    if dtype is _BF16:
        bits = bits.astype("<u4") << np.uint32(16)
    return bits.view(f"<f{bits.dtype.itemsize}").astype(np.float64)


def find_grid(book: Bits, dtype: DType) -> tuple[NDArray[np.int64], float] | None:
    """Integers and the step whose multiples the distinct non-zero floats are, bit for bit."""
    if dtype.kind != "float" or dtype.size == 1:
        return None
    with np.errstate(all="ignore"):  # signalling NaN; the guesses of huge and of tiny values
        values = _as_float(book, dtype)
        if not np.isfinite(values).all() or not values.all():
            return None
        return _find_step(values, book, dtype)


def read_step(reader: Reader, wide: bool) -> float:
    """A grid's step: float32, or float64 when ``wide``; positive and finite."""
    kind = "<f8" if wide else "<f4"
    step = float(np.frombuffer(reader.take(int(kind[2]), "grid step"), kind)[0])
    if not math.isfinite(step) or step <= 0:
        raise reader.fail(f"grid step is {step}, it must be positive")
    return step


def _grid(book: Bits, dtype: DType) -> bytes | None:
    if dtype.kind != "float":
        return _integer_grid(book, dtype)
    found = find_grid(book, dtype)
    if found is None:
        return None
    k, step = found
    with np.errstate(over="ignore"):
        coding = _GRID if float(np.float32(step)) == step else _WIDE_GRID
    packed = np.array([step], "<f4" if coding == _GRID else "<f8").tobytes()
    return _grid_bytes(k, coding, packed)


def _find_step(
    values: NDArray[np.float64], book: Bits, dtype: DType
) -> tuple[NDArray[np.int64], float] | None:
    """Integers ``k`` and a step with ``k * step`` equal to every value, bit for bit."""
    magnitudes = np.unique(np.abs(values))
    ulp = {4: 2.0**-24, 2: 2.0**-11 if dtype is _F16 else 2.0**-8, 8: 2.0**-53}[dtype.size]
    gaps = np.diff(np.concatenate([[0.0], magnitudes]))
    # Differences of neighbours that are mere rounding noise are no grid.
    smallest = float(gaps.min())
    if smallest < 1e-6 * magnitudes[-1]:
        return None
    for parts in (1, 2, 3, 4, 5, 6):
        low, high = smallest / parts * 0.75, smallest / parts * 1.25
        for m in magnitudes:  # each value narrows the interval the step must lie in
            k = round(m / ((low + high) / 2))
            if k == 0:
                break
            low, high = max(low, m * (1 - ulp) / k), min(high, m * (1 + ulp) / k)
            if low > high:
                break
        else:
            middle = (low + high) / 2
            single = np.float32(middle)
            near = [
                float(single),
                float(np.nextafter(single, np.float32(0))),
                float(np.nextafter(single, np.float32(math.inf))),
            ]
            for step in (*near, middle):
                ks = np.rint(values / step).astype(np.int64) if step else np.zeros(1, np.int64)
                if np.array_equal(grid_values(ks, step, dtype), book):
                    return ks, step
    return None


def _integer_grid(book: Bits, dtype: DType) -> bytes | None:
    values = [int(v) for v in book.view(f"<{'i' if dtype.kind == 'signed' else 'u'}{dtype.size}")]
    step = math.gcd(*values)
    if max(abs(v) for v in values) // step >= 1 << 40:
        return None
    k = np.array([v // step for v in values], np.int64)
    return _grid_bytes(k, _GRID, varint(step))


def _grid_bytes(k: NDArray[np.int64], coding: int, step: bytes) -> bytes | None:
    """Form, count, step, lowest k, then which k of the span are present unless all are."""
    low, high = int(k[0]), int(k[-1])
    if high - low > 64 * len(k) + 64:
        return None
    head = varint(len(k)) + step + varint(zigzag(low))
    present = np.zeros(high - low + 1, bool)
    present[k - low] = True
    if low <= 0 <= high:
        present[-low] = True
    if present.all():
        return bytes([coding << 2 | _CONTIGUOUS]) + head
    present[k - low] = True
    if low <= 0 <= high:
        present[-low] = False
    packed = np.packbits(present, bitorder="little").tobytes()
    return bytes([coding << 2]) + head + varint(high - low) + packed


def _decode_grid(reader: Reader, dtype: DType, count: int, coding: int, contiguous: bool) -> Bits:
    if dtype.kind != "float":
        if coding == _WIDE_GRID:
            raise reader.fail(f"a grid of double steps does not fit {dtype.name}")
        step: float = reader.varint("grid step")
        if step == 0:
            raise reader.fail("grid step is 0")
    elif dtype.size == 1:
        raise reader.fail(f"a grid does not fit {dtype.name}")
    else:
        step = read_step(reader, coding == _WIDE_GRID)
    low = unzigzag(reader.varint("lowest grid point", 1 << 42))
    if contiguous:
        high = low + count - 1
        k = np.arange(low, high + 1 + (low <= 0 <= high), dtype=np.int64)
        k = k[k != 0]
    else:
        span = reader.varint("grid span", 64 * MAX_DISTINCT + 64) + 1
        packed = np.frombuffer(reader.take((span + 7) // 8, "grid points"), np.uint8)
        k = np.flatnonzero(np.unpackbits(packed, count=span, bitorder="little")) + low
    if len(k) != count:
        raise reader.fail(f"grid has {len(k)} points, {count} are declared")
    if dtype.kind == "float":
        return grid_values(k, step, dtype)
    signed = dtype.kind == "signed"
    bottom = -dtype.sign if signed else 0
    top = dtype.sign - 1 if signed else (1 << 8 * dtype.size) - 1
    # The ends say it of all: k ascends and the step is positive.
    if len(k) and (int(k[0]) * int(step) < bottom or int(k[-1]) * int(step) > top):
        raise reader.fail(f"grid leaves the range of {dtype.name}")
    return (k.astype(np.int64).view(np.uint64) * np.uint64(step)).astype(dtype.bits)
