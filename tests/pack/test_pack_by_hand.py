"""A file put together by hand from docs/format.md, byte by byte."""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
import pytest
import torch

from gossamer.core.errors import FormatError
from gossamer.pack import Archive
from gossamer.pack.format.section import matrix
from gossamer.pack.format.values import BY_TORCH
from gossamer.pack.read.decode import decode_section

NAMES = ["w", "b", "t"]


def by_hand() -> bytes:
    header = b"\x03" + b"1.0"  # writer
    header += b"\x01"  # flags: there is metadata
    header += b"\x03"  # tensors
    header += b"\x01w" + b"\x01b" + b"\x01t"
    header += bytes([0 | 0 << 5, 1 | 1 << 5, 0 | 2 << 5])  # float32 own, float16 grouped, tied
    header += b"\x02\x02\x04"  # w: 2 dimensions, 2 x 4
    header += b"\x01\x03"  # b: 3
    header += b"\x00"  # t is tensor 0

    metadata = b"\x00" + b'{"a":1}'  # not compressed
    group = b"\x00" + np.array([1, 2, 3], "<f2").tobytes()

    # w = [[0, -2, 0, 0], [0, 0, 3, -2]]: gaps 1, 4, 0; codes 0, 1, 0.
    section = b"\x02"  # gaps
    section += b"\x03"  # non-zeros
    section += b"\x00\x02" + struct.pack("<2f", -2, 3)  # plain code book of two
    section += b"\x00"  # escapes
    section += bytes([3 << 2 | 0]) + bytes([1, 4, 0])  # fixed width, 8 bits each
    section += bytes([1 << 2 | 0]) + bytes([0b010])  # fixed width, 1 bit each, low bits first

    payloads = [metadata, group, section]
    header += bytes(len(p) for p in payloads)
    data = b"\x89GSM\x01" + bytes([2 * len(header)]) + header
    crc = zlib.crc32(data)
    prefix = data
    data += struct.pack("<I", crc)
    for number, payload in enumerate(payloads):
        data += payload + struct.pack("<I", zlib.crc32(prefix + bytes([number]) + payload))
    return data


def test_the_hand_made_file_reads() -> None:
    data = by_hand()
    with Archive(data) as archive:
        archive.verify()
        assert archive.names == NAMES
        assert archive.metadata == {"a": 1}
        assert archive.aliases == {"t": "w"}
        assert archive.tensor("w").tolist() == [[0, -2, 0, 0], [0, 0, 3, -2]]
        assert archive.tensor("t").tolist() == archive.tensor("w").tolist()
        assert archive.tensor("b").tolist() == [1, 2, 3]
        row = archive.info("w")
        assert row["codec"] == "gaps(fixed) codes(fixed)"
        # Lengths and escapes belong to the streams, the checksum to the framing.
        assert row["parts"] == {"codebook": 10, "positions": 5, "codes": 2, "framing": 6}
        assert archive.parts() == {
            "header": data.index(b'\x00{"a"'),
            "metadata": 12,
            "raw": 11,
            "codebook": 10,
            "positions": 5,
            "codes": 2,
            "framing": 6,
        }


def test_as_many_escapes_as_the_zeros_allow() -> None:
    # 255 zeros, then a 1: an escape, and no further zero.
    section = b"\x02\x01\x00\x01" + struct.pack("<f", 1) + b"\x01" + bytes([2 << 2, 255, 0])
    f32 = BY_TORCH[torch.float32]
    values = decode_section(section, f32, (256,), 256, "w").view(np.float32)
    assert values.tolist() == [*[0.0] * 255, 1.0]
    with pytest.raises(FormatError, match="escapes is 1, at most 0"):
        decode_section(section, f32, (255,), 255, "w")


def test_rows_and_columns_of_a_tensor() -> None:
    for shape, expected in (
        ((), (1, 1)),
        ((6,), (1, 6)),
        ((4, 3), (4, 3)),
        ((4, 3, 2, 2), (4, 12)),
        ((0, 3), (0, 0)),
    ):
        assert matrix(shape, math.prod(shape)) == expected
