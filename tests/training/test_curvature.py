import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.datasets import Split
from gossamer.training.curvature import hessian_diagonal


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def data(*shape: int, n: int = 6, classes: int = 3) -> Split:
    g = torch.Generator().manual_seed(1)
    return Split(
        torch.randn(n, *shape, generator=g).double(), torch.randint(0, classes, (n,), generator=g)
    )


def exact(model: nn.Module, split: Split, name: str, loss: str) -> Tensor:
    """The diagonal of the true Hessian, by differentiating twice."""
    p = dict(model.named_parameters())[name]

    def value(w: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {name: w}, (split.inputs,))
        if loss == "cross_entropy":
            return F.cross_entropy(out, split.targets)
        return (F.one_hot(split.targets, out.shape[1]) - out).square().sum(1).mean()

    full = torch.autograd.functional.hessian(value, p.detach())
    return full.reshape(p.numel(), p.numel()).diagonal().reshape(p.shape)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("lm", [True, False])
def test_last_layer_equals_the_exact_diagonal(loss: str, lm: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    split = data(4)
    h = hessian_diagonal(net, split, loss=loss, levenberg_marquardt=lm)  # type: ignore[arg-type]
    for name in ("2.weight", "2.bias"):
        torch.testing.assert_close(h[name], exact(net, split, name, loss), rtol=1e-6, atol=1e-9)


def slow_hidden(net: nn.Sequential, split: Split, lm: bool) -> Tensor:
    """Equations 7-9 unit by unit, pattern by pattern, for linear-tanh-linear."""
    first, last = net[0], net[2]
    total = torch.zeros_like(first.weight)
    for x, target in zip(split.inputs, split.targets, strict=True):
        a = first.weight @ x + first.bias
        y = torch.tanh(a)
        p = F.softmax(last.weight @ y + last.bias, dim=0)
        for i in range(len(a)):
            slope, bend = 1 - y[i] ** 2, -2 * y[i] * (1 - y[i] ** 2)
            below = sum(last.weight[k, i] ** 2 * p[k] * (1 - p[k]) for k in range(len(p)))
            gradient = sum(last.weight[k, i] * (p[k] - float(k == target)) for k in range(len(p)))
            second = slope**2 * below + (0 if lm else bend * gradient)
            for j in range(len(x)):
                total[i, j] += x[j] ** 2 * second
    return (total / len(split)).detach()


@pytest.mark.parametrize("lm", [True, False])
def test_hidden_layer_equals_the_written_formula(lm: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    split = data(4)
    h = hessian_diagonal(net, split, levenberg_marquardt=lm, batch_size=4)
    torch.testing.assert_close(h["0.weight"], slow_hidden(net, split, lm), rtol=1e-9, atol=1e-12)


def test_a_chain_of_single_units_is_exact_with_every_term() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1), nn.Tanh()).double()
    split = Split(torch.randn(5, 1).double(), torch.randn(5, 1).double())
    h = hessian_diagonal(net, split, loss="mse", levenberg_marquardt=False)
    for name, p in net.named_parameters():

        def value(w: Tensor, name: str = name) -> Tensor:
            out = torch.func.functional_call(net, {name: w}, (split.inputs,))
            return (out - split.targets).square().sum(1).mean()

        true = torch.autograd.functional.hessian(value, p.detach()).reshape(p.shape)
        torch.testing.assert_close(h[name], true, rtol=1e-9, atol=1e-12)


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2, dilation=1),
        nn.Sigmoid(),
        nn.AvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).double()


def test_levenberg_marquardt_is_nowhere_negative_and_covers_every_parameter() -> None:
    net = conv_net()
    h = hessian_diagonal(net, data(2, 12, 12))
    assert set(h) == {n for n, _ in net.named_parameters()}
    assert all(float(v.min()) >= 0 for v in h.values())
    assert all(float(v.max()) > 0 for v in h.values())


