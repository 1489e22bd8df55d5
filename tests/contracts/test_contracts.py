"""What every quantizer, score and symbol coder must do. A new one joins with one row."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.masks import keep_top
from gossamer.datasets import Split
from gossamer.pack.coders.huffman import Huffman
from gossamer.pack.coders.table import CODERS
from gossamer.prune.scores import SCORES
from gossamer.quantize import ecsq, loss_aware, share, to_fixed_point, twn, uniform
from gossamer.training.curvature import hessian_diagonal


def seeded(tensor: Tensor) -> Quantized:
    generator = torch.Generator().manual_seed(0)
    return share(tensor, bits=3, init="forgy", generator=generator)


QUANTIZERS: dict[str, Callable[[Tensor], Quantized]] = {
    "linear": lambda w: share(w, bits=3, init="linear"),
    "density": lambda w: share(w, bits=3, init="density"),
    "forgy": seeded,
    "optimal": lambda w: share(w, bits=3, init="optimal"),
    "shared grid": lambda w: share(w, bits=3, init="uniform"),
    "uniform": lambda w: uniform(w, bits=4),
    "step": lambda w: uniform(w, step=0.25),
    "fixed point": lambda w: to_fixed_point(w, 4),
    "ecsq": lambda w: ecsq(w, 0.01),
    "ecsq, rate": lambda w: ecsq(w, target_bits=2.0),
    "ecsq on a grid": lambda w: ecsq(w, 0.01, grid=0.25),
    "twn": lambda w: Quantized.of(twn.ternary(w)),
    **{  # without curvature; binary weights have no zero
        name: lambda w, rule=rule: Quantized.of(rule(w, torch.ones_like(w)))
        for name, rule in loss_aware.PROJECTIONS.items()
        if name != "lab"
    },
}
every_quantizer = pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS.keys())


def weights(*shape: int) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    made.view(-1)[::3] = 0
    return made


@every_quantizer
def test_quantizers_keep_shape_zeros_and_the_tensor(quantize: Callable[[Tensor], Quantized]):
    w = weights(6, 4, 5)
    before = w.clone()
    q = quantize(w)
    assert torch.equal(w, before)
    assert q.codes.shape == w.shape
    assert q.codebook[0] == 0
    assert q.codebook[1:].tolist() == sorted(q.codebook[1:].tolist())
    assert (q.dequantize()[w == 0] == 0).all()
    assert float((q.dequantize() - w).square().mean()) < float(w.square().mean())
    again = quantize(w)
    assert torch.equal(q.codes, again.codes)
    assert torch.equal(q.codebook, again.codebook)


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_quantizers_take_every_dtype_and_layout(quantize, dtype):
    w = weights(8, 9).to(dtype)
    q = quantize(w.t())
    assert q.codebook.dtype == dtype
    assert q.codes.shape == (9, 8)
    straight = quantize(w.t().contiguous())
    assert torch.equal(q.dequantize(), straight.dequantize())


@every_quantizer
def test_quantizers_at_the_edges(quantize):
    assert quantize(torch.zeros(0, 3)).codes.shape == (0, 3)
    assert quantize(torch.tensor(0.5)).codes.shape == ()
    assert quantize(torch.zeros(4, 4)).dequantize().abs().sum() == 0
    one = quantize(torch.full((5, 5), 0.5)).dequantize()
    assert len(one.unique()) == 1
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match=r"NaN|nan|infinite|finite"):
            quantize(torch.tensor([1.0, bad, 2.0]))


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def ranked(name: str) -> Callable[[nn.Module], dict[str, Tensor]]:
    """A score of the table, handed what it reads."""

    def score(model: nn.Module) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(1)
        split = Split(torch.randn(20, 1, 4, 4, generator=g), torch.arange(20) % 3)
        weights = names.weights(model)
        given: dict[str, Callable[[], object]] = {
            "initial": lambda: {n: torch.randn(w.shape, generator=g) for n, w in weights.items()},
            "hessian": lambda: hessian_diagonal(model, split),
            "model": lambda: model,
            "batches": lambda: [(split.stored, split.targets)],
            "generator": lambda: g,
        }
        entry = SCORES[name]
        return entry.function(weights, **{what: given[what]() for what in entry.reads})

    return score


every_score = pytest.mark.parametrize("score", [ranked(name) for name in SCORES], ids=list(SCORES))


@every_score
def test_scores_cover_the_weights_and_leave_the_model(score):
    model = net()
    before = copy.deepcopy(model.state_dict())
    found = score(model)
    assert {n: s.shape for n, s in found.items()} == {
        n: w.shape for n, w in names.weights(model).items()
    }
    assert all(bool(s.isfinite().all()) and not s.requires_grad for s in found.values())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    again = score(model)
    assert all(torch.equal(s, again[n]) for n, s in found.items())


@every_score
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scores_make_masks_of_the_density_asked_for(score, scope):
    masks = keep_top(score(net()), 0.5, scope=scope)
    assert masks.density == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("how", ["magnitude", "obd", "snip"])
def test_a_weight_that_is_zero_costs_nothing_to_remove(how):
    model = net()
    with torch.no_grad():
        model[3].weight[:, ::2] = 0
    assert (ranked(how)(model)["3.weight"][:, ::2] == 0).all()
    assert all(bool((s >= 0).all()) for s in ranked(how)(model).values())


ALL_CODERS = {**CODERS, "huffman, own instance": Huffman()}
every_coder = pytest.mark.parametrize("coder", ALL_CODERS.values(), ids=ALL_CODERS.keys())


@every_coder
@pytest.mark.parametrize("alphabet", [1, 2, 17, 256, 3000])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_coders_round_trip(coder, alphabet, count):
    rng = np.random.default_rng(alphabet + count)
    symbols = (rng.random(count) ** 4 * alphabet).astype(np.uint16)
    data = coder.encode(symbols, alphabet)
    assert isinstance(data, bytes)
    np.testing.assert_array_equal(coder.decode(data, count, alphabet), symbols)
    np.testing.assert_array_equal(coder.decode(memoryview(data), count, alphabet), symbols)
    if count == 1000:
        estimate = coder.estimate(np.bincount(symbols, minlength=alphabet))
        assert abs(estimate - len(data)) < 0.05 * len(data) + 0.4 * min(alphabet, count) + 8
        assert abs(coder.measure(np.bincount(symbols, minlength=alphabet)) - len(data)) <= 8
    with pytest.raises(FormatError):
        coder.decode(data + b"\1" * 9, count, alphabet)
