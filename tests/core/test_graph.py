"""Graphs against the networks they were captured from."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import Precision, calibrate, quantize_activations_
from gossamer.core import graph
from gossamer.core.errors import ArgumentError
from gossamer.datasets import Split
from gossamer.quantize import fixed_activations_, normalize_
from gossamer.quantize.activations import QuantizedReLU
from gossamer.training.curvature import hessian_diagonal

SETTINGS = {"estimator": "clipped", "form": "round"}


class Net(nn.Module):
    """One linear layer, its ReLU, and another that reads both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.relu, self.a = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)


class PreAct(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        return self.a(self.relu(x)) + x


class Function(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        return self.a(F.relu(x, inplace=True)) + x


class View(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        return self.a(F.relu(x.view(-1, 6), inplace=True)) + x


class Flat(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        return self.a(F.relu_(x.flatten(1))) + x


class Slice(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        F.relu_(x[:, :3])
        return self.a(x)


class Identity(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        y = F.dropout(x, 0.5, False)
        return self.a(self.relu(y)) + x


class Chunk(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        first, second = x.chunk(2, 1)[0], x.chunk(2, 1)[1]
        return self.a(torch.cat([self.relu(first), second], 1)) + x


class Add(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        y = x.view(-1, 6)
        y += self.a(x)
        return self.a(F.relu(x))


WRITING = [PreAct, Function, View, Flat, Slice, Identity, Chunk]


def batch(count: int = 16) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", WRITING)
@pytest.mark.parametrize("functional", [True, False])
def test_a_relu_in_place_on_what_others_read_is_not_replaced(kind, functional) -> None:
    net = kind().eval()
    if not functional and kind in (Function, View, Flat, Slice):
        want = net(batch())  # its module is not used, and its calls stay as they are
        made = quantize_activations_(net, 8, alpha=0.02, functional=False, **SETTINGS)
        assert torch.equal(made(batch()), want)
        return
    with pytest.raises(ArgumentError, match=r"in place.*which others read too.*inplace=False"):
        quantize_activations_(net, 8, alpha=0.02, functional=functional, **SETTINGS)
    assert isinstance(net.relu, nn.ReLU)


@pytest.mark.parametrize("kind", [*WRITING, Add])
def test_steps_do_not_lose_what_is_written_in_place(kind) -> None:
    with pytest.raises(ArgumentError):
        calibrate(kind().eval(), [batch()], Precision(16, 16, 16, True))


def test_a_left_out_relu_may_write() -> None:
    class Two(PreAct):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    want = Two().eval()(batch())
    made = quantize_activations_(Two().eval(), 8, alpha=0.02, exclude="relu", **SETTINGS)
    assert float((made(batch()) - want).detach().abs().max()) <= 0.01 + 1e-6


def test_readers_before_the_write_are_no_matter() -> None:
    class Before(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            y = self.a(x)
            x += y
            return self.relu(x) + y

    net = Before().eval()
    want = net(batch())
    fixed = calibrate(net, [batch()], Precision(16, 16, 16, True))
    torch.testing.assert_close(fixed(batch()), want, atol=1e-2, rtol=0)


def test_an_operator_in_place_stays_one_and_keeps_its_name() -> None:
    net = Add().eval()
    want = net(batch())
    traced = graph.trace(net)
    assert [n.name for n in traced.graph.nodes if n.op == "call_function"] == ["add", "relu"]
    for made in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(made(batch()), want)


class Noisy(nn.Module):
    """A branch on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.training:
            x = x + torch.randn_like(x)
        return self.b(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_branch_on_the_mode_is_not_captured(training) -> None:
    net = Noisy().train(training)
    for capture in (
        lambda: quantize_activations_(net, 8, alpha=0.02, **SETTINGS),
        lambda: fixed_activations_(net, 8, [batch()]),
        lambda: normalize_(net, batch()),
    ):
        with pytest.raises(ArgumentError, match=r"Noisy computes something else in training, ra"):
            capture()
    assert net.training == training
    assert net.a.training == training


def test_a_branch_on_the_mode_does_not_matter_where_only_evaluation_is_used() -> None:
    net = Noisy()
    fixed = calibrate(net, [batch()], Precision(16, 16, 16, True))
    torch.testing.assert_close(fixed(batch()), net.eval()(batch()), atol=1e-2, rtol=0)


class Hooked(nn.Module):
    """A value that a graph cannot hold: it differs from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.calls = nn.Linear(6, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.a(x)) * self.calls


@pytest.mark.parametrize(
    "use",
    [
        lambda n: quantize_activations_(n, 8, calibration=[batch()], **SETTINGS),
        lambda n: fixed_activations_(n, 8, [batch()]),
        lambda n: normalize_(n, batch()),
    ],
)
def test_a_graph_that_differs_on_the_batch_is_refused(use) -> None:
    net = Hooked()
    with pytest.raises(ArgumentError, match=r"(something else|the captured graph differs)"):
        use(net)


def test_second_derivatives_compare_the_graph_with_the_network() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale = nn.Linear(6, 3), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return torch.flatten(self.a(x), 1)

    net = Scaled()
    net.register_forward_hook(lambda module, args, out: out * 3)
    split = Split(batch(), torch.arange(16) % 3)
    with pytest.raises(ArgumentError, match="the graph differs from Scaled in evaluation"):
        hessian_diagonal(net, split)


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
def test_second_derivatives_and_steps_are_of_plain_weights() -> None:
    net = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(6, 3)))
    with pytest.raises(ArgumentError, match=r"0\.weight is computed .*second derivatives"):
        hessian_diagonal(net, Split(batch(), torch.arange(16) % 3))
    with pytest.raises(ArgumentError, match=r"0 cannot be read: 0\.weight is computed"):
        calibrate(net, [batch()], Precision(8, 8, 8, True))


def test_comparing_leaves_random_numbers_buffers_and_modes() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5)).train()
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    for training in (True, False):
        graph.check_same(net, graph.trace(net), batch(), "the graph", training=training)
    assert torch.equal(torch.rand(2), want)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert all(m.training for m in net.modules())


def test_what_differs_by_its_shape_or_by_nan_is_refused() -> None:
    net = nn.Linear(6, 3)
    with pytest.raises(ArgumentError, match=r"gives shapes \[\(16, 4\)\] where Linear gives"):
        graph.check_same(net, nn.Linear(6, 4), batch(), "the other")
    other = copy.deepcopy(net)
    other.bias.data[0] = float("nan")
    with pytest.raises(ArgumentError, match=r"differs from Linear in evaluation .* by inf"):
        graph.check_same(net, other, batch(), "the other")
    graph.check_same(other, copy.deepcopy(other), batch(), "the other")  # NaN in both is equal


def test_tracing_leaves_nothing_on_the_model() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x * torch.tensor(2.0))

    net = Constant()
    before = set(vars(net))
    graph.check_modes(net)
    assert set(vars(net)) == before
    made = quantize_activations_(net, 4, alpha=1.0, **SETTINGS)
    assert made(torch.tensor([1.0])).tolist() == [2.0]


def test_relus_in_place_that_cannot_be_seen_are_refused() -> None:
    class Branching(PreAct):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    net = Branching()
    with pytest.raises(ArgumentError, match=r"'relu' works in place, .*Set inplace=False"):
        quantize_activations_(net, 8, alpha=0.02, functional=False, **SETTINGS)
    net.relu.inplace = False
    assert quantize_activations_(net, 8, alpha=0.02, functional=False, **SETTINGS) is net
    assert isinstance(net.relu, QuantizedReLU)
