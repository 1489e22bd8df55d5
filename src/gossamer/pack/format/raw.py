"""Bytes with no code book: stored, compressed whole, or as byte planes coded one by one.

Trained weights have a skewed sign-and-exponent byte and noise below it. Turning a float's bits
left by one puts the whole exponent into one byte and the sign with the noise.
"""

from __future__ import annotations

import numpy as np
import zstandard
from numpy.typing import NDArray

from gossamer.core.errors import FormatError
from gossamer.pack.coders.bits import histogram, pack_bits, pieces, unpack_bits
from gossamer.pack.coders.limits import Reader, unzigzag, varint, zigzag
from gossamer.pack.coders.table import CODERS, RANS, entropy_bytes
from gossamer.pack.format.book import find_grid, grid_values, read_step
from gossamer.pack.format.values import Bits, DType

__all__ = ["compress", "decode_raw", "decompress", "encode_raw"]

_PLAIN, _WHOLE, _PLANES, _GRID = range(4)
_TURNED = 1 << 2  # of planes
_WIDE = 1 << 2  # of grids
_GRID_TRIED = 4096  # elements of a tensor (a bias, a scale) that is tried as a grid
_WIDEST = 24  # bits of a grid point
_STORED, _ZSTD, _CODED = range(3)
_WORTH = 0.98  # a plane is compressed when that leaves at most this fraction of it
_PROBE = 1 << 18
_GAIN = (1.25, 1.04)  # of a slow level of zstd over a fast one, at most: integers, floats


def compress(data: bytes | memoryview, level: int = 19) -> bytes:
    """One bare zstd frame: no content size, no checksum, no magic number."""
    return _compressor(level).compress(data)


def decompress(data: bytes | memoryview, size: int, where: Reader, what: str) -> bytes:
    """The ``size`` bytes of a bare zstd frame; FormatError if it holds more or fewer."""
    out = np.empty(size, np.uint8)
    _decompress_into(out, data, where, what)
    return out.tobytes()


def _decompress_into(
    out: NDArray[np.uint8], data: bytes | memoryview, where: Reader, what: str
) -> None:
    """:func:`decompress` into an array of the size that it should have."""
    size, done, view = len(out), 0, out.data
    engine = zstandard.ZstdDecompressor(
        format=zstandard.FORMAT_ZSTD1_MAGICLESS, max_window_size=1 << 27
    )
    try:
        # In bounded bites, so that a frame that expands without end is stopped at ``size``.
        with engine.stream_reader(data) as stream:
            while done < size and (bite := stream.readinto(view[done : done + (1 << 22)])):
                done += bite
            if done == size and stream.read(1):
                raise where.fail(f"{what} expands beyond the {size} bytes it should have")
    except zstandard.ZstdError as e:
        raise where.fail(f"{what} is no valid zstd frame ({e})") from None
    if done != size:
        raise where.fail(f"{what} has {done} bytes instead of {size}")


def encode_raw(bits: Bits, dtype: DType, *, level: int = 19) -> bytes:
    """Bit patterns to bytes, in whichever way is smallest.

    Args:
        bits: flat bit patterns.
        dtype: their element type.
        level: zstd's; low levels for speed.
    """
    plain = bits.tobytes()
    forms = [bytes([_PLAIN]) + plain]
    if len(bits) > 16 and dtype.size > 1:
        forms.append(_planes(bits, dtype, level))
    if len(plain) > 16 and _promising(
        plain, level, _GAIN[dtype.kind == "float"] * min(map(len, forms))
    ):
        forms.append(bytes([_WHOLE]) + compress(plain, level))
    if 1 < len(bits) <= _GRID_TRIED:
        grid = _grid(bits, dtype)
        if grid is not None:
            forms.append(grid)
    return min(forms, key=len)


def decode_raw(reader: Reader, dtype: DType, count: int) -> Bits:
    """``count`` bit patterns from all that is left in ``reader``."""
    form = reader.u8("raw form")
    method, turned = form & 3, bool(form & _TURNED)
    flagged = method in (_PLANES, _GRID) and dtype.kind == "float"
    if form > (_GRID | _TURNED) or (turned and not flagged) or (method == _GRID and not flagged):
        raise reader.fail(f"raw form {form:#04x} does not fit {dtype.name}")
    if method == _GRID:
        return _decode_grid(reader, dtype, count, turned)
    size = count * dtype.size
    if method == _PLAIN:
        return np.frombuffer(reader.take(size, "raw values"), dtype.bits).copy()
    if method == _WHOLE:
        out = np.empty(size, np.uint8)
        _decompress_into(out, reader.rest(), reader, "raw values")
        return out.view(dtype.bits)
    planes = np.empty((count, dtype.size), np.uint8)
    for i in range(dtype.size):
        planes[:, i] = _decode_plane(reader, f"byte plane {i}", count)
    bits = planes.reshape(-1).view(dtype.bits)
    if turned:
        one, top = bits.dtype.type(1), bits.dtype.type(8 * dtype.size - 1)
        for _, part in pieces(bits):
            part[:] = part >> one | part << top
    return bits


