"""Drafts: their size is that of what they write, and the smallest of all layouts is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.pack.format.values import DType, Values, analyse, to_bits
from gossamer.pack.write import encode
from gossamer.pack.write.draft import near
from gossamer.pack.write.layouts import (
    Settings,
    bitmap_section,
    dense_section,
    gaps_section,
    row_scan,
    transposed,
)


def tensor(rows: int, cols: int, density: float, values: int) -> tuple[DType, Values]:
    """Columns of unlike density."""
    rng = np.random.default_rng(rows + values)
    book = np.sort(rng.normal(size=values)).astype(np.float32)
    codes = (rng.random((rows, cols)) ** 3 * values).astype(np.int64)
    kept = rng.random((rows, cols)) < density * rng.choice([0.2, 1.8], cols)
    dtype, bits = to_bits("t", torch.from_numpy(np.where(kept, book[codes], np.float32(0))))
    return dtype, analyse(bits, dtype, (rows, cols))


CASES = [(120, 200, 0.1, 31), (60, 400, 0.5, 7), (90, 333, 0.02, 200), (40, 500, 0.9, 3)]


@pytest.mark.parametrize("case", CASES)
def test_size_is_that_of_the_bytes(case: tuple[int, int, float, int]) -> None:
    _, v = tensor(*case)
    s, scan = Settings(), row_scan(v)
    classes = (np.arange(v.cols) % 3).astype(np.uint8)
    lines = (np.arange(v.rows) % 2).astype(np.uint8)
    for section in (gaps_section, bitmap_section, dense_section):
        for way, split in ((scan, None), (scan, classes), (transposed(scan), lines)):
            draft = section(v, s, way, split)
            written = len(bytes(draft))
            assert written <= near(draft.size)
            assert draft.size <= near(written)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_the_smallest_of_all_drafts(case: tuple[int, int, float, int]) -> None:
    dtype, v = tensor(*case)
    s = Settings(context=0)
    found = encode.encode_section(v.bits, dtype, v.shape, s)
    least = min(plan.estimate for plan in encode._plans(v, s))
    plans = [p for p in encode._plans(v, s) if p.estimate <= least * (1 + s.slack) + 64]
    assert len(found) == min(len(bytes(plan.draft())) for plan in plans)


def test_transposed_orders_by_column_then_row() -> None:
    # More columns than 16 bits count.
    rng = np.random.default_rng(0)
    cols = 70_000
    grid = np.where(rng.random((4, cols)) < 0.01, rng.integers(1, 9, (4, cols)), 0)
    dtype, bits = to_bits("t", torch.from_numpy(grid.astype(np.int32)))
    turned = transposed(row_scan(analyse(bits, dtype, (4, cols))))
    expected = np.flatnonzero(grid.T)
    np.testing.assert_array_equal(turned.positions, expected)
    np.testing.assert_array_equal(turned.entries, grid.T.reshape(-1)[expected] - 1)


def test_parts_are_the_matrices_of_the_classes() -> None:
    _, v = tensor(30, 50, 0.3, 5)
    classes = (np.arange(50) * 7 % 4).astype(np.uint8)
    grid = np.zeros(v.bits.shape, np.int64)
    grid[v.positions] = row_scan(v).entries + np.int64(1)
    for c, part in enumerate(row_scan(v).parts(classes)):
        mine = grid.reshape(30, 50)[:, classes == c]
        assert part.size == mine.size
        np.testing.assert_array_equal(part.positions, np.flatnonzero(mine))
        np.testing.assert_array_equal(part.entries + 1, mine[mine != 0])
