"""One archive read by threads and forks, and the memory that a decoding holds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.pack import Archive, pack_bytes
from gossamer.pack.coders.bits import BitWriter
from gossamer.pack.coders.limits import varint
from gossamer.pack.coders.table import NUMBERED, RANS
from gossamer.pack.format.lzma_bytes import encode_lzma
from gossamer.pack.format.raw import compress
from gossamer.pack.format.section import (
    BITMAP,
    CLASSES,
    DENSE,
    GAPS,
    PAPER,
    RAW,
    SEEDED,
    TRANSPOSED,
    ZERO,
)
from gossamer.pack.format.values import BY_TORCH, DType, analyse
from gossamer.pack.read.decode import decode_section
from gossamer.pack.write.layouts import (
    Settings,
    bitmap_section,
    dense_section,
    gaps_section,
    row_scan,
    transposed,
)
from memory import peak_of

F32 = BY_TORCH[torch.float32]


# One archive, several readers ---------------------------------------------------------------------


def many(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file of tensors with sections of their own, and some that are grouped."""
    rng = np.random.default_rng(1)
    tensors = {
        f"{i}": torch.from_numpy(rng.normal(size=(30, 20) if i % 4 else (3,)).astype(np.float32))
        for i in range(24)
    }
    path = folder / "many.gsm"
    path.write_bytes(pack_bytes(tensors, metadata={"a": 1}))
    return path, tensors