def test_convolution_equals_the_unrolled_linear_layer_with_shared_weights() -> None:
    conv = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.Flatten(), nn.Linear(12, 3)).double()
    split = data(2, 3, 3)
    # Each patch of each pattern is a row; the shared weight sums over its connections.
    unrolled = nn.Sequential(nn.Linear(8, 3, bias=False)).double()
    unrolled[0].weight.data = conv[0].weight.data.reshape(3, 8)
    h = hessian_diagonal(conv, split)["0.weight"]
    patches = F.unfold(split.inputs, 2).transpose(1, 2)  # (N, 4, 8)
    out = conv[2](conv[1](conv[0](split.inputs)))
    p = F.softmax(out, 1)
    below = (p * (1 - p)) @ conv[2].weight.square()  # (N, 12), channel-major
    below = below.view(-1, 3, 4).transpose(1, 2)  # (N, 4, 3)
    wanted = torch.einsum("nki,nko->oi", patches.square(), below) / len(split)
    torch.testing.assert_close(h.reshape(3, 8), wanted, rtol=1e-9, atol=1e-12)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.inner(x)) + x
        return self.out(y)


def test_residual_add_passes_the_derivative_to_both_branches() -> None:
    net, split = Residual().double(), data(4)
    h = hessian_diagonal(net, split)
    a = net.inner(split.inputs)
    p = F.softmax(net(split.inputs), 1)
    below = ((p * (1 - p)) @ net.out.weight.square()) * (a > 0)
    wanted = below.T @ split.inputs.square() / len(split)
    torch.testing.assert_close(h["inner.weight"], wanted, rtol=1e-9, atol=1e-12)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.tanh(self.a(x)))


def test_a_shared_parameter_sums_over_its_connections() -> None:
    net, split = Tied().double(), data(3)
    apart = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    apart = apart.double()
    apart[0].weight.data = apart[2].weight.data = net.a.weight.data
    both = hessian_diagonal(apart, split)
    h = hessian_diagonal(net, split)["a.weight"]
    torch.testing.assert_close(h, both["0.weight"] + both["2.weight"])


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_backpack_agrees_on_what_it_computes() -> None:
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import DiagHessian

    net = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    split = data(4)
    twin = backpack.extend(nn.Sequential(*net))
    loss = backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(DiagHessian()):
        loss(twin(split.inputs), split.targets).backward()
    h = hessian_diagonal(net, split, levenberg_marquardt=False)
    torch.testing.assert_close(h["2.weight"], twin[2].weight.diag_h)
    # Hidden layers: OBD drops off-diagonal terms, so it deviates, but not wildly.
    ratio = h["0.weight"].sum() / twin[0].weight.diag_h.sum()
    assert 0.2 < float(ratio) < 5


def test_weight_decay_is_included_only_when_asked_for() -> None:
    net, split = nn.Sequential(nn.Linear(4, 3)).double(), data(4)
    plain = hessian_diagonal(net, split)["0.weight"]
    decayed = hessian_diagonal(net, split, weight_decay=0.5)["0.weight"]
    torch.testing.assert_close(decayed, plain + 0.5)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(self.fc(x), 1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_has_no_rule_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="cumsum"):
        hessian_diagonal(Odd().double(), data(4))
    with pytest.raises(ArgumentError, match="cannot be traced"):
        hessian_diagonal(Branching(), data(4))
    with pytest.raises(ArgumentError, match="split is empty"):
        hessian_diagonal(nn.Sequential(nn.Linear(4, 3)).double(), data(4).take(torch.arange(0)))
    for padding in ({"padding": 1, "padding_mode": "circular"}, {"padding": "same"}):
        net = nn.Sequential(nn.Conv1d(2, 3, 3, **padding), nn.Flatten()).double()
        with pytest.raises(ArgumentError, match=r"0: padding=.* pad with zeros, by numbers"):
            hessian_diagonal(net, Split(torch.randn(4, 2, 5).double(), torch.zeros(4).long()))
    with pytest.raises(ArgumentError, match="'hinge'"):
        hessian_diagonal(nn.Sequential(nn.Linear(4, 3)), data(4), loss="hinge")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "targets", "loss"),
    [
        # the softmax ran over the positions where there were as many as classes
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), "cross_entropy"),
        (torch.zeros(2, 4), torch.zeros(2, 1).long(), "cross_entropy"),
        (torch.zeros(2, 4), torch.zeros(2, 3), "cross_entropy"),
        (torch.zeros(3, 4), torch.zeros(3), "mse"),  # would be broadcast
    ],
)
def test_targets_fit_by_rank(inputs: Tensor, targets: Tensor, loss: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ArgumentError, match="do not fit loss"):
        hessian_diagonal(net, Split(inputs, targets), loss=loss)  # type: ignore[arg-type]


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y + y


