import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks, keep_top
from gossamer.core.names import Tensors
from gossamer.datasets import load
from gossamer.prune import magnitude, obd
from gossamer.training.curvature import hessian_diagonal


def test_saliency_is_half_h_u_squared() -> None:
    weights = {"a": torch.tensor([[2.0, -1.0]]), "b": torch.tensor([3.0])}
    h = {"a": torch.tensor([[1.0, 4.0]]), "b": torch.tensor([0.0]), "c": torch.ones(1)}
    s = obd.saliency(weights, h)
    assert set(s) == {"a", "b"}
    assert s["a"].tolist() == [[2.0, 2.0]]
    assert s["b"].tolist() == [0.0]
    assert weights["a"].tolist() == [[2.0, -1.0]]


def test_predicted_increase_sums_what_is_removed() -> None:
    s = {"a": torch.tensor([1.0, 2.0, 4.0]), "b": torch.tensor([8.0, 16.0])}
    masks = Masks({"a": torch.tensor([True, False, True]), "b": torch.tensor([False, True])})
    assert obd.predicted_increase(s, masks) == 10.0
    assert obd.predicted_increase(s, Masks.of(s)) == 0.0


def test_mismatches_are_named() -> None:
    with pytest.raises(ArgumentError, match="'a' has no diagonal"):
        obd.saliency({"a": torch.ones(2)}, {"b": torch.ones(2)})
    with pytest.raises(ArgumentError, match=r"\(3,\), the weight \(2,\)"):
        obd.saliency({"a": torch.ones(2)}, {"a": torch.ones(3)})
    with pytest.raises(ArgumentError, match="'a'"):
        obd.predicted_increase({"b": torch.ones(2)}, Masks({"a": torch.ones(2).bool()}))


DECAY = 1e-3


def objective(net: nn.Module) -> Tensor:
    """Cross-entropy and weight decay on the training split, float64."""
    split = load("digits").train
    decay = sum(p.square().sum() for p in net.parameters())
    return F.cross_entropy(net(split.inputs.double()), split.targets) + DECAY / 2 * decay


@cache
def at_a_minimum() -> tuple[nn.Module, dict[str, Tensors]]:
    """A small network at a minimum of its objective, and the scores of three criteria.

    The prediction has no gradient term, so stochastic training, which stops beside the minimum,
    would not do: there the gradient outweighs the curvature of the first deletions.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=400, history_size=30, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(net)
        value.backward()
        return value

    optimizer.step(closure)
    weights = names.weights(net)
    diagonal = hessian_diagonal(net, load("digits").train, weight_decay=DECAY)
    scores = {
        "obd": obd.saliency(weights, diagonal),
        "magnitude": magnitude.scores(net),
        "random": magnitude.random_scores(net, torch.Generator().manual_seed(0)),
    }
    return net, scores


@torch.no_grad()
def increase(how: str, deleted: float) -> tuple[float, Masks]:
    net, scores = at_a_minimum()
    masks = keep_top(scores[how], 1 - deleted, scope="global")
    damaged = copy.deepcopy(net)
    masks.apply_(damaged)
    return float(objective(damaged) - objective(net)), masks


@pytest.mark.parametrize("deleted", [0.2, 0.3])
def test_the_prediction_is_within_a_factor_of_two(deleted: float) -> None:
    measured, masks = increase("obd", deleted)
    predicted = obd.predicted_increase(at_a_minimum()[1]["obd"], masks)
    assert 0.5 <= predicted / measured <= 2


@pytest.mark.parametrize("deleted", [0.2, 0.3, 0.5])
def test_obd_hurts_less_than_magnitude_and_magnitude_less_than_chance(deleted: float) -> None:
    by = {how: increase(how, deleted)[0] for how in ("obd", "magnitude", "random")}
    assert by["obd"] < by["magnitude"] < by["random"]
