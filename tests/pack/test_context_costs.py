"""The context coder takes time for every entry, whatever its bits: what is decoded unasked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gossamer.core.errors import FormatError
from gossamer.core.kernels import kernel
from gossamer.pack import Archive, pack_bytes, unpack
from gossamer.pack.coders import context
from gossamer.pack.coders.limits import varint
from gossamer.pack.format.container import OWN, Entry, Header, file_chunks
from gossamer.pack.format.section import CONTEXT
from gossamer.pack.format.values import BY_TORCH, analyse
from gossamer.pack.read.decode import decode_section
from gossamer.pack.write.layouts import context_section
from memory import peak_of

F32, U8 = BY_TORCH[torch.float32], BY_TORCH[torch.uint8]


def file_of(entries: list[Entry], payloads: list[bytes]) -> bytes:
    """A file with right checksums, whatever is in it."""
    return b"".join(file_chunks(Header(entries, [], False, version=2), payloads))


def context_part(payload: int, *, kept: int = 1, largest: int = 1) -> bytes:
    """A section of one value that ends in so many bytes of the context coder."""
    book = b"\0\1" + np.array([1], "<f4").tobytes()
    return bytes([CONTEXT]) + varint(kept) + book + varint(largest) + b"\1" + b"\xff" * payload


def context_file(rows: int, cols: int, payload: int, **given: int) -> bytes:
    """One float32 tensor that the context coder coded."""
    return file_of([Entry("w", F32, (rows, cols), OWN)], [context_part(payload, **given)])


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Entries of every tensor that the context coder is asked to decode, and does not."""
    asked: list[int] = []

    def decode(data: bytes, rows: int, cols: int) -> Any:
        asked.append(rows * cols)
        ranks = np.zeros((rows, cols), np.int8)
        ranks[0, 0] = 1
        return ranks

    monkeypatch.setattr(context, "decode", decode)
    return asked


FREE = 1 << 22
NONZERO = 5  # what an entry of rank 1 or -1 costs beyond a zero


def test_the_context_coder_is_not_begun_for_more_entries_than_bytes_allow(begun: list[int]) -> None:
    size = 1 + 1 + 2 + 4 + 2 + 30  # layout, kept, form and count, value, two numbers, the rest
    cols = (FREE + 1024 * size - NONZERO) // 64
    unpack(context_file(64, cols, 30))
    message = f"'w': {64 * cols + 64} entries by the context coder in {size} bytes are too many"
    with pytest.raises(FormatError, match=message):
        unpack(context_file(64, cols + 1, 30))
    # 12.4 million entries in a file of 71 bytes
    with pytest.raises(FormatError, match="by the context coder in 40 bytes"):
        unpack(context_file(4096, 3017, 30))
    assert begun == [64 * cols]
    unpack(context_file(4096, 3017, 30), max_bytes=1 << 30)
    assert begun == [64 * cols, 4096 * 3017]


def test_many_small_sections_share_what_is_free(begun: list[int]) -> None:
    # 2000 sections of 65,536 entries in 50 kB: each alone is soon decoded.
    entries = [Entry(f"{i:x}", F32, (256, 256), OWN) for i in range(2000)]
    data = file_of(entries, [context_part(1)] * 2000)
    each = 65536 + NONZERO - 1024 * len(context_part(1))
    with Archive(data) as opened:
        for name in opened.names[: FREE // each]:
            opened.tensor(name)
            opened.tensor(name)  # takes nothing again
        with pytest.raises(FormatError, match="65536 entries by the context coder in 11 bytes"):
            opened.tensor(opened.names[FREE // each])
        opened.tensor("0")
    with pytest.raises(FormatError, match="pass max_bytes="):
        unpack(data)
    assert len(begun) < 5 * FREE // each
    assert len(unpack(data, max_bytes=1 << 30)) == 2000


@pytest.mark.parametrize(("largest", "cost"), [(1, 5), (2, 7), (255, 19), (1 << 20, 45)])
def test_nonzero_entries_cost_more(largest: int, cost: int) -> None:
    assert context.work((30, 20), 100, largest, 4) == 600 + 100 * cost
    # A tensor without a zero, in so few bytes that all of them were foretold.
    data = context_file(1024, 1024, 2, kept=1 << 20, largest=1)
    with pytest.raises(FormatError, match="1048576 entries by the context coder"):
        unpack(data)


def test_a_wide_tensor_of_few_rows_is_not_begun(begun: list[int]) -> None:
    # The models hold 64 bytes for each of its columns, of one or two bytes.
    for dtype, cols in ((torch.uint8, (1 << 20) + 1), (torch.float16, 3 << 19)):
        book = b"\0\1" + bytes(BY_TORCH[dtype].size - 1) + b"\1"
        part = bytes([CONTEXT]) + b"\1" + book + b"\1\1" + b"\xff" * 4000
        data = file_of([Entry("w", BY_TORCH[dtype], (1, cols), OWN)], [part])
        with pytest.raises(FormatError, match="by the context coder in 40"):
            unpack(data)
    assert begun == []
    assert context.work((1, 1 << 20), 0, 1, 1) == 1 << 20
    assert context.work((32, 1 << 21), 0, 1, 1) == 1 << 26


def test_the_largest_rank_lies_in_the_code_book() -> None:
    for largest in (2, context.LARGEST):
        with pytest.raises(FormatError, match="largest rank lies outside the code book of 1 val"):
            unpack(context_file(4, 4, 3, largest=largest))


@pytest.mark.skipif(kernel("context") is None, reason="no compiled context coder")
@pytest.mark.parametrize(("largest", "itemsize"), [(1, 1), (127, 1), (128, 2), (255, 2)])
def test_the_context_coder_holds_no_more_than_three_times_its_tensor(
    largest: int, itemsize: int
) -> None:
    rng = np.random.default_rng(largest)
    cells = rng.random((1024, 1024)) < 0.01
    ranks = np.where(cells, rng.integers(1, largest + 1, cells.shape), 0).astype(np.int32)
    ranks[0, :largest] = np.arange(1, largest + 1)  # so that the book has every value
    found = context.decode(context.encode(ranks), 1024, 1024)
    assert found.dtype.itemsize == itemsize
    np.testing.assert_array_equal(found, ranks)
    bits = ranks.astype(np.uint8).reshape(-1)
    data = context_section(analyse(bits, U8, ranks.shape))
    made, peak = peak_of(lambda: decode_section(data, U8, ranks.shape, bits.size, "x"))
    np.testing.assert_array_equal(made, bits)
    assert peak < 2 * bits.size + (1 << 20)  # beside the ranks, which the compiled coder holds


@pytest.mark.parametrize("nonzeros", [0, 1, 3, 40, 2000])
def test_nearly_empty_tensors_are_packed_and_read(nonzeros: int) -> None:
    rng = np.random.default_rng(nonzeros)
    weight = np.zeros(600 * 800, np.float32)
    weight[rng.choice(len(weight), nonzeros, replace=False)] = 0.25
    data = pack_bytes({"w": torch.from_numpy(weight).reshape(600, 800)})
    with Archive(data) as opened:
        np.testing.assert_array_equal(opened.tensor("w").numpy().reshape(-1), weight)
        length = opened.header.lengths[0]
        coded = opened.info("w")["codec"] == "context"
    assert not coded or weight.size + NONZERO * nonzeros <= 1024 * length
