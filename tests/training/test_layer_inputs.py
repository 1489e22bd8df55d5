"""What weights are multiplied with, whatever module or function does it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.training.layer_inputs import inputs_of, moments, readers


class Addmm(nn.Module):
    """GPT-2's Conv1D: the weight is (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.attention(x, x, x)[0])
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(6, 5, 2, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.inner(x)[0][:, -1])
        return out


SEQUENCE = (3, 7, 6)
NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), (4, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 5), SEQUENCE),
    "without bias": (lambda: nn.Linear(6, 5, bias=False), SEQUENCE),
    "square": (lambda: nn.Sequential(nn.Linear(6, 6), Addmm(6, 6)), (4, 6)),
    "addmm": (lambda: Addmm(6, 9), SEQUENCE),
    "attention": (Attention, SEQUENCE),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, stride=2, groups=8),
            nn.Conv2d(8, 2, 1, dilation=2),
        ),
        (2, 4, 6, 6),
    ),
    "convolution of one dimension": (
        lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1, dilation=2), (2, 6, 9)
    ),
}  # fmt: skip


def weighted(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in names.parameters(model).items() if p.ndim >= 2}


@pytest.mark.parametrize("name", NETS)
def test_every_product_is_seen(name: str) -> None:
    """The weight times the inputs seen is what the operation gave, biases taken off."""
    make, shape = NETS[name]
    model = make()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "bias" in n:
                p.zero_()
    x = torch.randn(shape)
    weights = weighted(model)
    assert set(readers(model, x, weights)) == set(weights)
    products: list[Tensor] = []

    def see(n: str, turned: bool, inputs: list[Tensor]) -> None:
        matrix = weights[n].detach().T if turned else weights[n].detach()
        rows = matrix.reshape(len(inputs), matrix.shape[0] // len(inputs), -1)
        assert all(y.shape[1] == rows.shape[2] for y in inputs)
        products.append(torch.cat([y @ w.T for y, w in zip(inputs, rows, strict=True)], 1))

    modes = [m.training for m in model.modules()]
    want = model.eval()(x).detach()
    for m, mode in zip(model.modules(), modes, strict=True):
        m.training = mode
    inputs_of(model, x, weights, see)
    assert [m.training for m in model.modules()] == modes
    if isinstance(model, (nn.Linear, Addmm)):
        torch.testing.assert_close(products[-1].view(want.shape), want, rtol=0, atol=1e-5)
    if name.startswith("convolution"):
        last = products[-1].view(len(want), -1, want.shape[1]).movedim(2, 1)
        torch.testing.assert_close(last.reshape(want.shape), want, rtol=0, atol=1e-5)


def test_a_recurrent_weight_is_used_at_every_step() -> None:
    model = Recurrent(nn.LSTM)
    found = readers(model, torch.randn(SEQUENCE), weighted(model))
    assert found["inner.weight_ih_l0"] == 1
    assert found["inner.weight_hh_l0"] == 7
    assert next(iter(found)) == "inner.weight_ih_l0"


def test_what_is_no_product_is_not_seen() -> None:
    model = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(1), nn.Linear(18, 4))
    x = torch.randint(0, 5, (2, 3))
    assert list(readers(model, x, weighted(model))) == ["2.weight"]
    turned = nn.ConvTranspose2d(2, 3, 3)
    assert readers(turned, torch.randn(1, 2, 4, 4), ["weight"]) == {}


def test_weights_that_lie_in_one_storage_are_told_apart() -> None:
    flat = torch.randn(24)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    model[0].weight = nn.Parameter(flat[:12].view(3, 4))
    model[1].weight = nn.Parameter(flat[12:].view(4, 3))
    x, seen = torch.randn(5, 4), {}
    inputs_of(model, x, weighted(model), lambda n, t, y: seen.setdefault(n, y[0]))
    assert torch.equal(seen["0.weight"], x)
    assert torch.equal(seen["1.weight"], model[0](x))


def test_batches_of_several_arguments_and_mappings() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.a(x * scale)

    x, scale = torch.randn(4, 3), torch.tensor(2.0)
    for batch in ((x, scale), [x, scale], {"scale": scale, "x": x}):
        found: list[Tensor] = []
        model = Two()
        inputs_of(model, batch, weighted(model), lambda n, t, y: found.append(y[0]))  # noqa: B023
        assert torch.equal(found[0], 2 * x)


def test_moments_are_sums_over_both_networks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    changed = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed[0].weight.mul_(0.5)
    batches = [torch.randn(5, 4), torch.randn(3, 4)]
    found = moments(changed, model, batches, "2.weight", 1)
    x = torch.relu(model[0](torch.cat(batches))).detach().double()
    y = torch.relu(changed[0](torch.cat(batches))).detach().double()
    assert found.hessian is not None
    assert found.cross is not None
    torch.testing.assert_close(found.hessian[0], y.T @ y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.cross[0], x.T @ y, rtol=1e-5, atol=1e-6)
    assert found.count == 8
    with pytest.raises(ArgumentError, match="NaN or infinity"):
        moments(changed, model, [torch.full((1, 4), float("nan"))], "2.weight", 1)
    with pytest.raises(ArgumentError, match="no batch reaches"):
        moments(changed, model, [], "2.weight", 1)