def _decode_plane(reader: Reader, what: str, count: int) -> NDArray[np.unsignedinteger]:
    how = reader.u8(what)
    if how == _STORED:
        return np.frombuffer(reader.take(count, what), np.uint8)
    if how == _ZSTD:
        out = np.empty(count, np.uint8)
        _decompress_into(out, reader.block(what), reader, what)
        return out
    if how != _CODED:
        raise reader.fail(f"{what} is stored in unknown way {how}")
    try:
        return CODERS[RANS].decode(reader.block(what), count, 256)
    except FormatError as e:
        raise FormatError(f"{reader.where}: {what}: {e}") from None


def _grid(bits: Bits, dtype: DType) -> bytes | None:
    """Multiples of one step, as integers of a fixed width."""
    distinct = np.unique(bits)
    book = distinct[distinct != 0]
    found = find_grid(book, dtype) if len(book) > 1 else None
    if found is None:
        return None
    # ascending patterns, not values; a zero (an all-zero pattern) is 0 steps
    k = np.zeros(len(distinct), np.int64)
    k[distinct != 0] = found[0]
    steps = k[np.searchsorted(distinct, bits)]
    low, high = int(steps.min()), int(steps.max())
    width = (high - low).bit_length()
    if width > _WIDEST:
        return None
    with np.errstate(over="ignore"):
        wide = float(np.float32(found[1])) != found[1]
    out = bytes([_GRID | (_WIDE if wide else 0)])
    out += np.array([found[1]], "<f8" if wide else "<f4").tobytes()
    return (
        out
        + varint(zigzag(low))
        + bytes([width])
        + pack_bits((steps - low).astype(np.uint32), width)
    )


def _decode_grid(reader: Reader, dtype: DType, count: int, wide: bool) -> Bits:
    if dtype.size == 1:
        raise reader.fail(f"a grid does not fit {dtype.name}")
    step = read_step(reader, wide)
    low = unzigzag(reader.varint("lowest grid point", 1 << 42))
    width = reader.u8("grid width")
    if width > _WIDEST:
        raise reader.fail(f"grid points of {width} bits, at most {_WIDEST} can be")
    data = reader.take((count * width + 7) // 8, "grid points")
    bits = np.empty(count, dtype.bits)
    for start, part in pieces(bits):  # a piece begins on a whole byte
        at = start * width // 8
        coded = data[at : at + (len(part) * width + 7) // 8]
        try:
            steps = unpack_bits(coded, len(part), width)
        except FormatError as e:
            raise FormatError(f"{reader.where}: {e}") from None
        part[:] = grid_values(steps.astype(np.int64) + low, step, dtype)
    return bits


def _compressor(level: int) -> zstandard.ZstdCompressor:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=0,
        write_checksum=0,
        window_log=min(zstandard.ZstdCompressionParameters.from_level(level).window_log, 27),
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


def _promising(plain: bytes | memoryview, level: int, most: float) -> bool:
    """Whether zstd is worth running over much data: a fast level looks at a part, then at all.

    ``most``: the bytes that the fast level may take for a slow one to be tried.
    """
    if len(plain) <= _PROBE:
        return True
    third = len(plain) // 3
    part = bytes(plain[third : third + _PROBE])
    if len(compress(part, min(level, 3))) >= _WORTH * len(part):
        return False
    return level <= 3 or len(compress(plain, 3)) < most


def _planes(bits: Bits, dtype: DType, level: int) -> bytes:
    form = _PLANES
    if dtype.kind == "float":
        one, top = bits.dtype.type(1), bits.dtype.type(8 * dtype.size - 1)
        bits = bits << one | bits >> top
        form |= _TURNED
    out = bytes([form])
    for i in range(dtype.size):
        plane = np.ascontiguousarray(bits.view(np.uint8)[i :: dtype.size])
        ways = [bytes([_STORED]) + plane.tobytes()]
        if entropy_bytes(histogram(plane, 256)) < _WORTH * len(plane):
            coded = CODERS[RANS].encode(plane, 256)
            ways.append(bytes([_CODED]) + varint(len(coded)) + coded)
        if _promising(plane.data, level, _GAIN[dtype.kind == "float"] * min(map(len, ways))):
            packed = compress(plane.data, level)
            ways.append(bytes([_ZSTD]) + varint(len(packed)) + packed)
        out += min(ways, key=len)
    return out