def same(opened: Archive, tensors: dict[str, torch.Tensor]) -> bool:
    return opened.metadata == {"a": 1} and all(
        torch.equal(opened.tensor(name), tensor) for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("placed", [True, False], ids=["pread", "locked"])
def test_threads_read_one_archive(
    placed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not placed:
        monkeypatch.delattr(os, "pread", raising=False)
    path, tensors = many(tmp_path)
    begin = threading.Barrier(4)

    def read(_: int) -> bool:
        begin.wait(600)
        return all(same(opened, tensors) for _ in range(5))

    with Archive(path) as opened, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_a_read_moves_no_position_that_others_share(tmp_path: Path) -> None:
    path, tensors = many(tmp_path)
    with Archive(path) as opened:
        file = opened._file._file
        assert file is not None
        for at in (0, 7, opened.file_bytes):
            file.seek(at)
            assert same(opened, tensors)
            assert file.tell() == at


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_processes_read_an_archive_opened_before(tmp_path: Path) -> None:
    path, _ = many(tmp_path)
    program = f"""
import os, torch
from gossamer.pack import Archive
torch.set_num_threads(1)
opened = Archive({str(path)!r})
here, there = os.pipe(), os.pipe()
# The child moves the position that the two share between each of the parent's reads.
child = os.fork()
if child == 0:
    try:
        for name in opened.names:
            os.read(here[0], 1)
            opened.tensor(name)
            os.lseek(opened._file._file.fileno(), 0, os.SEEK_SET)
            os.write(there[1], b"+")
        os._exit(0)
    except BaseException:
        os.write(there[1], b"-")
        os._exit(1)
for name in reversed(opened.names):
    opened.tensor(name)
    os.write(here[1], b".")
    assert os.read(there[0], 1) == b"+"
assert os.waitpid(child, 0)[1] == 0
print("read by both")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.stdout == "read by both\n", done.stderr


def test_a_closed_archive_says_so(tmp_path: Path) -> None:
    path, _ = many(tmp_path)
    for source in (path, path.read_bytes()):
        opened = Archive(source)
        opened.close()
        with pytest.raises(ValueError, match="the file was closed; open it again"):
            opened.tensor("1")


# Memory: what a decoding holds at its peak --------------------------------------------------------

CLAIM = 1 << 23
U8, F16 = BY_TORCH[torch.uint8], BY_TORCH[torch.float16]
CONSTANT = b"\x01"  # rANS of one distinct symbol, which follows


def one_symbol(symbol: int) -> bytes:
    """A stream of one symbol over and over."""
    writer = BitWriter()
    writer.golomb(np.array([symbol]), 4)
    data = CONSTANT + writer.bytes()
    return varint(4 * len(data) + NUMBERED.index(RANS)) + data


def tiny(kind: str) -> tuple[DType, tuple[int, ...], bytes, int]:
    """A section of a few bytes that claims 8 MiB: dtype, shape, bytes, what all elements are."""
    n, book, wide = CLAIM, b"\0\1\1", (4, CLAIM // 4)
    match kind:
        case "dense":
            return U8, (n,), bytes([DENSE]) + varint(n) + book, 1
        case "dense coded":
            return U8, (n,), bytes([DENSE | ZERO]) + b"\0" + book + one_symbol(0), 0
        case "dense transposed":
            return U8, wide, bytes([DENSE | ZERO | TRANSPOSED]) + b"\0" + book + one_symbol(0), 0
        case "gaps":
            return U8, (n,), bytes([GAPS]) + varint(n) + book + b"\0" + one_symbol(0), 1
        case "gaps transposed":
            head = bytes([GAPS | TRANSPOSED]) + varint(n)
            return U8, wide, head + book + b"\0" + one_symbol(0), 1
        case "bitmap":
            return U8, (n,), bytes([BITMAP]) + varint(n) + book + one_symbol(255), 1
        case "fixed gaps":
            head = bytes([PAPER]) + varint(n) + book + b"\4\0"
            return U8, (n,), head + one_symbol(0) + one_symbol(1), 1
        case "classes":
            head = bytes([DENSE | ZERO | CLASSES]) + b"\0" + book + b"\x08"
            return U8, (1, n), head + one_symbol(0) * 2, 0
        case "raw":
            return F32, (n // 4,), bytes([RAW, 1]) + compress(bytes(n), 3), 0
        case "planes":
            plane = compress(bytes(n // 4), 3)
            return F32, (n // 4,), bytes([RAW, 6]) + (b"\1" + varint(len(plane)) + plane) * 4, 0
        case "lzma":
            return F32, (n // 4,), b"\x07\0" + encode_lzma(bytes(n), 4), 0
        case "grid":
            step = np.array([1], "<f4").tobytes()
            return F16, (n // 2,), bytes([RAW, 3]) + step + b"\0\0", 0
        case "scaled":
            scales = np.full(4, 0.5, "<f4").tobytes()
            head = b"\x07\1\4\0" + varint(n // 16) + varint(len(scales) + 1) + b"\0" + scales
            codes = bytes([DENSE | ZERO]) + b"\0" + book + one_symbol(0)
            return F32, (4, n // 16), head + codes, 0
        case _:
            head = bytes([SEEDED, 2]) + bytes(9) + np.array([1], "<f4").tobytes()
            mask = bytes([DENSE | ZERO]) + b"\0" + book + one_symbol(0)
            return F32, (n // 4,), head + mask, 0


@pytest.mark.parametrize(
    "kind",
    [
        "dense",
        "dense coded",
        "dense transposed",
        "gaps",
        "gaps transposed",
        "bitmap",
        "fixed gaps",
        "classes",
        "raw",
        "planes",
        "lzma",
        "grid",
        "scaled",
        "seeded",
    ],
)
def test_a_decoding_holds_no_more_than_three_times_its_tensor(kind: str) -> None:
    dtype, shape, payload, value = tiny(kind)
    numel = CLAIM // dtype.size
    bits, peak = peak_of(lambda: decode_section(payload, dtype, shape, numel, "x"))
    assert bits.shape == (numel,)
    assert (bits == value).all()
    assert peak < 3 * CLAIM + (6 << 20)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("section", [dense_section, gaps_section, bitmap_section])
def test_columns_of_several_classes_are_put_in_place(section: Any, turned: bool) -> None:
    # More columns than are moved at once, and classes of no regular order.
    rng = np.random.default_rng(4)
    rows, cols = (70_003, 5) if turned else (5, 70_003)
    bits = (rng.integers(1, 6, rows * cols) * (rng.random(rows * cols) < 0.5)).astype(np.uint8)
    values = analyse(bits, U8, (rows, cols))
    scan = row_scan(values)
    classes = rng.choice(np.array([0, 1, 2], np.uint8), 70_003)
    data = bytes(section(values, Settings(), transposed(scan) if turned else scan, classes))
    made, peak = peak_of(lambda: decode_section(data, U8, (rows, cols), bits.size, "x"))
    np.testing.assert_array_equal(made, bits)
    assert peak < 4 * bits.size + (6 << 20)
