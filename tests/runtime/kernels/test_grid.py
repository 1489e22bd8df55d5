"""Codes of weights on a grid: no error there, the nearest of 127 elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from gossamer.runtime.kernels.conv_int8 import weight_codes
from gossamer.runtime.kernels.grid import row_step


@pytest.mark.parametrize(
    ("row", "step"),
    [
        ([0.5, -1.0, 0.0, 1.5], 0.5),
        ([1.0, -1.5], 0.5),  # the least value is two steps
        ([0.0, 0.0], None),
        ([0.1, 12.8], None),  # 128 steps
        ([1.0, 2.0**0.5, 3.0], None),
        ([0.3], 0.3),
    ],
)
def test_the_step_of_a_row(row: list[float], step: float | None) -> None:
    found = row_step(np.array(row, np.float32), 127)
    assert found == (None if step is None else pytest.approx(step, rel=1e-6))


def test_a_grid_is_kept_row_by_row() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-9, 10, (12, 8, 3, 3))
    codes[:, 0, 0, 0] = 1
    steps = rng.uniform(0.01, 3, 12).astype(np.float32)
    weight = (codes * np.float32(0.37)).astype(np.float32) * steps[:, None, None, None]  # folded
    weight[3] = rng.normal(size=weight[3].shape)
    found, scale = weight_codes(weight)
    rest = np.arange(12) != 3
    np.testing.assert_array_equal(found[rest], codes[rest])
    np.testing.assert_allclose(scale[rest], steps[rest] * 0.37, rtol=1e-6)
    assert np.abs(found[3]).max() == 127
