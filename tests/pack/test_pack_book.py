"""Code books and raw bytes: every form is exact, small, and safe against damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.errors import FormatError
from gossamer.pack.coders.limits import Reader, unzigzag, varint, zigzag
from gossamer.pack.format.book import decode_book, encode_book
from gossamer.pack.format.raw import compress, decode_raw, decompress, encode_raw
from gossamer.pack.format.values import BY_TORCH, analyse, distinct, to_bits
from gossamer.pack.write.classes import column_classes

F32 = BY_TORCH[torch.float32]
INTEGERS = [d for d in BY_TORCH.values() if d.kind != "float"]


def book_of(values: torch.Tensor):
    dtype, bits = to_bits("book", values)
    bits = np.unique(bits[bits != 0])
    return dtype, bits[np.argsort(dtype.keys(bits))]


def round_trip(values: torch.Tensor) -> bytes:
    dtype, book = book_of(values)
    for plain in (False, True):
        data = encode_book(book, dtype, plain=plain)
        reader = Reader(data, "book")
        np.testing.assert_array_equal(decode_book(reader, dtype), book)
        reader.done()
    return encode_book(book, dtype)


def test_a_uniform_grid_costs_only_its_step() -> None:
    k = torch.arange(-15, 16).float()
    for step in (0.013, 1 / 3, 1e-20, 2.0**-140, 123.456):
        # form, count, 4-byte step, lowest k
        assert len(round_trip(k * torch.tensor(step))) == 7
    assert len(round_trip(torch.tensor([-0.37, 0.37]))) == 7
    # Rounded once from double: no float32 step gives these, a double one does.
    exact = (k.double() * (0.1 / 127)).float()
    assert len(round_trip(exact)) <= 11
    assert len(round_trip(k.double() * 0.1)) == 11


def test_gaps_in_a_grid_are_a_bitmap() -> None:
    k = torch.tensor([-9.0, -4, -2, -1, 1, 3, 10])
    assert len(round_trip(k * 0.02)) == 7 + 1 + 3
    assert len(round_trip(torch.tensor([-90, -30, 60], dtype=torch.int8))) <= 6


def test_integers_are_a_grid_of_step_one() -> None:
    assert len(round_trip(torch.arange(-100, 100, dtype=torch.int8))) == 6
    assert len(round_trip(torch.arange(0, 256, dtype=torch.uint8))) == 5
    top = torch.tensor([2**63 - 1, -(2**63), 5])
    round_trip(top)


def test_narrower_floats_are_used_where_exact() -> None:
    values = torch.randn(31, generator=torch.Generator().manual_seed(0))
    plain, half = len(round_trip(values)), len(round_trip(values.half().float()))
    assert half < 31 * 2 + 4
    assert len(round_trip(values.bfloat16().float())) < 31 * 2 + 4
    assert len(round_trip(values.double() / 3)) > plain + 31 * 2
    assert plain < 31 * 4 + 2  # deltas
    assert len(round_trip(values.float().double())) <= plain + 1


@given(
    st.sampled_from(list(BY_TORCH.values())),
    st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=40),
)
def test_any_book_round_trips(dtype, patterns) -> None:
    bits = np.array(sorted({p % (1 << 8 * dtype.size) for p in patterns} - {0}), dtype.bits)
    bits = bits[np.argsort(dtype.keys(bits))]
    for plain in (False, True):
        reader = Reader(encode_book(bits, dtype, plain=plain), "book")
        np.testing.assert_array_equal(decode_book(reader, dtype), bits)


@given(st.binary(max_size=60), st.sampled_from(list(BY_TORCH.values())))
def test_any_bytes_give_a_book_or_an_error(data, dtype) -> None:
    try:
        book = decode_book(Reader(data, "book"), dtype)
    except FormatError:
        return
    keys = dtype.keys(book)
    assert (keys[1:] > keys[:-1]).all()
    assert (book != 0).all()


@given(st.binary(max_size=60), st.sampled_from(list(BY_TORCH.values())), st.integers(0, 50))
def test_any_bytes_give_raw_values_or_an_error(data, dtype, count) -> None:
    reader = Reader(data, "raw")
    try:
        bits = decode_raw(reader, dtype, count)
    except FormatError:
        return
    assert len(bits) == count


@given(st.sampled_from(list(BY_TORCH.values())), st.binary(max_size=400), st.integers(1, 40))
def test_raw_round_trips(dtype, data, repeat) -> None:
    data = (data * repeat)[: len(data * repeat) // dtype.size * dtype.size]
    bits = np.frombuffer(data, dtype.bits)
    packed = encode_raw(bits, dtype)
    assert len(packed) <= len(data) + 1
    reader = Reader(packed, "raw")
    np.testing.assert_array_equal(decode_raw(reader, dtype, len(bits)), bits)
    reader.done()


def test_a_frame_that_expands_too_far_is_stopped() -> None:
    bomb = compress(bytes(1 << 22))
    with pytest.raises(FormatError, match="expands beyond the 1000 bytes"):
        decompress(bomb, 1000, Reader(b"", "file"), "values")
    with pytest.raises(FormatError, match="instead of"):
        decompress(bomb, (1 << 22) + 1, Reader(b"", "file"), "values")
    with pytest.raises(FormatError, match="no valid zstd frame"):
        decompress(b"\xff" * 40, 10, Reader(b"", "file"), "values")


def test_varints() -> None:
    for value in (0, 1, 127, 128, 300, 2**63 - 1):
        reader = Reader(varint(value), "v")
        assert reader.varint("v") == value
        assert not reader.left
        for signed in (value, -value):
            assert unzigzag(zigzag(signed)) == signed
    for data, message in (
        (b"\x80\x00", "shortest"),
        (b"\xff" * 9 + b"\x01", "63 bits"),
        (b"\x80", "needs 1 bytes, 0 are left"),
        (b"\x05", "is 5, at most 4"),
    ):
        with pytest.raises(FormatError, match=message):
            Reader(data, "v").varint("v", limit=4 if data == b"\x05" else 1 << 63)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=300), st.integers(1, 400))
def test_distinct_matches_numpy(values, repeat) -> None:
    bits = np.tile(np.array(values, np.uint32), repeat)
    np.random.default_rng(0).shuffle(bits)
    found = distinct(bits, BY_TORCH[torch.uint32], 1 << 16)
    assert found is not None
    book, codes = found
    np.testing.assert_array_equal(book, np.unique(bits))
    np.testing.assert_array_equal(book[codes], bits)


def test_rare_values_are_found_past_the_sample() -> None:
    bits = np.full(1 << 19, 7, np.uint32)
    bits[[3, 400_001, 500_003]] = [1, 2**31, 9]
    book, codes = distinct(bits, F32, 16)
    assert book.tolist() == [2**31, 1, 7, 9]  # by float value: -0, then the subnormals
    np.testing.assert_array_equal(book[codes], bits)
    assert distinct(bits, F32, 3) is None
    assert distinct(np.arange(1 << 17, dtype=np.uint32), F32, 1 << 16) is None


def test_analysis_of_signed_zero_and_order() -> None:
    dtype, bits = to_bits("t", torch.tensor([0.0, -0.0, 2.0, -3.0, 2.0]))
    v = analyse(bits, dtype, (5,))
    assert v.positions.tolist() == [1, 2, 3, 4]
    assert v.book.view(np.float32).tolist() == [-3.0, -0.0, 2.0]
    assert v.codes.tolist() == [1, 2, 0, 2]
    assert v.counts.tolist() == [1, 1, 2]
    assert v.negatives == 2


def test_column_classes_find_dead_columns() -> None:
    kept = np.array([0] * 300 + [50] * 400, np.int64)
    np.random.default_rng(0).shuffle(kept)
    classes, saved = column_classes(kept, 100)
    np.testing.assert_array_equal(classes, (kept > 0).astype(np.uint8))

    def entropy(p: float) -> float:
        return -p * np.log2(p) - (1 - p) * np.log2(1 - p)

    # One class: 70,000 cells at 2/7. Two: only the live 40,000 cost, one bit each.
    best = (70_000 * entropy(2 / 7) - 40_000 - 700 * entropy(3 / 7)) / 8
    assert saved == pytest.approx(best - 24, abs=1)
    assert column_classes(np.full(50, 3), 10) is None
    assert column_classes(np.zeros(0, np.int64), 0) is None
