import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import l1_unstructured

from gossamer import nets
from gossamer.core.errors import ArgumentError
from gossamer.structure import fold_batchnorm


def settle(net: nn.Module, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean = torch.randn(m.num_features, generator=g)
            m.running_var = torch.rand(m.num_features, generator=g) + 0.2
            if m.affine:
                m.weight.data = torch.randn(m.num_features, generator=g)
                m.bias.data = torch.randn(m.num_features, generator=g)
    return net


def test_folding_by_hand():
    net = settle(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))
    with torch.no_grad():
        for tensor, value in (
            (net[0].weight, 3.0), (net[0].bias, 1.0), (net[1].weight, 2.0), (net[1].bias, 5.0),
            (net[1].running_mean, 4.0), (net[1].running_var, 0.25 - 1e-5),
        ):  # fmt: skip
            tensor.fill_(value)
    folded = fold_batchnorm(net)
    # s = 2 / 0.5 = 4: weight 12, bias 4 (1 - 4) + 5
    assert (folded.get_submodule("0").weight.item(), folded.get_submodule("0").bias.item()) == (
        pytest.approx(12.0),
        pytest.approx(-7.0),
    )


@pytest.mark.parametrize("name", ["resnet-8", "wrn-10-1", "vgg-11"])
def test_folding_keeps_the_function_and_the_model(name):
    net = settle(nets.build(name, seed=0)).train()
    before = copy.deepcopy(net.state_dict())
    folded = fold_batchnorm(net)
    assert net.training
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not folded.training
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = net.eval()(x)
    torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-3)


def test_grouped_shared_and_read_twice():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)

        def forward(self, x):
            y = self.conv(x)
            return self.second(self.conv(self.first(y) + y))

    net = settle(Net())
    folded = fold_batchnorm(net)
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(folded(x), net.eval()(x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_folded_is_named():
    with pytest.raises(ArgumentError, match=r"1 \(BatchNorm2d\) keeps no running"):
        fold_batchnorm(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False))
        )
    with pytest.raises(ArgumentError, match=r"1 \(BatchNorm1d\) follows no"):
        fold_batchnorm(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2)))
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    net[1].running_var[0] = -1
    with pytest.raises(ArgumentError, match="running_var is negative"):
        fold_batchnorm(net)
    net[1].running_var[0] = float("nan")
    with pytest.raises(ArgumentError, match="running_var holds 1"):
        fold_batchnorm(net)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    parametrize.register_parametrization(net[0], "weight", nn.Identity())
    with pytest.raises(ArgumentError, match="finish"):
        fold_batchnorm(net)

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ArgumentError, match="cannot be traced"):
        fold_batchnorm(nn.Sequential(Branch()))


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def agrees(net: nn.Module, x: torch.Tensor, example: torch.Tensor | None = None) -> nn.Module:
    folded = fold_batchnorm(net, example)
    torch.testing.assert_close(folded(x), net.eval()(x), rtol=1e-4, atol=1e-4)
    return folded


def test_a_linear_layer_and_batch_norm_on_another_axis_follow_the_batch():
    net = settle(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ArgumentError, match=r"1 \(BatchNorm1d\) follows the linear layer 0, .*ex"):
        fold_batchnorm(net)
    wide = batch(6, 4, 5)  # (N, C, L): the layer acts on L, batch-norm on C
    assert isinstance(agrees(net, wide, wide).get_submodule("1"), nn.Conv1d)
    flat = batch(6, 5)  # (N, C): both act on C
    assert len(list(agrees(net, flat, flat).children())) == 1
    other = settle(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(4)))
    agrees(other, wide, wide)
    with pytest.raises(ArgumentError, match="give"):
        fold_batchnorm(other)


