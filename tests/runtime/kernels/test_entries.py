"""Packing from entries, beside packing by way of the dense weight: equal to the bit."""

from __future__ import annotations

import hashlib
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dense_detour
from gossamer.core.errors import ArgumentError
from gossamer.runtime.kernels import conv, conv_int8, gemv, gemv_int8, row_books
from gossamer.runtime.kernels.arrays import Packed
from gossamer.runtime.kernels.entries import Entries
from gossamer.runtime.plan.coding import Coded, coded
from gossamer.runtime.plan.ready import LAYOUTS


def same(one: Packed, other: Packed) -> bool:
    assert type(one) is type(other)
    for name, value in one.parts.items():
        wanted = other.parts[name]
        if isinstance(value, np.ndarray):
            assert value.dtype == wanted.dtype, name
            assert value.tobytes() == wanted.tobytes(), name
        else:
            assert value == wanted, name
    one.check()  # what is packed from entries is not checked where it is packed
    return True


def weight_of(data: st.DataObject, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """A weight of a drawn density; of few values, shared by all or of each row, or of any."""
    rng = np.random.default_rng(data.draw(st.integers(0, 999), label="seed"))
    density = data.draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.6, 0.95, 1.0]), label="density")
    book = data.draw(st.sampled_from([0, 1, 3, 15]), label="book")
    array = rng.integers(-127, 128, shape).astype(np.float64)
    if book:
        rows = data.draw(st.booleans(), label="a book for each row")
        values = rng.integers(1, 128, (shape[0] if rows else 1, book)) * rng.choice([-1, 1], book)
        picks = rng.integers(0, book, shape).reshape(shape[0], -1)
        array = np.take_along_axis(np.broadcast_to(values, (shape[0], book)), picks, 1)
        array = array.reshape(shape).astype(np.float64)
    array[rng.random(shape) >= density] = 0
    array = (array / 3 if kind == np.float32 else array).astype(kind)
    if kind == np.float32 and data.draw(st.booleans(), label="zeros with a sign"):
        array[(array == 0) & (rng.random(shape) < 0.3)] = -0.0
    return array


def from_file(array: np.ndarray) -> Entries:
    """The entries that a plan's file gives, without the dense array."""
    coding, data = coded(array)
    return Coded(str(array.dtype), array.shape, coding, memoryview(data), "a file").entries()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_convolutions(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    m, c = groups * draw(st.integers(1, 12)), draw(st.integers(1, 13))
    if draw(st.integers(0, 9)) == 0:
        m, groups = 2 * conv.CHUNK + 3, 1
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 5), (1, 3)]))
    how = {
        "groups": groups,
        "stride": draw(st.sampled_from([1, 2])),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.sampled_from([1, 2])),
        "block": draw(st.sampled_from([None, None, 1, 2, 5])),
        "image": draw(st.sampled_from([None, (11, 11), (16, 9)])),
    }
    weight = weight_of(data, (m, c, *kernel), np.float32)
    wanted = dense_detour.conv(weight + np.float32(0), **how)  # a zero with a sign is a zero
    assert same(conv.pack_conv(weight, **how), wanted)
    assert same(conv.pack_conv(from_file(weight), **how), wanted)
    assert np.array_equal(conv.pack_conv(from_file(weight), **how).dense, weight)
    codes = weight_of(data, (m, c, *kernel), np.int8)
    for element in ("auto", "quads", "pairs"):
        wanted = dense_detour.conv_codes(codes, element, **how)
        assert same(conv_int8.pack_codes(codes, element=element, **how), wanted)
        assert same(conv_int8.pack_codes(from_file(codes), element=element, **how), wanted)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_rows(data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 300))
    weight = weight_of(data, shape, np.float32)
    wanted = dense_detour.rows(weight)
    assert same(gemv.pack_rows(weight), wanted)
    assert same(gemv.pack_rows(from_file(weight)), wanted)
    codes, width = weight_of(data, shape, np.int8), data.draw(st.sampled_from([None, 32, 64, 128]))
    wide = dense_detour.row_codes(codes, width)
    assert same(gemv_int8.pack_codes(codes, width=width), wide)
    assert same(gemv_int8.pack_codes(from_file(codes), width=width), wide)
    assert np.array_equal(gemv_int8.pack_codes(from_file(codes), width=width).codes, codes)


@pytest.mark.parametrize("kind", [np.float32, np.int8])
def test_memory_is_that_of_the_entries(kind: Any) -> None:
    """One in a hundred of four million entries: far below the dense array and its mask."""
    rng = np.random.default_rng(0)
    weight = np.zeros((2048, 2048), kind)
    live = rng.choice(weight.size, weight.size // 100, replace=False)
    weight.reshape(-1)[live] = rng.integers(1, 100, len(live))
    coding, data = coded(weight)
    assert coding.startswith("sparse")
    held = Coded(str(weight.dtype), weight.shape, coding, memoryview(data), "a file")
    packs: list[Any] = (
        [gemv.pack_rows, lambda e: conv.pack_conv(e.reshaped(2048, 2048, 1, 1))]
        if kind == np.float32
        else [gemv_int8.pack_codes, lambda e: conv_int8.pack_codes(e.reshaped(2048, 2048, 1, 1))]
    )
    peaks = []
    for pack in packs:
        tracemalloc.start()
        pack(held.entries())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # some numbers of 8 bytes for each entry; a piece of the bitmap; rows of blocks, codes in steps
    assert max(peaks) < 160 * len(live) + (2 << 20), peaks
    assert max(peaks) < 2.5 * weight.size


def test_entries_that_are_none() -> None:
    good = Entries((2, 2), np.array([1, 2]), np.array([1.0, -1.0], np.float32))
    assert gemv.pack_rows(good).dense.tolist() == [[0, 1], [-1, 0]]
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        gemv.pack_rows(Entries((2, 2), good.places, np.array([1, np.nan], np.float32)))
    with pytest.raises(ArgumentError, match="must be a numpy array of float32, not float64"):
        gemv.pack_rows(Entries((2, 2), good.places, np.ones(2)))
    with pytest.raises(ArgumentError, match="allowed: \\(any, any, any, any\\)"):
        conv.pack_conv(good)
    with pytest.raises(ArgumentError, match="empty"):
        gemv.pack_rows(Entries((2, 0), good.places[:0], good.values[:0]))
    with pytest.raises(ArgumentError, match="another size"):
        good.reshaped(3, 1)


def test_layouts_are_those_of_their_version() -> None:
    """Packed layers are kept in files: what packing makes may not change under one number."""
    rng = np.random.default_rng(5)
    weight = (rng.integers(-9, 9, (20, 12, 3, 3)) * (rng.random((20, 12, 3, 3)) < 0.3)).astype("f4")
    flat = weight.reshape(20, -1)
    made: list[Packed] = [
        conv.pack_conv(weight, block=5),
        conv_int8.pack_codes(weight.astype(np.int8), element="quads", block=2),
        conv_int8.pack_codes(weight.astype(np.int8), element="pairs", block=2),
        gemv.pack_rows(flat),
        gemv_int8.pack_codes(flat.astype(np.int8), width=64),
        row_books.pack_row_books(np.sign(flat)),
    ]
    digest = hashlib.sha256()
    for one in made:
        for name, value in one.parts.items():
            held = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
            digest.update(name.encode() + held)
    found = {1: "d114b9b8829b5e967dad69cca09c3ec0c563d188f52aedc8e48b0c161b76c6e9"}
    assert digest.hexdigest() == found[LAYOUTS], "raise LAYOUTS, and write its digest here"
