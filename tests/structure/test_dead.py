import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.structure.dead import dead_units, remove_dead


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)
    )


@torch.no_grad()
def test_units_without_inputs_or_outputs_are_named_and_removed_exactly() -> None:
    net = mlp().eval()
    net[0].weight[1] = 0  # no inputs, emits relu(bias)
    net[0].bias[1] = 0.7
    net[2].weight[:, 4] = 0  # nothing reads unit 4
    masks = Masks.of({n: p for n, p in net.named_parameters() if p.ndim == 2})
    found = dead_units(net)
    assert found.without_inputs == {"0": [1]}
    assert found.without_outputs == {"0": [4]}
    assert found.not_examined == ["5"]
    assert found.count == 2
    assert "0" in found.table()
    x = torch.randn(7, 5)
    before = net(x)
    remove_dead(net, masks)
    torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-6)
    assert (net[2].weight[:, 1] == 0).all()
    assert (net[0].weight[4] == 0).all()
    assert net[0].bias[4] == 0
    assert not masks["2.weight"][:, 1].any()
    assert not masks["0.weight"][4].any()


@torch.no_grad()
def test_removal_runs_on_until_nothing_is_left() -> None:
    net = mlp().eval()
    net[5].weight[:, 2] = 0  # unit 2 of the middle layer is unread ...
    net[2].weight[:, 3] = 0
    net[2].weight[2, 3] = 1.0  # ... and was the only reader of unit 3 of the first
    x = torch.randn(7, 5)
    before = net(x)
    remove_dead(net)
    torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-6)
    assert (net[2].weight[2] == 0).all()
    assert (net[0].weight[3] == 0).all()


@torch.no_grad()
def test_filters_through_pooling_and_flattening() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 9, 3),
    ).eval()
    net[1].running_mean.normal_()
    net[1].bias.normal_()
    net[0].weight[2] = 0
    net[5].weight[:, 9:18] = 0  # filter 1 is unread
    assert dead_units(net).without_inputs == {"0": [2]}
    assert dead_units(net).without_outputs == {"0": [1]}
    x = torch.randn(5, 1, 8, 8)
    before = net(x)
    remove_dead(net)
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-6)
    assert (net[5].weight[:, 18:27] == 0).all()


@torch.no_grad()
def test_a_constant_that_zero_padding_dilutes_is_left_alone() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)).eval()
    net[0].weight[0] = 0
    net[0].bias[0] = 1.0
    before = net[2].weight.clone()
    remove_dead(net)
    assert torch.equal(net[2].weight, before)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.c(h + self.b(h))


def test_branches_are_not_examined() -> None:
    assert dead_units(Branching()).not_examined == ["a", "b", "c"]


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_untraceable_networks_are_named() -> None:
    with pytest.raises(ArgumentError, match="Untraceable cannot be traced"):
        dead_units(Untraceable())


class Reused(nn.Module):
    """``b`` runs twice, or shares its weight with ``c``: no use of it may be changed alone."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.tied = tied
        if tied:
            self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.tied else torch.relu(self.b(x))
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_shared_parameters_are_left_alone(tied: bool) -> None:
    torch.manual_seed(2)
    net = Reused(tied).eval()
    net.a.weight[1] = 0
    net.a.bias[1] = 0.7
    x = torch.randn(9, 5)
    before = net(x)
    assert "a" in remove_dead(net).not_examined
    assert torch.equal(net(x), before)


def _tokens() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4))


def _image(*between: nn.Module, inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), *between, nn.Linear(inputs, 3))


def _silent(net: nn.Module) -> None:
    net[0].weight[1] = 0


def _columns(*which: int):
    def kill(net: nn.Module) -> None:
        net[-1].weight[:, list(which)] = 0

    return kill


ELSEWHERE = {
    "tokens, silent": (_tokens, _silent, (4, 6, 5)),
    "tokens, unread unit": (_tokens, _columns(*range(1, 18, 3)), (4, 6, 5)),
    "tokens, unread tokens": (_tokens, _columns(*range(6)), (4, 6, 5)),
    "rows": (lambda: _image(nn.Flatten(2), inputs=16), _silent, (4, 2, 6, 6)),
    "positions": (lambda: _image(nn.Flatten(2), inputs=16), _columns(*range(4)), (4, 2, 6, 6)),
    "last axis": (lambda: _image(inputs=4), _columns(0), (4, 2, 6, 6)),
    "pooled units": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.MaxPool2d((1, 2)), nn.Linear(4, 8)),
        _columns(0),
        (4, 2, 3, 5),
    ),
    "linear, convolution": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Conv2d(4, 2, 1)),
        lambda net: net[1].weight[:, 1].zero_(),
        (3, 4, 5, 6),
    ),
    "tokens, batch-norm": (
        lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),
        _silent,
        (4, 3, 5),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_units_on_another_axis_are_left_alone(kind: str, given: bool) -> None:
    torch.manual_seed(3)
    make, kill, shape = ELSEWHERE[kind]
    net = make().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.bias.normal_()
    kill(net)
    x = torch.randn(shape)
    before = net(x)
    found = remove_dead(net, example=x if given else None)
    assert torch.equal(net(x), before)
    assert "0" in found.not_examined


@torch.no_grad()
def test_tokens_between_linear_layers_are_followed_on_their_own_axis() -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4)).eval()
    _silent(net)
    x = torch.randn(2, 6, 5)
    before = net(x)
    assert remove_dead(net, example=x).without_inputs == {"0": [1]}
    torch.testing.assert_close(net(x), before)
    assert (net[2].weight[:, 1] == 0).all()


@torch.no_grad()
def test_batch_norm_between_linear_layers_is_followed_on_a_batch() -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 4)).eval()
    net[1].running_mean.normal_()
    _silent(net)
    x = torch.randn(6, 5)
    before = net(x)
    assert "0" in dead_units(net).not_examined
    assert remove_dead(net, example=x).without_inputs == {"0": [1]}
    torch.testing.assert_close(net(x), before)


@torch.no_grad()
def test_a_network_that_its_chain_does_not_tell_is_put_back() -> None:
    class Late(nn.Sequential):
        def __call__(self, *args: Tensor) -> Tensor:  # hooks of a container are not in the graph
            return super().__call__(*args) + self[0].weight.sum()

    net = Late(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4)).eval()
    net[2].weight[:, 1] = 0
    before = {n: p.clone() for n, p in net.named_parameters()}
    with pytest.raises(ArgumentError, match="without its dead units differs"):
        remove_dead(net, example=torch.ones(2, 5))
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