@pytest.mark.parametrize("lm", [True, False])
def test_what_is_added_to_itself_counts_twice(lm: bool) -> None:
    torch.manual_seed(0)
    net, split = Doubled().double(), data(4)
    h = hessian_diagonal(net, split, levenberg_marquardt=lm)["fc.weight"]
    # softmax of 2 W x: the Hessian by W is 4 times the one by 2 W, which is linear
    twice = nn.Sequential(nn.Linear(4, 3)).double()
    with torch.no_grad():
        twice[0].weight.copy_(2 * net.fc.weight)
        twice[0].bias.copy_(2 * net.fc.bias)
    wanted = hessian_diagonal(twice, split, levenberg_marquardt=lm)["0.weight"]
    torch.testing.assert_close(h, 4 * wanted)


def test_modes_are_given_back() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double().train()
    hessian_diagonal(net, data(4))
    assert net.training
    assert net[1].training


@pytest.mark.parametrize("function", [nn.ReLU, nn.SiLU, nn.ELU])
@pytest.mark.parametrize("lm", [True, False])
def test_activations_in_place_give_the_same(function: type[nn.Module], lm: bool) -> None:
    split = data(2, 3, 3)
    found = []
    for inplace in (True, False):
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 2),
            nn.BatchNorm2d(4),
            function(inplace=inplace),
            nn.Flatten(),
            nn.Linear(16, 3),
        ).double()
        found.append(hessian_diagonal(net, split, levenberg_marquardt=lm))
    for name, h in found[0].items():
        torch.testing.assert_close(h, found[1][name], rtol=1e-12, atol=1e-15)


