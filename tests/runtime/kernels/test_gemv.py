"""Sparse, ternary and code-book linear layers against numpy, on every path: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.arrays import LINEAR, RELU, dot_products
from gossamer.runtime.kernels.few_bits import linear_few_bits, pack_book, pack_ternary
from gossamer.runtime.kernels.gemv import gemv, pack_rows
from gossamer.runtime.kernels.gemv_int8 import linear_int8, pack_bytes

BUILT = kernel("sparse_gemv") is not None and kernel("few_bits") is not None
PATHS = ["numpy", *(["scalar", "wide", "avx2"] if BUILT else [])] + ["avx512"] * dot_products()
SIZES = [(1, 1), (3, 40), (16, 128), (37, 300), (70, 129), (5, 513)]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setenv("GOSSAMER_NATIVE", "0")
    else:
        monkeypatch.setenv("GOSSAMER_ISA", request.param)
    return request.param


def sparse(rng: np.random.Generator, shape: tuple[int, int], density: float) -> np.ndarray:
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) >= density] = 0
    return weight


def shared(rng: np.random.Generator, shape: tuple[int, int], density: float) -> np.ndarray:
    values = rng.standard_normal(15).astype(np.float32)
    weight = values[rng.integers(0, 15, shape)]
    weight[rng.random(shape) >= density] = 0
    return weight


def ternary(rng: np.random.Generator, shape: tuple[int, int], density: float) -> np.ndarray:
    scale = rng.uniform(0.01, 1, (shape[0], 1)).astype(np.float32)
    return np.sign(sparse(rng, shape, density)) * scale


def sevens(x: np.ndarray) -> np.ndarray:
    """Values of the codes of seven bits, written down anew."""
    low, high = np.minimum(x.min(1), 0)[:, None], np.maximum(x.max(1), 0)[:, None]
    step = (high - low) / 127
    zero = np.rint(-low / step)
    return (np.clip(np.rint(x / step) + zero, 0, 127) - zero) * step


def eights(x: np.ndarray) -> np.ndarray:
    step = np.abs(x).max(1)[:, None] / 127
    return np.rint(x / step) * step


def bytes_of(weight: np.ndarray) -> np.ndarray:
    step = np.abs(weight).max(1)[:, None] / 127
    step[step == 0] = 1
    return np.rint(weight / step) * step


def book_of(weight: np.ndarray) -> np.ndarray:
    step = (np.abs(weight).max() or 127) / 127
    return np.rint(weight / step) * step


Form = tuple[Callable[..., np.ndarray], Callable[[np.ndarray], Any], Any, Any, Any]
FORMS: dict[str, Form] = {
    "bytes": (sparse, pack_bytes, linear_int8, sevens, bytes_of),
    "book": (shared, lambda w: pack_bytes(w, form="book"), linear_int8, sevens, book_of),
    **{
        f"bytes, {n} columns": (
            sparse, lambda w, n=n: pack_bytes(w, width=n), linear_int8, sevens, bytes_of,
        )
        for n in (32, 64, 128)
    },
    "ternary": (ternary, pack_ternary, linear_few_bits, eights, lambda w: w),
    "dense book": (shared, pack_book, linear_few_bits, sevens, book_of),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_layers_are_the_products_of_their_codes(path: str, form: str) -> None:
    made, pack, call, of_x, of_weight = FORMS[form]
    for seed, shape in enumerate(SIZES):
        rng = np.random.default_rng(seed)
        weight = made(rng, shape, [0.1, 0.5, 1.0][seed % 3])
        packed = pack(weight)
        x = rng.standard_normal((1 + seed % 4, shape[1])).astype(np.float32)
        if seed % 2:
            x = np.abs(x)
        bias = rng.standard_normal(shape[0]).astype(np.float32) if seed % 2 else None
        want = of_x(x.astype(float)) @ of_weight(weight.astype(float)).T
        want = np.maximum(want if bias is None else want + bias, 0)
        got = call(packed, x, bias=bias, clamp=RELU)
        # one code may fall on the other side of a tie in float32
        tolerance = np.abs(x).max() / 60 * max(np.abs(weight).max(), 0.1)
        np.testing.assert_allclose(got, want, atol=tolerance)
        assert np.array_equal(got, call(packed, x, bias=bias, clamp=RELU, threads=3))


@pytest.mark.parametrize("form", FORMS)
def test_every_path_gives_the_same_bits(
    path: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, pack, call, _, _ = FORMS[form]
    rng = np.random.default_rng(7)
    packed = pack(made(rng, (53, 700), 0.3))
    x = rng.standard_normal((3, 700)).astype(np.float32)
    got = call(packed, x, clamp=LINEAR)
    monkeypatch.setenv("GOSSAMER_NATIVE", "0")
    assert np.array_equal(got, call(packed, x, clamp=LINEAR))


def test_float_rows(path: str) -> None:
    rng = np.random.default_rng(0)
    for shape in SIZES:
        weight, x = sparse(rng, shape, 0.3), rng.standard_normal(shape[1]).astype(np.float32)
        packed, bias = pack_rows(weight), rng.standard_normal(shape[0]).astype(np.float32)
        assert np.array_equal(packed.dense, weight)
        got = gemv(packed, x, bias=bias, clamp=RELU)
        np.testing.assert_allclose(got, np.maximum(weight @ x + bias, 0), atol=1e-4)
        assert np.array_equal(got, gemv(packed, x, bias=bias, clamp=RELU, threads=2))


def test_the_largest_codes_do_not_saturate(path: str) -> None:
    x = np.full((1, 256), 1, np.float32)
    for pack, call in (
        (pack_bytes, linear_int8), (pack_ternary, linear_few_bits), (pack_book, linear_few_bits),
    ):  # fmt: skip
        for sign in (-1, 1):
            got = call(pack(np.full((16, 256), sign, np.float32)), x)
            np.testing.assert_allclose(got, sign * 256, rtol=1e-5)


def test_rows_of_zeros_and_empty_batches(path: str) -> None:
    for pack, call in (
        (pack_bytes, linear_int8), (pack_ternary, linear_few_bits), (pack_book, linear_few_bits),
    ):  # fmt: skip
        packed = pack(np.zeros((5, 9), np.float32))
        assert not call(packed, np.ones((2, 9), np.float32)).any()
        assert not call(packed, np.zeros((2, 9), np.float32)).any()
        assert call(packed, np.ones((0, 9), np.float32)).shape == (0, 5)


def test_balanced_rows_waste_no_slot() -> None:
    rng = np.random.default_rng(0)
    kept = np.argsort(rng.random((32, 4, 128)), axis=2)[:, :, :8]
    mask = np.zeros((32, 4, 128), bool)
    np.put_along_axis(mask, kept, True, axis=2)
    weight = np.where(mask.reshape(32, 512), shared(rng, (32, 512), 1), 0).astype(np.float32)
    assert pack_bytes(weight, width=128).data.size == 2 * 32 * 4 * 8
    assert pack_bytes(weight, width=128, form="book").data.size == 1.5 * 32 * 4 * 8


def test_what_is_refused_is_named(path: str) -> None:
    rng = np.random.default_rng(0)
    weight = sparse(rng, (4, 8), 0.5)
    with pytest.raises(ArgumentError, match="weight has entries that are NaN"):
        pack_bytes(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(ArgumentError, match="row 0 of weight is not scale"):
        pack_ternary(np.array([[1, 2, 0]], np.float32))
    with pytest.raises(ArgumentError, match="values with 0; a book of 16"):
        pack_book(sparse(rng, (4, 40), 1.0))
    with pytest.raises(ArgumentError, match="form='words' is not one of"):
        pack_bytes(weight, form="words")
    wide = np.ones((1, 65537), np.float32)  # sums of bytes could leave 32 bits
    for pack in (pack_bytes, pack_book, pack_ternary, pack_rows):
        with pytest.raises(ArgumentError, match="weight has 65537 inputs an output; at most 65536"):
            pack(wide)
    with pytest.raises(ArgumentError, match="width=7"):
        pack_bytes(weight, width=7)
    bad = np.full((1, 8), np.inf, np.float32)
    for packed, call in (
        (pack_bytes(weight), linear_int8), (pack_ternary(np.sign(weight)), linear_few_bits),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match="NaN or infinite"):
            call(packed, bad)
        with pytest.raises(ArgumentError, match="x has shape"):
            call(packed, bad[:, :7])
        with pytest.raises(ArgumentError, match="x must be a numpy array of float32"):
            call(packed, bad.astype(np.float64))
    with pytest.raises(ArgumentError, match="x has shape"):
        gemv(pack_rows(weight), np.zeros(7, np.float32))
