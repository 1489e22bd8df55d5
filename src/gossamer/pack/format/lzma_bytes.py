"""A tensor's bytes through LZMA2, which finds the repeats across rows that no other layout sees.

The raw stream of liblzma (https://tukaani.org/xz/xz-file-format.txt, section 5.3.1), with a
dictionary whose size follows from the tensor's, so that a file cannot ask for more.
"""

from __future__ import annotations

import lzma
from typing import Any

import numpy as np

from gossamer.pack.coders.limits import Reader
from gossamer.pack.format.values import Bits, DType

__all__ = ["decode_lzma", "dictionary", "encode_lzma"]

_LEAST, _MOST = 1 << 12, 1 << 26
_WRITTEN = 1 << 23  # what a writer looks back, which takes it eleven times the memory
_BITE = 1 << 20


def dictionary(size: int) -> int:
    """Bytes of the dictionary for ``size`` bytes: the next power of two, 4 KiB to 64 MiB.

    >>> dictionary(5000), dictionary(1 << 40) == 1 << 26
    (8192, True)
    """
    return min(_MOST, max(_LEAST, 1 << (size - 1).bit_length()))


def encode_lzma(data: bytes | memoryview, size: int) -> bytes:
    """One raw LZMA2 stream of elements of ``size`` bytes."""
    aligned = size.bit_length() - 1
    return lzma.compress(
        data,
        lzma.FORMAT_RAW,
        filters=[
            {
                "id": lzma.FILTER_LZMA2,
                "preset": 9 | lzma.PRESET_EXTREME,
                "dict_size": min(dictionary(len(data)), _WRITTEN),
                "lp": aligned,
                "lc": min(3, 4 - aligned),
                "pb": aligned,
            }
        ],
    )


def decode_lzma(data: memoryview, dtype: DType, count: int, reader: Reader) -> Bits:
    """``count`` bit patterns; ``reader`` names the place in errors.

    Decoded in bites, straight to their place: a stream that expands without end is stopped where
    the tensor ends.
    """
    out = np.empty(count * dtype.size, np.uint8)
    filters: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA2, "dict_size": dictionary(len(out))}]
    engine = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
    done, given = 0, data
    try:
        while not engine.eof:
            part = engine.decompress(given, min(_BITE, len(out) - done + 1))
            given = data[:0]
            if not part and engine.needs_input:
                break
            if done + len(part) > len(out):
                raise reader.fail(f"LZMA data expands beyond the {len(out)} bytes of the tensor")
            out[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
    except lzma.LZMAError as e:
        raise reader.fail(f"LZMA data is damaged ({e})") from None
    if done != len(out) or not engine.eof or engine.unused_data:
        raise reader.fail(
            f"LZMA data of {len(data)} bytes is not the {len(out)} bytes of the tensor"
        )
    return out.view(dtype.bits)
