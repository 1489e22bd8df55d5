"""Samples of a stream: evenly spaced, whatever the batches."""

import pytest
import torch
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.quantize import QuantizedReLU, quantize_activations_
from gossamer.quantize.capture import Sample


def sample(parts, most=256):
    held = Sample(most)
    for part in parts:
        held.add(part)
    return held.values()


def test_the_batches_sizes_and_their_number_change_nothing() -> None:
    stream = torch.randn(40_003)
    whole = sample([stream])
    assert 100 < len(whole) <= 256
    for size in (1, 7, 1000, 39_999):
        parts = stream[:5000].split(1) if size == 1 else stream.split(size)
        expected = sample([stream[:5000]]) if size == 1 else whole
        assert torch.equal(sample(parts), expected)


@pytest.mark.parametrize("count", [2, 5, 17, 40, 64])
def test_no_batch_of_equal_ones_weighs_more_than_another(count: int) -> None:
    places = sample(torch.arange(count * 10_000.0).split(10_000), most=4096)
    shares = torch.bincount((places / 10_000).long(), minlength=count) / len(places)
    assert float(shares.max()) < 1.15 / count
    assert float(shares.min()) > 0.85 / count


@pytest.mark.parametrize("width", [2, 3, 8, 64, 256, 1000])
def test_no_column_of_the_rows_is_preferred(width: int) -> None:
    columns = sample([torch.arange(width).repeat(200_000 // width)], most=50_000)
    shares = torch.bincount(columns, minlength=width) / len(columns)
    assert float(shares.max()) < 2 / width
    assert float(shares.min()) > 0.4 / width


def test_few_elements_are_all_kept() -> None:
    assert torch.equal(sample([torch.arange(3.0), torch.empty(0), torch.arange(2.0)]),
                       torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0]))  # fmt: skip


def alphas(batches) -> list[float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    quantize_activations_(net, 4, estimator="clipped", form="round", calibration=batches)
    return [float(m.alpha) for m in net.modules() if isinstance(m, QuantizedReLU)]


def test_calibration_is_the_same_in_any_batches() -> None:
    data = torch.randn(8000, 6)
    whole = alphas([data])
    assert alphas([data[:7999], data[7999:]]) == pytest.approx(whole, rel=1e-5)
    assert alphas(list(data.split(250))) == pytest.approx(whole, rel=1e-5)
    # a single example of another scale at the end, as before: it weighs what it is
    assert alphas([data, data[:1] * 100]) == pytest.approx(
        alphas([torch.cat([data, data[:1] * 100])]), rel=1e-5
    )


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "not reached by calibration"),
        ([torch.empty(0, 6)], "not reached by calibration"),
        ([torch.full((4, 6), float("nan"))], "NaN or infinite"),
    ],
)
def test_calibration_without_numbers_is_refused(batches, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        alphas(batches)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"x": torch.randn(3, 6)}, r"calibration batch \(dict\)"),
        (torch.ones(3, 6).long(), r"torch\.int64 of shape \(3, 6\)"),
        (torch.randn(3, 6).half(), r"torch\.float16 of shape \(3, 6\)"),
        (torch.randn(3, 5), r"of shape \(3, 5\)"),
    ],
)
def test_a_batch_that_the_network_refuses_is_described(batch, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        alphas([batch])