def test_a_flatten_before_linear_layers_tells_the_axis():
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3),
        nn.BatchNorm1d(3),
    )  # fmt: skip
    agrees(settle(net), batch(5, 2, 3))
    rows = settle(nn.Sequential(nn.Flatten(2), nn.Linear(6, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ArgumentError, match="give"):  # (N, 4, 6) -> (N, 4, 4)
        fold_batchnorm(rows)
    agrees(rows, batch(5, 4, 2, 3), batch(5, 4, 2, 3))


class Tied(nn.Module):
    """One weight in two convolutions, each with a batch-norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.b, self.bn_b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.bn_b(self.b(torch.relu(self.bn_a(self.a(x)))))


class Read(nn.Module):
    """The convolution's weight is read past it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.a(x)) + nn.functional.conv2d(x, self.a.weight)


class Again(Read):
    def forward(self, x):
        return self.bn(self.a(torch.relu(self.bn(self.a(x)))))


class Also(Read):
    def forward(self, x):
        y = self.a(x)
        return self.bn(y) + y


class Added(Read):
    """+= on a view of what is read later: a graph must keep it in place."""

    def forward(self, x):
        y = self.bn(self.a(x))
        z = y.view(-1)
        z += 1
        return y


@pytest.mark.parametrize("kind", [Tied, Read, Again, Also, Added])
def test_weights_with_several_readers_fold_right(kind):
    net = settle(kind())
    before = copy.deepcopy(net.state_dict())
    agrees(net, batch(2, 3, 5, 5))
    agrees(net, batch(2, 3, 5, 5), batch(2, 3, 5, 5))
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
@pytest.mark.parametrize("kind", ["prune", "weight_norm", "spectral_norm", "parametrized"])
def test_computed_weights_are_refused(kind):
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    utils = torch.nn.utils
    computed = {
        "prune": lambda c: l1_unstructured(c, "weight", amount=0.5),
        "weight_norm": utils.weight_norm,
        "spectral_norm": utils.spectral_norm,
        "parametrized": utils.parametrizations.weight_norm,
    }
    computed[kind](net[0])
    with pytest.raises(ArgumentError, match=r"0 cannot be .*: 0.weight is .*remove"):
        fold_batchnorm(net)
    net.requires_grad_(False)
    with torch.no_grad():
        net(batch(1, 3, 5, 5))
    with pytest.raises(ArgumentError, match=r"0 cannot be .*: 0.weight is .*remove"):
        fold_batchnorm(net)


LAYERS = {
    "transposed": ([nn.ConvTranspose2d, (3, 5, 3, 2), nn.BatchNorm2d, 5], (2, 3, 6, 6)),
    "transposed, as many": ([nn.ConvTranspose2d, (3, 3, 3, 2), nn.BatchNorm2d, 3], (2, 3, 6, 6)),
    "transposed signals": ([nn.ConvTranspose1d, (3, 3, 3, 2), nn.BatchNorm1d, 3], (2, 3, 6)),
    "signals": ([nn.Conv1d, (3, 3, 3), nn.BatchNorm1d, 3], (2, 3, 6)),
    "volumes": ([nn.Conv3d, (4, 8, 3), nn.BatchNorm3d, 8], (2, 4, 6, 6, 6)),
    "volumes, transposed": ([nn.ConvTranspose3d, (4, 4, 3), nn.BatchNorm3d, 4], (2, 4, 4, 4, 4)),
    "transposed, groups": (
        [nn.ConvTranspose2d, (4, 6, 3, 2, 1, 1, 2, False), nn.BatchNorm2d, 6],
        (2, 4, 5, 5),
    ),
    "transposed, as many groups": (
        [nn.ConvTranspose1d, (4, 4, 3, 2, 0, 1, 4), nn.BatchNorm1d, 4],
        (2, 4, 7),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_agrees(kind):
    (layer, args, norm, channels), shape = LAYERS[kind]
    net = settle(nn.Sequential(layer(*args), norm(channels)))
    agrees(net, batch(*shape), batch(*shape))
    folded = agrees(net, batch(*shape))
    assert [type(m) for m in folded.children()] == [layer]  # into the layer, not beside it


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.ConvTranspose1d])
def test_one_example_without_a_batch_has_its_channels_on_another_axis(layer):
    net = settle(nn.Sequential(layer(4, 5, 1), nn.BatchNorm1d(5)))
    x = batch(4, 5)  # (5, 5) before batch-norm, which takes the first axis for the batch
    with pytest.raises(ArgumentError, match=r"1 .*follows no convolution"):
        fold_batchnorm(net, x)


def test_batch_norm_of_lines_takes_the_rows_of_one_picture():
    net = settle(nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm1d(5)))
    agrees(net, batch(4, 5, 5), batch(4, 5, 5))  # (5, 5, 5), of which it scales the rows
    with pytest.raises(ArgumentError, match="follows no convolution"):
        fold_batchnorm(net)


class Taken(nn.Module):
    """A transposed convolution, told what size to make."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bn = nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.up(x, output_size=(14, 14)))


def test_a_transposed_convolution_keeps_the_size_it_is_told():
    agrees(settle(Taken()), batch(2, 3, 6, 6), batch(2, 3, 6, 6))


def test_a_hook_that_changes_the_output_is_found_on_a_batch():
    net = settle(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    net[0].register_forward_hook(lambda module, args, out: out.relu())
    x = batch(3, 1, 5, 5)
    with pytest.raises(ArgumentError, match="the folded network differs from Sequential in eval"):
        fold_batchnorm(net, x)
    net[0].register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ArgumentError, match="0 has a forward pre-hook"):
        fold_batchnorm(net)


def test_a_batch_that_the_network_does_not_take_is_named():
    net = settle(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    with pytest.raises(ArgumentError, match=r"does not take example of shape \(3, 2, 5, 5\)"):
        fold_batchnorm(net, batch(3, 2, 5, 5))
    with pytest.raises(ArgumentError, match="give one batch"):
        fold_batchnorm(net, "images")


def test_wrappers_are_told_what_to_give():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend="eager")):
        with pytest.raises(ArgumentError, match="give the module within"):
            fold_batchnorm(wrapped)
