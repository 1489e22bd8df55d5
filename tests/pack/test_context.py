"""The context coder: compiled and plain write the same bytes, and refuse what is not theirs."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import damaged
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.kernels import kernel
from gossamer.pack.coders import context


def ranks(seed: int, rows: int, cols: int, density: float, largest: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.integers(1, largest + 1, (rows, cols)) * rng.choice([-1, 1], (rows, cols))
    return np.where(rng.random((rows, cols)) < density, values, 0).astype(np.int32)


def plain(function, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_NATIVE", "0")
        return function(*arguments)


SHAPES = [(1, 1, 1), (1, 40, 1), (7, 5, 1), (5, 36, 9), (4, 49, 1), (3, 50, 25), (2, 12, 3)]


@pytest.mark.parametrize("largest", [1, 9, 300, context.LARGEST])
@pytest.mark.parametrize(("rows", "cols", "kernel_size"), SHAPES)
def test_compiled_and_plain_agree(rows, cols, kernel_size, largest):
    for seed, density in enumerate((0.0, 0.1, 0.6, 1.0)):
        values = ranks(seed, rows, cols, density, largest)
        data = context.encode(values, kernel_size)
        assert plain(context.encode, values, kernel_size) == data
        np.testing.assert_array_equal(context.decode(data, rows, cols), values)
        np.testing.assert_array_equal(plain(context.decode, data, rows, cols), values)


@pytest.mark.parametrize("kernel_size", [1, 9])
def test_agree_after_rows_of_zeros(kernel_size):
    # They bring counters into states that no other row does.
    for seed in range(4):
        values = np.random.default_rng(seed).integers(-8, 7, (8, 45)).astype(np.int32)
        values[3] = values[5, :40] = 0
        data = context.encode(values, kernel_size)
        assert plain(context.encode, values, kernel_size) == data
        np.testing.assert_array_equal(plain(context.decode, data, 8, 45), values)


def test_agree_where_the_statistics_have_settled():
    values = ranks(1, 60, 144, 0.3, 40)
    values[:, ::3] = 0
    values[20:40] *= 30
    data = context.encode(values, 9)
    assert plain(context.encode, values, 9) == data
    np.testing.assert_array_equal(plain(context.decode, data, 60, 144), values)


@given(
    st.integers(0, 999), st.integers(1, 6), st.integers(1, 30), st.floats(0, 1), st.integers(1, 99)
)
@settings(max_examples=15)
def test_round_trip(seed, rows, cols, density, largest):
    values = ranks(seed, rows, cols, density, largest)
    data = context.encode(values)
    assert plain(context.encode, values) == data
    np.testing.assert_array_equal(context.decode(data, rows, cols), values)


def test_empty_matrices():
    for shape in ((0, 3), (3, 0)):
        data = context.encode(np.zeros(shape, np.int32))
        assert context.decode(data, *shape).shape == shape
        with pytest.raises(FormatError):
            context.decode(data + b"\1", *shape)


def test_learns_columns_rows_and_signs():
    """Structure is worth more than the entropy of independent entries."""
    rng = np.random.default_rng(0)
    chance = np.where(np.arange(200) % 4 == 0, 0.5, 0.01)
    where = rng.random((300, 200)) < chance
    signs = rng.choice([-1, 1], 200)
    values = np.where(where, signs * rng.integers(1, 5, (300, 200)), 0).astype(np.int32)
    _, counts = np.unique(values, return_counts=True)
    share = counts / values.size
    independent = -(share * np.log2(share)).sum() * values.size / 8
    assert len(context.encode(values)) < 0.72 * independent
    # Independent entries cost little more than their entropy.
    noise = rng.permuted(values.reshape(-1)).reshape(values.shape)
    assert len(context.encode(noise)) < 1.02 * independent + 32


def test_a_flattened_convolution_is_found():
    """Columns come in channels of 16 that are kept or not as a whole."""
    rng = np.random.default_rng(2)
    channels = np.repeat(rng.random((64, 50)) < 0.15, 16, axis=1)
    values = np.where(channels & (rng.random((64, 800)) < 0.7), 1, 0).astype(np.int32)
    best = context.encode(values)
    assert best[1] == 16
    assert len(best) < 0.9 * len(context._encode(values, 1, 1))


@given(st.integers(0, 99), st.data())
@settings(max_examples=50)
def test_damage_is_refused_or_harmless(seed, data):
    """Compiled and plain decoders agree on which."""
    values = ranks(seed, 6, 18, 0.4, 12)
    coded = damaged(data, context.encode(values, 9), flips=1, reach=1 << 20)
    found = []
    for how in (lambda *a: context.decode(*a), lambda *a: plain(context.decode, *a)):
        try:
            found.append(how(coded, 6, 18).tolist())
        except FormatError:
            found.append(None)
    assert found[0] == found[1]


@given(st.binary(max_size=60), st.integers(0, 9), st.integers(0, 40))
@settings(max_examples=50)
def test_noise_never_crashes(data, rows, cols):
    with contextlib.suppress(FormatError):
        assert context.decode(data, rows, cols).shape == (rows, cols)


def test_what_cannot_be():
    data = context.encode(ranks(0, 4, 6, 0.5, 3), 3)
    with pytest.raises(FormatError, match="kernel"):
        context.decode(data, 3, 8)
    with pytest.raises(FormatError, match="does not end"):
        context.decode(data, 2, 6)
    with pytest.raises(FormatError, match="does not end"):
        context.decode(data + b"\0", 4, 6)
    # Nothing is allocated for what so few bytes cannot hold.
    with pytest.raises(FormatError, match="cannot come"):
        context.decode(b"\1\1", 1 << 30, 1 << 30)
    with pytest.raises(FormatError, match="largest"):
        context.decode(b"\0\1", 1, 1)
    for bad in (np.zeros(3, np.int32), np.zeros((2, 5), np.int32)):
        with pytest.raises(ArgumentError, match="kernel"):
            context.encode(bad, 3)
    with pytest.raises(ArgumentError, match="beyond"):
        context.encode(np.array([[context.LARGEST + 1]], np.int32))


def test_the_kernel_checks_its_arguments():
    native = kernel("context")
    if native is None:
        pytest.skip("the kernels are not built")
    values = np.array([[5, -7]], np.int32)
    for shape in ((4, 1, 7), (0, 1, 7), (1, 0, 7), (1, 3, 7), (1, 1, 0), (1, 1, 2 << 20)):
        with pytest.raises(ValueError, match=r"kernel|largest"):
            native.encode(values, *shape)
    with pytest.raises(ValueError, match="beyond the largest"):
        native.encode(values, 1, 1, 6)
    with pytest.raises(ValueError, match="columns"):
        native.decode(b"", 0, 4, 1, 1, 1)
