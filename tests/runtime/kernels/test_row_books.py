"""Rows of few values: the values themselves, and products on every path beside numpy."""

from __future__ import annotations

import numpy as np
import pytest

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.arrays import RELU, dot_products
from gossamer.runtime.kernels.row_books import (
    RowBooks,
    linear_row_books,
    pack_row_books,
    row_values,
)

BUILT = kernel("few_bits") is not None
PATHS = [*(["scalar", "wide", "avx2"] if BUILT else [])] + ["avx512"] * dot_products()
SHAPES = [(1, 1), (3, 40), (16, 128), (37, 300), (6, 513)]


@pytest.fixture(params=["numpy", *PATHS])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setenv("GOSSAMER_NATIVE", "0")
    else:
        monkeypatch.setenv("GOSSAMER_ISA", request.param)
    return request.param


def rows_of(rng: np.random.Generator, shape: tuple[int, int], most: int, kind: str) -> np.ndarray:
    """Each row of other values, ``most`` at most."""
    book = rng.integers(-127, 128, (shape[0], most)).astype(kind)
    if kind == "float32":
        book = rng.standard_normal(book.shape).astype(np.float32)
    return np.take_along_axis(book, rng.integers(0, most, shape), 1)


def test_values_of_rows_by_hand() -> None:
    weight = np.array([[2, 0, 2, -1], [7, 7, 7, 7], [3, 4, 5, 6]], np.float32)
    codes, book = row_values(weight, 4) or pytest.fail("four values fit")
    assert codes.tolist() == [[0, 1, 0, 2], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert book.tolist() == [[2, 0, -1, 2], [7, 7, 7, 7], [3, 4, 5, 6]]
    assert row_values(weight, 3) is None
    assert row_values(weight, 3, rows=2) is not None
    assert row_values(np.array([[np.nan, np.nan]]), 4) is None  # NaN is no value of a book
    # Two bits of row 0: codes 0, 1, 0, 2 in the lowest bits of bytes 0 to 3.
    packed = pack_row_books(weight)
    assert (packed.bits, packed.codes[:5].tolist()) == (2, [0, 1, 0, 2, 0])
    assert packed.book.tolist()[:4] == [2, 0, -1, 2]


@pytest.mark.parametrize("most", [2, 4, 16])
def test_floats(path: str, most: int) -> None:
    for seed, shape in enumerate(SHAPES):
        rng = np.random.default_rng(seed)
        weight, n = rows_of(rng, shape, most, "float32"), 1 + seed
        x, bias = (rng.standard_normal(s).astype(np.float32) for s in ((n, shape[1]), shape[0]))
        packed = pack_row_books(weight)
        assert np.array_equal(packed.dense, weight)
        wanted = x.astype(float) @ weight.T.astype(float) + bias
        got = linear_row_books(packed, x, bias=bias, clamp=RELU)
        np.testing.assert_allclose(got, np.maximum(wanted, 0), atol=1e-4)
        more = linear_row_books(packed, x, bias=bias, clamp=RELU, threads=3)
        np.testing.assert_allclose(more, got, atol=0 if path != "numpy" else 1e-5)
        assert linear_row_books(packed, x[:0]).shape == (0, shape[0])


@pytest.mark.parametrize("most", [3, 16])
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_bytes(path: str, most: int) -> None:
    for seed, shape in enumerate(SHAPES):
        rng = np.random.default_rng(seed)
        weight = rows_of(rng, shape, most, "int8")
        packed = pack_row_books(weight)
        assert np.array_equal(packed.dense, weight)
        x = np.zeros((1 + seed, packed.chunks * packed.columns), np.uint8)
        x[:, : shape[1]] = rng.integers(0, 128, (1 + seed, shape[1]))
        x[0, : shape[1]] = 127  # the largest products do not saturate
        factor, shift = (rng.standard_normal(shape[0]).astype(np.float32) for _ in range(2))
        sums = x[:, : shape[1]].astype(np.int64) @ weight.astype(np.int64).T
        wanted = np.minimum(sums.astype(np.float32) * factor + shift, np.float32(50))
        for threads in (1, 3):
            out = np.empty(wanted.shape, np.float32)
            module = kernel("few_bits")
            module.BookBytes(
                packed.bits, packed.codes, packed.book, x, factor, shift, -np.inf, 50.0, out,
                threads,
            )()  # fmt: skip
            assert np.array_equal(out, wanted)


def test_what_is_refused() -> None:
    weight = np.arange(34, dtype=np.float32).reshape(2, 17)
    with pytest.raises(ArgumentError, match="more than 16 values"):
        pack_row_books(weight)
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        pack_row_books(np.full((2, 2), np.inf, np.float32))
    with pytest.raises(ArgumentError, match="weight must be a numpy array of float32"):
        pack_row_books(weight.astype(float))
    with pytest.raises(ArgumentError, match="65537 inputs"):
        pack_row_books(np.zeros((1, 65537), np.float32))
    packed = pack_row_books(weight[:, :16])
    with pytest.raises(ArgumentError, match="bits=3"):
        RowBooks(packed.shape, 3, packed.codes, packed.book)
    with pytest.raises(ArgumentError, match="book has shape"):
        RowBooks(packed.shape, 4, packed.codes, packed.book[1:])
    with pytest.raises(ArgumentError, match="x has shape"):
        linear_row_books(packed, np.zeros((1, 17), np.float32))
    with pytest.raises(ArgumentError, match="for activations of seven bits"):
        linear_row_books(pack_row_books(np.zeros((1, 2), np.int8)), np.zeros((1, 2), np.float32))


@pytest.mark.parametrize("path", PATHS[:1], indirect=True)
def test_arrays_that_do_not_fit_reach_no_memory(path: str) -> None:
    packed, module = pack_row_books(np.ones((5, 70), np.float32)), kernel("few_bits")
    good = {
        "bits": 2, "codes": packed.codes, "book": packed.book, "x": np.ones((2, 70), np.float32),
        "bias": None, "low": 0.0, "high": 9.0, "out": np.empty((2, 5), np.float32), "threads": 1,
    }  # fmt: skip
    module.BookFloats(**good)
    for name, value in (
        ("bits", 3), ("bits", 4), ("codes", packed.codes[1:]), ("book", packed.book[4:]),
        ("x", np.ones((2, 257), np.float32)), ("x", np.ones((1, 70), np.float32)),
        ("bias", np.ones(4, np.float32)), ("out", np.empty((2, 9), np.float32)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="another length"):
            module.BookFloats(**{**good, name: value})
