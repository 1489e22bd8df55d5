"""Principal components of a layer's filters: by hand, against numpy's definition, and drawn."""

import math
from pathlib import Path

import pytest
import torch

from gossamer.analysis import components_for, lines, reconstruction_errors
from gossamer.core.errors import ArgumentError


def test_errors_by_hand() -> None:
    # two orthogonal filters of norm 4 and 3 over a mean of 7: that is not counted
    first, second = [[4.0, 0.0], [-4.0, 0.0]], [[0.0, 3.0], [0.0, -3.0]]
    weight = torch.tensor([[first], [second]]) + 7
    assert reconstruction_errors(weight) == [1.0, 0.6, 0.0]
    assert reconstruction_errors(weight.flatten(0, 1)) == [1.0, 0.6, 0.0]
    assert reconstruction_errors(torch.full((3, 2), 5.0)) == [0.0, 0.0, 0.0]


def test_errors_are_those_of_eigenvalues() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 3, 2, 2, generator=g, dtype=torch.float64)
    rows = weight.flatten(1) - weight.flatten(1).mean(1, keepdim=True)
    values = torch.linalg.eigvalsh(rows @ rows.T).flip(0)  # of the filters' covariance, times 12
    want = [math.sqrt(max(0.0, float(values[k:].sum() / values.sum()))) for k in range(7)]
    assert reconstruction_errors(weight) == pytest.approx(want, abs=1e-7)
    # made again from three components
    vectors = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -3:]
    again = vectors @ vectors.T @ rows
    assert float((rows - again).norm() / rows.norm()) == pytest.approx(want[3])


def test_zero_and_repeated_filters_need_no_component() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 8, generator=g)
    weight[1], weight[3] = 0, 2 * weight[0]
    errors = reconstruction_errors(weight)
    assert len(errors) == 6
    assert errors[2] > 0.01
    assert errors[3:] == [0.0, 0.0, 0.0]
    assert components_for(errors, 1.0) == 3


def test_bad_input_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"shape \(3,\) has no filters"):
        reconstruction_errors(torch.ones(3))
    with pytest.raises(ArgumentError, match=r"shape \(0, 3\)"):
        reconstruction_errors(torch.ones(0, 3))
    with pytest.raises(ArgumentError, match="NaN or infinity"):
        reconstruction_errors(torch.tensor([[1.0, math.nan]]))
    for energy in (0.0, 1.1):
        with pytest.raises(ArgumentError, match="must lie in"):
            components_for([1.0, 0.0], energy)


def test_lines_are_drawn(tmp_path: Path) -> None:
    axes = {"xlabel": "components", "ylabel": "error"}
    panels = {"conv1": {"dense": [(0.0, 1.0), (1.0, 0.2)]}, "conv2": {"dense": [(0.0, 1.0)]}}
    text = lines(panels, tmp_path / "deep" / "lines.svg", **axes).read_text()
    assert all(word in text for word in ("conv1", "conv2", "dense", "components", "error"))
    with pytest.raises(ArgumentError, match="no curve to draw for 'sparse'"):
        lines({"conv1": {"sparse": []}}, tmp_path / "x.svg", **axes)
    with pytest.raises(ArgumentError, match="no curve to draw; give"):
        lines({}, tmp_path / "x.svg", **axes)
