"""One layer by its inputs: layouts, parts, tables, halves and biases."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.core.obs import factor, solve
from gossamer.quantize.layerwise import Treatment, treat
from gossamer.quantize.obs import Rounded
from gossamer.training.layer_inputs import Layout, readers
from gossamer.training.moments import moments

FINE = Treatment(bits=16)
Batches = list[Any]


def seen(model: nn.Module, batches: Batches, name: str = "weight", held: int = 0) -> Any:
    uses = readers(model, batches, [name])[name].uses
    return moments(model, model, batches, name, uses, held=held)


def images(*shape: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, *shape, generator=generator) for n in (4, 3)]


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), images(6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), images(4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), images(4, 5, 5)),
    "table": (lambda: nn.Embedding(7, 4), [torch.arange(15).reshape(3, 5) * k % 7 for k in (2, 3)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_fine_values_keep_the_function_and_coarse_ones_beat_the_nearest(name: str) -> None:
    torch.manual_seed(0)
    make, batches = LAYERS[name]
    model = make()
    before, kept = model(batches[0]).detach(), model.weight.detach().clone()

    def error(how: Treatment, inputs: bool = True) -> float:
        with torch.no_grad():
            model.weight.copy_(kept)
        row = treat(model.weight, seen(model, batches) if inputs else None, how)
        assert row["density"] > 0
        assert row["unseen"] == (0 if inputs else len(model.weight))
        return float((model(batches[0]).detach() - before).norm() / before.norm())

    assert error(FINE) < 1e-3
    assert error(Treatment(rate=1e-6)) < 1e-3
    plain = error(Treatment(bits=2), inputs=False)
    coarse = error(Treatment(bits=2))
    # rows of a table do not share inputs: nothing to carry
    assert coarse < plain or (name == "table" and coarse == plain)
    layout = Layout("transposed", 2) if name == "transposed" else Layout()
    assert all(len(row.unique()) <= 3 for row in layout.matrix(model.weight.detach()))


def test_rounding_to_a_half_type_is_carried_like_any_other() -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(64, 32, bias=False), torch.randn(256, 16) @ torch.randn(16, 64)
    found = seen(model, [batch])
    half = model.weight.detach().bfloat16()
    whole = model.weight.detach().clone()
    treat(half, found, Treatment(bits=4))
    assert half.dtype == torch.bfloat16
    assert all(len(row.unique()) <= 15 for row in half)
    treat(whole, found, Treatment(bits=4))
    want = model(batch).detach()

    def error(weight: Tensor) -> float:
        return float((batch @ weight.float().T - want).norm() / want.norm())

    assert error(half) < 1.1 * error(whole)
    assert error(half) < error(whole.bfloat16())


def test_a_table_spends_bits_on_the_rows_that_are_looked_up() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(40, 16)
    ids = torch.cat([torch.arange(20).repeat(100), torch.arange(20, 40)])
    before = model.weight.detach().clone()
    treat(model.weight, seen(model, [ids]), Treatment(rate=0.05))
    lost = (model.weight.detach() - before).square().mean(1)
    assert lost[:20].mean() < lost[20:].mean()
    assert lost[20:].mean() < 0.5  # and does not give up on the others


def test_a_tied_table_counts_as_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 6))

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.embedding(ids, self.weight) @ self.weight.T

    torch.manual_seed(0)
    ids = [torch.randint(0, 12, (4, 9))]
    model = Tied()
    found, before = seen(model, ids), model.weight.detach().clone()
    rows = treat(model.weight, found, FINE)
    assert rows["error"] < 1e-6
    assert (model.weight.detach() - before).abs().max() < 1e-2
    # the head alone would leave what hidden states never reach to chance
    assert found.counts is not None
    model.weight.data.copy_(before)
    both = treat(model.weight, found, Treatment(bits=3))["error"]
    lost = (model.weight.detach() - before).square().sum() / before.square().sum()
    assert float(lost) <= 2 * both + 1e-9


def test_rows_that_no_input_reached_are_rounded_and_told() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight[0].T + x @ self.weight[2].T

    torch.manual_seed(0)
    model = Experts()
    before = model.weight.detach().clone()
    row = treat(model.weight, seen(model, [torch.randn(9, 5)]), Treatment(bits=8))
    assert row["unseen"] == 4
    assert (model.weight - before).abs().max() < 0.1
    assert all(len(r.unique()) <= 255 for r in model.weight.reshape(-1, 5))


def test_a_bias_moves_where_inputs_held_back_agree() -> None:
    torch.manual_seed(0)
    model, shift = nn.Linear(8, 6), 2.0 + torch.randn(8)
    batches = [shift + 0.1 * torch.randn(64, 8) for _ in range(2)]
    before, bias = model(batches[1]).detach(), model.bias.detach().clone()
    weight = model.weight.detach().clone()
    found = seen(model, batches, held=1)
    row = treat(model.weight, found, Treatment(density=0.3), bias=model.bias)
    assert row["bias"]
    after = (model(batches[1]).detach() - before).square().mean()
    plain = (batches[1] @ model.weight.T + bias - before).square().mean()
    assert after < plain
    # held-back inputs of another mean say no
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.copy_(bias)
    other = seen(model, [batches[0], -batches[1]], held=1)
    assert not treat(model.weight, other, Treatment(density=0.3), bias=model.bias)["bias"]
    assert torch.equal(model.bias, bias)


def test_layers_without_power_are_rounded_all_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    treat(model.weight, seen(model, [torch.zeros(5, 4)]), Treatment(bits=2))
    assert all(len(r.unique()) <= 3 for r in model.weight)
    nn.init.zeros_(model.weight)
    row = treat(model.weight, seen(model, [torch.ones(5, 4)]), Treatment(rate=0.1))
    assert row["density"] == 0


def test_a_rate_beyond_all_codes_keeps_what_float32_would() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    before = layer.weight.detach().clone()
    treat(layer.weight, None, Treatment(rate=1e-30))
    assert (layer.weight - before).abs().max() < 1e-6


@pytest.mark.parametrize("bits", [3, 8])
def test_carried_errors_find_room_where_inputs_nearly_determine_each_other(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 3) @ torch.randn(3, 24) + 1e-3 * torch.randn(400, 24)
    layer = nn.Linear(24, 6, bias=False)
    before = layer.weight.detach().double().clone()
    hessian = x.double().T @ x.double()

    def off(values: Tensor) -> Tensor:
        return ((before - values) @ hessian * (before - values)).sum(1)

    first = off(solve(before, factor(hessian), Rounded(bits)).weight)
    plain = off(solve(before, torch.eye(24).double(), Rounded(bits)).weight)
    treat(layer.weight, seen(layer, [x]), Treatment(bits=bits))
    found = off(layer.weight.detach().double())
    assert (found <= torch.minimum(first, plain) * (1 + 1e-4)).all()
    assert found.sum() < first.sum() / 2


@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_of_a_convolution_are_four_channels_at_a_place(groups: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(16, 8, 3, padding=1, groups=groups), torch.randn(8, 16, 7, 7)
    x = x * torch.rand(16, 1, 1)
    before = model.weight.detach().clone()
    seen = moments(model, model, [x], "weight", [1])
    row = treat(model.weight, seen, Treatment(density=0.25, sparsity="1x4"), bias=model.bias)
    blocks = model.weight.detach().reshape(8, -1, 4, 3, 3)
    live = blocks.ne(0).any(2)
    assert not row["left"]
    assert live.float().mean() == 0.25
    assert (blocks.ne(0).all(2) == live).all()
    # the stated error is that of the outputs
    with torch.no_grad():
        wanted = nn.functional.conv2d(x, before, None, 1, 1, 1, groups)
        found = nn.functional.conv2d(x, model.weight, None, 1, 1, 1, groups)
    error = float((found - wanted).square().sum() / wanted.square().sum())
    assert row["error"] == pytest.approx(error, rel=0.05)
    # and smaller than that of the largest blocks as they are
    size = before.reshape(8, -1, 4, 3, 3).square().sum(2)
    kept = size >= size.flatten().topk(int(0.25 * size.numel())).values[-1]
    plain = (before.reshape(8, -1, 4, 3, 3) * kept[:, :, None]).reshape(before.shape)
    worse = nn.functional.conv2d(x, plain, None, 1, 1, 1, groups) - wanted
    assert error < 0.9 * float(worse.square().sum() / wanted.square().sum())


def test_a_layer_that_a_pattern_does_not_fit_is_left_and_named() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 8, 3), torch.randn(4, 3, 9, 9)
    before, seen = model.weight.detach().clone(), moments(model, model, [x], "weight", [1])
    row = treat(model.weight, seen, Treatment(density=0.5, sparsity="2:4"))
    assert row["left"] == "not pruned: 27 inputs are no multiple of 4"
    assert row["density"] == 1.0
    assert torch.equal(model.weight, before)
    row = treat(model.weight, seen, Treatment(density=0.5, sparsity="2:4", bits=4))
    assert row["left"]
    assert not torch.equal(model.weight, before)
    assert len(model.weight[0].unique()) <= 15
    row = treat(model.weight, seen, Treatment(density=0.5, sparsity="1x4"))
    assert row["left"] == "not pruned: 3 input channels are no multiple of 4"
    row = treat(model.weight, seen, Treatment(density=0.5))
    assert not row["left"]
    assert row["density"] == 0.5
