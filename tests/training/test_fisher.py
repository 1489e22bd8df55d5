"""The Fisher diagonal against closed forms."""

import pytest
import torch
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.datasets import Split
from gossamer.training.fisher import fisher_diagonal
from gossamer.training.tasks import Classification, Fidelity, Regression


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_softmax_layer_by_hand() -> None:
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 4), torch.randn(20, 3), torch.randint(4, (20,))
    found = fisher_diagonal(net, Split(x, y), Classification(), examples=20, generator=gen())
    wrong = net(x).softmax(1) - nn.functional.one_hot(y, 4)  # the loss's slope by the logits
    wanted = torch.einsum("ni,nj->nij", wrong, x).square().mean(0)
    torch.testing.assert_close(found["weight"], wanted)
    torch.testing.assert_close(found["bias"], wrong.square().mean(0))


def test_without_labels_it_is_that_of_the_outputs() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(3, 4), torch.randn(20, 3)
    found = fisher_diagonal(net, Split(x, None), Fidelity(net), examples=20, generator=gen())
    # each output has weights of its own, so that signs leave no cross terms
    torch.testing.assert_close(found["weight"], x.square().mean(0).expand(4, 3))
    torch.testing.assert_close(found["bias"], torch.ones(4))


def test_the_network_stays_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    net[0].weight.requires_grad_(False)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    data = Split(torch.randn(6, 3), torch.randn(6, 2))
    found = fisher_diagonal(
        net, data, Regression(), examples=4, generator=gen(), include=["0.weight"]
    )
    assert list(found) == ["0.weight"]
    assert bool((found["0.weight"] >= 0).all())
    assert net.training
    assert not net[0].weight.requires_grad
    assert net[0].weight.grad is None
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_bad_input_is_named() -> None:
    net = nn.Linear(2, 2)
    data = Split(torch.ones(3, 2), torch.zeros(3, 2))
    with pytest.raises(ArgumentError, match="examples=0"):
        fisher_diagonal(net, data, Regression(), examples=0, generator=gen())
    nn.init.constant_(net.weight, float("inf"))
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        fisher_diagonal(net, data, Regression(), examples=1, generator=gen())