class Awkward(nn.Module):
    """Ways to write a network that no rule covers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.out, self.how = nn.Linear(4, 4), nn.Linear(4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.how == "alpha":
            return self.out(torch.add(y, x, alpha=2))
        if self.how == "in place":
            return self.out(F.relu(y, inplace=True) + y)
        return self.out(input=y)


@pytest.mark.parametrize(
    ("how", "match"),
    [("alpha", "'add' adds with alpha"), ("in place", "changes 'fc'"), ("keyword", "by keyword")],
)
def test_awkward_networks_are_refused_before_anything_is_wrong(how: str, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        hessian_diagonal(Awkward(how).double(), data(4))


def test_uneven_averages_and_bad_batches_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AvgPool2d(3, 2), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ArgumentError, match="unequal windows"):
        hessian_diagonal(net.double(), data(1, 6, 6))  # windows overlap, the last row is dropped
    with pytest.raises(ArgumentError, match="batch_size=0"):
        hessian_diagonal(net.double(), data(1, 6, 6), batch_size=0)


def normalized() -> nn.Sequential:
    """Batch-norm with statistics of its own, weights that are no 1, and one of 0."""
    norm = nn.BatchNorm1d(3, eps=0.1)
    net = nn.Sequential(nn.Linear(4, 3), norm).double().eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 0.0]))
        norm.bias.copy_(torch.tensor([0.3, -0.1, 0.7]))
        norm.running_mean.copy_(torch.tensor([0.2, -0.4, 0.1]))  # type: ignore[union-attr]
        norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.5]))  # type: ignore[union-attr]
    return net


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("lm", [True, False])
def test_batch_norm_equals_the_exact_diagonal(loss: str, lm: bool) -> None:
    net, split = normalized(), data(4)
    h = hessian_diagonal(net, split, loss=loss, levenberg_marquardt=lm)  # type: ignore[arg-type]
    for name, found in h.items():
        torch.testing.assert_close(found, exact(net, split, name, loss), rtol=1e-6, atol=1e-9)
    assert (h["1.weight"] > 0).all()  # of a weight of 0, too


def test_batch_norm_by_hand() -> None:
    norm = nn.BatchNorm1d(1, eps=0.0).double()
    with torch.no_grad():
        norm.weight.fill_(3)
        norm.running_mean.fill_(1)  # type: ignore[union-attr]
        norm.running_var.fill_(4)  # type: ignore[union-attr]
    split = Split(torch.tensor([[5.0], [3.0]]).double(), torch.zeros(2, 1).double())
    h = hessian_diagonal(nn.Sequential(norm), split, loss="mse")
    # normalized: 2 and 1; the loss's second derivative: 2
    assert h["0.weight"].tolist() == [(2 * 4 + 2 * 1) / 2]
    assert h["0.bias"].tolist() == [2.0]
    net = nn.Sequential(nn.Linear(1, 1, bias=False), norm).double()
    net[0].weight.data.fill_(1)
    # scale 3 / 2, squared 9 / 4; inputs squared 25 and 9
    found = hessian_diagonal(net, split, loss="mse")["0.weight"]
    assert found.tolist() == [[pytest.approx(2 * 2.25 * (25 + 9) / 2)]]


def test_batch_norm_without_statistics_of_its_own_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    with pytest.raises(ArgumentError, match="batch's own statistics"):
        hessian_diagonal(net, data(4))


def test_batch_norm_passes_the_first_derivative_on() -> None:
    """A chain of single units: with the f'' terms its diagonal is exact."""
    norm = nn.BatchNorm1d(1)
    net = nn.Sequential(nn.Linear(2, 1), nn.Tanh(), norm, nn.Tanh(), nn.Linear(1, 1)).double()
    net.eval()
    with torch.no_grad():
        norm.weight.fill_(0.6)
        norm.running_mean.fill_(0.3)  # type: ignore[union-attr]
        norm.running_var.fill_(0.4)  # type: ignore[union-attr]
    split = Split(data(2).inputs, torch.linspace(-1, 1, 6).double()[:, None])
    found = hessian_diagonal(net, split, loss="mse", levenberg_marquardt=False)

    def value(w: Tensor) -> Tensor:
        out = torch.func.functional_call(net, {"0.weight": w}, (split.inputs,))
        return (split.targets - out).square().sum(1).mean()

    full = torch.autograd.functional.hessian(value, net[0].weight.detach())
    wanted = full.reshape(2, 2).diagonal().reshape(1, 2)
    torch.testing.assert_close(found["0.weight"], wanted, rtol=1e-6, atol=1e-9)


def test_inputs_that_no_window_covers_count_nothing_and_uneven_windows_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    whole = data(1, 5, 5)
    part = Split(whole.inputs[:, :, :4, :4], whole.targets)  # a window of 2 leaves the fifth out
    found, wanted = hessian_diagonal(net, whole), hessian_diagonal(net, part)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    net[1] = nn.AvgPool2d(3, stride=2)  # 0..2 and 2..4: the middle counts twice
    with pytest.raises(ArgumentError, match="averages unequal windows"):
        hessian_diagonal(net, whole)


def test_a_convolution_over_time_is_one_over_rows_of_height_one() -> None:
    flat = nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten())
    flat.append(nn.Linear(9, 3)).double()
    tall = nn.Sequential(nn.Conv2d(2, 3, (1, 3), stride=(1, 2), padding=(0, 1)), nn.Tanh())
    tall.append(nn.Flatten()).append(nn.Linear(9, 3)).double()
    with torch.no_grad():
        for p, q in zip(tall.parameters(), flat.parameters(), strict=True):
            p.copy_(q.reshape(p.shape))
    split = data(2, 5)
    found = hessian_diagonal(flat, split, levenberg_marquardt=False)
    rows = Split(split.inputs.unsqueeze(2), split.targets)
    for name, value in hessian_diagonal(tall, rows, levenberg_marquardt=False).items():
        torch.testing.assert_close(found[name], value.reshape(found[name].shape))
