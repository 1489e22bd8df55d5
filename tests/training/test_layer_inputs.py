"""What weights are multiplied with, whatever module or function does it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.training.layer_inputs import Layout, Use, inputs_of, readers


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
    assert set(readers(model, [x], weights)) == set(weights)
    products: list[Tensor] = []

    def see(use: Use) -> None:
        matrix = use.layout.matrix(weights[use.name].detach())[slice(*use.rows)]
        rows = matrix.reshape(len(use.inputs), matrix.shape[0] // len(use.inputs), -1)
        assert all(y.shape[1] == rows.shape[2] for y in use.inputs)
        products.append(torch.cat([y @ w.T for y, w in zip(use.inputs, rows, strict=True)], 1))

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


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 6)),
    "transposed, strided": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 4), stride=(2, 3), padding=(1, 2)), (2, 4, 5, 6)
    ),
    "transposed, all": (
        lambda: nn.ConvTranspose2d(
            4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2
        ),
        (2, 4, 5, 6),
    ),
    "transposed, padded away": (lambda: nn.ConvTranspose1d(3, 2, 2, padding=3), (2, 3, 9)),
    "transposed of three dimensions": (
        lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2), (1, 2, 3, 2, 4)
    ),
    "three dimensions": (
        lambda: nn.Conv3d(4, 6, (3, 1, 2), stride=2, padding=1, groups=2), (2, 4, 5, 6, 4)
    ),
    "two dimensions": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
        (2, 4, 7, 6),
    ),
    "one dimension": (lambda: nn.Conv1d(4, 4, 3, groups=4, padding=1), (2, 4, 7)),
    "valid": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding="valid"), (2, 4, 7, 6)),
    "same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), (2, 4, 7, 6)),
    "circular": (lambda: nn.Conv1d(4, 3, 3, padding=1, padding_mode="circular"), (2, 4, 7)),
    "linear": (lambda: nn.Linear(5, 3), (2, 7, 5)),
    "one output": (lambda: nn.Linear(5, 1), (4, 5)),
    "one input": (lambda: nn.Linear(1, 5), (4, 1)),
    "a vector": (lambda: nn.Linear(5, 3), (5,)),
    "addmm": (lambda: Addmm(5, 3), (4, 5)),
    "addmm, one output": (lambda: Addmm(5, 1), (4, 5)),
    "addmm, one input": (lambda: Addmm(1, 5), (4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_the_inputs_give_the_power_of_any_change(name: str) -> None:
    """|f(W + D) - f(W)|^2 = tr(D H D^T) where the output is linear in the weight."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    change, total = torch.randn_like(model.weight), []
    assert readers(model, [x], ["weight"])["weight"].uses == [1]

    def see(use: Use) -> None:
        rows = use.layout.matrix(change)
        assert use.rows == (0, len(rows))
        assert torch.equal(use.layout.weight(rows, change.shape), change)
        for y, d in zip(use.inputs, rows.chunk(len(use.inputs)), strict=True):
            total.append((d @ (y.T @ y) * d).sum())

    inputs_of(model, x, weighted(model), see)
    before = model(x).detach()
    with torch.no_grad():
        model.weight += change
    want = (model(x) - before).square().sum()
    torch.testing.assert_close(torch.stack(total).sum(), want.detach())


@pytest.mark.parametrize("name", ["valid", "same", "two dimensions"])
def test_all_rows_picked_are_all_rows(name: str) -> None:
    make, shape = LAYERS[name]
    model, x = make(), torch.randn(shape)
    seen: list[list[Tensor]] = []
    for pick in (None, lambda _, n: torch.arange(n)):
        inputs_of(model, x, weighted(model), lambda u: seen.append(u.inputs), pick=pick)
    for whole, picked in zip(*seen, strict=True):
        assert torch.equal(whole, picked)


def test_cross_attention_reads_other_rows_with_other_inputs() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 2, batch_first=True)
    query, key, seen = torch.randn(2, 3, 6), torch.randn(2, 5, 6), []
    batch = (query, key, key)
    inputs_of(model, batch, {"in_proj_weight": model.in_proj_weight}, seen.append)
    assert [u.rows for u in seen] == [(0, 6), (6, 18)]
    rows = [u.inputs[0].sort(0).values for u in seen]
    assert torch.equal(rows[0], query.reshape(-1, 6).sort(0).values)
    assert torch.equal(rows[1], key.reshape(-1, 6).sort(0).values)


def test_experts_of_one_tensor_are_told_apart() -> None:
    class Experts(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            self.turned = turned
            self.up = nn.Parameter(torch.randn(3, 4, 5) if turned else torch.randn(3, 5, 4))

        def forward(self, x: Tensor) -> Tensor:
            own = self.up if self.turned else self.up.mT
            return torch.bmm(x, own) + x[2:] @ own[2]

    x = torch.randn(3, 7, 4)
    for turned in (False, True):
        seen: list[Use] = []
        model = Experts(turned)
        inputs_of(model, x, {"up": model.up}, seen.append)
        assert [u.rows for u in seen] == [(0, 5), (5, 10), (10, 15), (10, 15)]
        assert all(torch.equal(u.inputs[0], x[i]) for u, i in zip(seen, (0, 1, 2, 2), strict=True))
        assert {u.layout for u in seen} == {Layout("columns" if turned else "rows")}
        matrix = seen[0].layout.matrix(model.up.detach())
        torch.testing.assert_close(x[1] @ matrix[5:10].T, model(x)[1] - x[2] @ matrix[10:].T)


def test_a_recurrent_weight_is_used_at_every_step() -> None:
    model = Recurrent(nn.LSTM)
    found = readers(model, [torch.randn(SEQUENCE), torch.randn(3, 4, 6)], weighted(model))
    assert found["inner.weight_ih_l0"].uses == [1, 1]
    assert found["inner.weight_hh_l0"].uses == [7, 4]
    assert next(iter(found)) == "inner.weight_ih_l0"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_both_directions_and_projections_of_recurrent_layers(kind: Any) -> None:
    options = {"proj_size": 3} if kind is nn.LSTM else {}
    model = kind(6, 5, 2, bidirectional=True, **options)
    assert set(readers(model, [torch.randn(7, 2, 6)], weighted(model))) == set(weighted(model))


def test_look_ups_are_told_from_products() -> None:
    model = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(1), nn.Linear(18, 4))
    x, seen = torch.randint(0, 5, (2, 3)), []
    found = readers(model, [x], weighted(model))
    assert (found["0.weight"].looked_up, found["0.weight"].multiplied) == (True, False)
    assert (found["2.weight"].looked_up, found["2.weight"].multiplied) == (False, True)
    inputs_of(model, x, {"0.weight": model[0].weight}, seen.append)
    assert torch.equal(seen[0].ids, x.reshape(-1))


def test_what_is_no_product_is_not_seen() -> None:
    model = nn.Bilinear(3, 4, 2)
    assert readers(model, [(torch.randn(2, 3), torch.randn(2, 4))], ["weight"]) == {}


def test_weights_that_lie_in_one_storage_are_told_apart() -> None:
    flat = torch.randn(24)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    model[0].weight = nn.Parameter(flat[:12].view(3, 4))
    model[1].weight = nn.Parameter(flat[12:].view(4, 3))
    x, seen = torch.randn(5, 4), {}
    inputs_of(model, x, weighted(model), lambda use: seen.setdefault(use.name, use.inputs[0]))
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
        found: list[Use] = []
        model = Two()
        inputs_of(model, batch, weighted(model), found.append)
        assert torch.equal(found[0].inputs[0], 2 * x)
