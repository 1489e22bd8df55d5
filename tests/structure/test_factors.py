"""Factors of one kernel: the kernel at full rank, the closest below, exact counts."""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.structure.factors import build, composed, decompose, macs, parameters, spectrum

tensorly = importlib.util.find_spec("tensorly") is not None
needs_tensorly = pytest.mark.skipif(not tensorly, reason="tensorly is not installed")

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "tokens": (lambda: nn.Linear(7, 5, bias=False), (3, 7)),
    "line": (lambda: nn.Conv1d(3, 6, 5, stride=2, padding=2, dilation=2), (3, 20)),
    "image": (lambda: nn.Conv2d(3, 6, (3, 5), stride=(2, 1), padding=(1, 2)), (3, 9, 8)),
    "same": (lambda: nn.Conv2d(4, 5, 3, padding="same", dilation=2, bias=False), (4, 9, 8)),
    "circular": (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), (4, 6, 7)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(0, 1), padding_mode="reflect"), (4, 6, 7)),
    "replicate": (lambda: nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate"), (2, 5, 4, 5)),
    "volume": (lambda: nn.Conv3d(2, 4, (1, 3, 2), stride=(1, 2, 1)), (2, 4, 7, 5)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 3, 3)),
}
FULL = {
    "channel": lambda s: (s[0],),
    "spatial": lambda s: (min(s[1] * s[2], s[0] * s[3]), s[0]),
    "jaderberg": lambda s: (min(s[1] * s[2], s[0] * s[3]),),
    "tucker": lambda s: (s[0], s[1]),
}


def counted(layer: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of the modules below, by what they really put out."""
    total = 0

    def seen(module: Any, args: Any, out: torch.Tensor) -> None:
        nonlocal total
        total += module.weight.numel() * out[0].numel() // len(module.weight)

    hooks = [m.register_forward_hook(seen) for m in layer.modules() if hasattr(m, "weight")]
    layer(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("form", FULL)
@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_is_the_layer_and_counts_are_exact(name: str, form: str) -> None:
    make, shape = LAYERS[name]
    layer = make()
    size = layer.weight.shape
    kind = form.replace("jaderberg", "spatial")
    if kind == "spatial" and len(size) != 4:
        pytest.skip("of images")
    if kind == "tucker" and (len(size) == 2 or not tensorly):
        pytest.skip("of convolutions, by tensorly")
    x = torch.randn(2, *shape)
    ranks = FULL[form](size)
    made = decompose(layer, kind, ranks)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(composed(made).float(), layer.weight.detach(), rtol=1e-5, atol=1e-5)
    for some in (ranks, tuple(max(1, r // 2) for r in ranks)):
        half = build(layer, kind, some, bias=layer.bias is not None)
        assert sum(p.numel() for p in half.parameters()) == parameters(
            layer, kind, some, bias=layer.bias is not None
        )
        out = layer(x)
        before, after = (
            (x.shape[1:-1], out.shape[1:-1]) if len(size) == 2 else (x.shape[2:], out.shape[2:])
        )
        assert macs(layer, kind, some, before, after) == counted(half, x)
        assert macs(layer, None, (), before, after) == counted(nn.Sequential(layer), x)


@needs_tensorly
@pytest.mark.parametrize("name", ["line", "image", "volume"])
def test_cp_counts_are_exact_and_more_rank_is_nearer(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x, errors = make(), torch.randn(2, *shape), []
    for rank in (1, 2, 6):
        made = decompose(layer, "cp", (rank,))
        assert sum(p.numel() for p in made.parameters()) == parameters(
            layer, "cp", (rank,), bias=True
        )
        assert macs(layer, "cp", (rank,), x.shape[2:], layer(x).shape[2:]) == counted(made, x)
        assert composed(made).shape == layer.weight.shape
        errors.append(float((composed(made) - layer.weight.detach()).norm()))
    assert errors[0] > errors[1] > errors[2]


def test_less_rank_loses_what_the_singular_values_say() -> None:
    layer = nn.Conv2d(4, 6, 3)
    for form, side in (("channel", "outputs"), ("spatial", "spatial")):
        values = spectrum(layer, side)  # type: ignore[arg-type]
        for rank in (1, 3, 5):
            lost = (
                (composed(decompose(layer, form, (rank,))) - layer.weight.detach()).square().sum()
            )
            assert float(lost) == pytest.approx(float(values[rank:].sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("layer", "form", "ranks", "error"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "channel", (2,), "2 groups"),
        (nn.ConvTranspose2d(4, 4, 3), "channel", (2,), "ConvTranspose2d"),
        (nn.Linear(4, 4), "spatial", (2, 2), "of convolutions"),
        (nn.Conv1d(4, 4, 3), "spatial", (2, 2), "of nn.Conv2d"),
        (nn.Conv2d(4, 4, 3), "channel", (5,), "rank 5 is outside 1 to 4"),
        (nn.Conv2d(4, 4, 3), "channel", (0,), "rank 0 is outside"),
        (nn.Conv2d(4, 4, 3), "tucker", (2,), "with 1 ranks"),
        (nn.Conv2d(4, 4, 3), "tucker", (2, 5), "outside 1 to 4"),
        (nn.Conv2d(4, 4, 3), "cp", (37,), "outside 1 to 36"),
        (nn.Conv2d(4, 4, 3), "other", (3,), "is none of"),
    ],
)
def test_what_does_not_fit_is_refused(layer: nn.Module, form: str, ranks: Any, error: str) -> None:
    with pytest.raises(ArgumentError, match=error):
        decompose(layer, form, ranks)


def test_values_that_are_none_and_weights_that_are_computed() -> None:
    layer = nn.Conv2d(2, 2, 3)
    with torch.no_grad():
        layer.bias[0] = math.inf
    with pytest.raises(ArgumentError, match="NaN or infinity"):
        decompose(layer, "channel", (1,))
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
    with pytest.raises(ArgumentError, match="computed"):
        decompose(normed, "channel", (1,))


@pytest.mark.skipif(tensorly, reason="tensorly is installed")
def test_without_tensorly_the_extra_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"gossamer\[lowrank\]"):
        decompose(nn.Conv2d(4, 4, 3), "tucker", (2, 2))
