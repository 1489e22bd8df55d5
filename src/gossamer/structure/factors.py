"""A convolution or linear layer as several smaller ones in a row, whose product is one kernel.

========  =====================================================  =================  ===========
form      factors, of a kernel (d, c, k1, k2)                    ranks              layers
========  =====================================================  =================  ===========
channel   (r, c, k1, k2), then 1 x 1 (d, r)                      r                  all
spatial   (a, c, k1, 1), (r, a, 1, k2), then 1 x 1 (d, r)        a, r (or a: r = d  Conv2d
                                                                 and no 1 x 1)
tucker    1 x 1 (r_in, c), (r_out, r_in, k1, k2), 1 x 1          r_out, r_in        Conv1d-3d
          (d, r_out)
cp        1 x 1 (r, c), one kernel an axis, a channel for        r                  Conv1d-3d
          itself, 1 x 1 (d, r)
========  =====================================================  =================  ===========

Sources: Zhang et al. (arXiv:1505.06798) and Denton et al. 2014 for channel; Jaderberg et al.,
BMVC 2014, in the closed form of Tai et al., ICLR 2016, for spatial, its 1 x 1 after Zhang et al.
section 3.4; Kim et al., ICLR 2016, for Tucker-2; Lebedev et al., ICLR 2015, for CP. Tucker and CP
are computed by tensorly (``pip install 'gossamer[lowrank]'``).

Only the last factor has a bias, so padding commutes with all before it, whatever its mode.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core import access
from gossamer.core.errors import ArgumentError

__all__ = [
    "CONVOLUTIONS",
    "FORMS",
    "Form",
    "build",
    "check_layer",
    "composed",
    "decompose",
    "fill",
    "macs",
    "matrix",
    "parameters",
    "spectrum",
]

Form = Literal["channel", "spatial", "tucker", "cp"]
FORMS: tuple[Form, ...] = ("channel", "spatial", "tucker", "cp")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RANKS = {"channel": (1,), "spatial": (1, 2), "tucker": (2,), "cp": (1,)}


@dataclass(frozen=True)
class _Factor:
    """One layer of the row; ``axes``: along which its kernel runs, elsewhere it is 1."""

    outputs: int
    inputs: int
    groups: int
    axes: tuple[int, ...]


def check_layer(layer: nn.Module, name: str = "the layer") -> None:
    """Raise :class:`ArgumentError` for what cannot be factorized: another module, groups, a
    weight that is computed or not finite.
    """
    access.check_plain(layer, name, "factorized")
    if type(layer) is not nn.Linear and type(layer) not in CONVOLUTIONS:
        raise ArgumentError(
            f"{name} is {type(layer).__name__}; an nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d "
            "can be factorized"
        )
    if getattr(layer, "groups", 1) != 1:
        raise ArgumentError(f"{name} has {layer.groups} groups; only groups=1 can be factorized")
    values = [p for p in (layer.weight, layer.bias) if isinstance(p, Tensor)]
    if not all(bool(torch.isfinite(p).all()) for p in values):
        raise ArgumentError(f"the weight or bias of {name} holds NaN or infinity; clean it first")


def matrix(layer: Any) -> Tensor:
    """The kernel as (d, c * taps), float64, detached."""
    weight: Tensor = layer.weight.detach().double()
    return weight.flatten(1)


def _plan(layer: Any, form: str, ranks: Sequence[int]) -> list[_Factor]:
    """The factors; raises :class:`ArgumentError` for ranks that the layer cannot have."""
    d, c, *kernel = layer.weight.shape
    every = tuple(range(len(kernel)))
    if form not in _RANKS or len(ranks) not in _RANKS[form]:
        raise ArgumentError(f"form {str(form)[:20]!r} with {len(ranks)} ranks is none of {_RANKS}")
    if form != "channel" and type(layer) not in CONVOLUTIONS:
        raise ArgumentError(f"form {form!r} is of convolutions; a linear layer has form 'channel'")
    if form == "spatial" and len(kernel) != 2:
        raise ArgumentError("form 'spatial' is of nn.Conv2d")
    most = {
        "channel": (d,),
        "spatial": () if form != "spatial" else (min(c * kernel[0], d * kernel[1]), d),
        "tucker": (d, c),
        "cp": (layer.weight.numel() // max(layer.weight.shape),),
    }[form]
    for rank, limit in zip(ranks, most, strict=False):
        if not 1 <= rank <= limit:
            raise ArgumentError(
                f"rank {str(rank)[:20]} is outside 1 to {limit} for form {form!r} of a kernel "
                f"{tuple(layer.weight.shape)}"
            )
    r = ranks[0]
    if form == "channel":
        return [_Factor(r, c, 1, every), _Factor(d, r, 1, ())]
    if form == "spatial":
        if len(ranks) == 1:
            return [_Factor(r, c, 1, (0,)), _Factor(d, r, 1, (1,))]
        last = _Factor(d, ranks[1], 1, ())
        return [_Factor(r, c, 1, (0,)), _Factor(ranks[1], r, 1, (1,)), last]
    if form == "tucker":
        inner = ranks[1]
        return [_Factor(inner, c, 1, ()), _Factor(r, inner, 1, every), _Factor(d, r, 1, ())]
    return [_Factor(r, c, 1, ()), *(_Factor(r, r, r, (i,)) for i in every), _Factor(d, r, 1, ())]


def _weights(factor: _Factor, kernel: Sequence[int]) -> int:
    return (
        factor.outputs * factor.inputs // factor.groups * math.prod(kernel[i] for i in factor.axes)
    )


def parameters(layer: Any, form: str, ranks: Sequence[int], *, bias: bool) -> int:
    """Exact number of parameters of the factors.

    >>> parameters(nn.Conv2d(64, 64, 3), "channel", (16,), bias=True)  # 16 * 64 * 9 + 64 * 16 + 64
    10304
    """
    kernel = layer.weight.shape[2:]
    plan = _plan(layer, form, ranks)
    return sum(_weights(f, kernel) for f in plan) + (len(layer.weight) if bias else 0)


def macs(
    layer: Any,
    form: str | None,
    ranks: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
) -> int:
    """Exact multiply-adds of one example; zeros of the padding count, additions of a bias do not.

    Args:
        form: None: of the layer as it is.
        before, after: positions of the layer's input and output along each axis of a convolution
            (H, W); of a linear layer both are its positions, mostly ``()``.

    >>> macs(nn.Conv2d(8, 8, 3, padding=1), None, (), (4, 4), (4, 4))
    9216
    """
    kernel = layer.weight.shape[2:]
    if form is None:
        return int(layer.weight.numel()) * math.prod(after)
    total, done = 0, set[int]()
    for factor in _plan(layer, form, ranks):
        done |= set(factor.axes)
        if kernel:
            places = math.prod(after[i] if i in done else before[i] for i in range(len(kernel)))
        else:
            places = math.prod(after)
        total += _weights(factor, kernel) * places
    return total


def build(layer: Any, form: str, ranks: Sequence[int], *, bias: bool) -> nn.Sequential:
    """The factors as modules, of the layer's dtype, device and mode; values are to be filled in.

    Raises :class:`ArgumentError` for ranks that the layer cannot have.
    """
    made: list[nn.Module] = []
    plan = _plan(layer, form, ranks)
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    for number, factor in enumerate(plan):
        last = bias and number == len(plan) - 1
        if type(layer) is nn.Linear:
            made.append(nn.Linear(factor.inputs, factor.outputs, bias=last, **like))
            continue

        def along(values: Sequence[int], rest: int, axes: tuple[int, ...] = factor.axes) -> Any:
            return tuple(v if i in axes else rest for i, v in enumerate(values))

        padding = layer.padding if isinstance(layer.padding, str) else along(layer.padding, 0)
        inner: dict[str, Any] = {"padding_mode": layer.padding_mode} if factor.axes else {}
        made.append(
            type(layer)(
                factor.inputs,
                factor.outputs,
                along(layer.kernel_size, 1),
                stride=along(layer.stride, 1),
                padding=padding if factor.axes else 0,
                dilation=along(layer.dilation, 1),
                groups=factor.groups,
                bias=last,
                **inner,
                **like,
            )
        )
    return nn.Sequential(*made).train(layer.training)


@torch.no_grad()
def fill(made: nn.Sequential, kernels: Sequence[Tensor], bias: Tensor | None) -> nn.Sequential:
    """Set the factors' kernels, each in any shape of its size, and the last one's bias."""
    for module, kernel in zip(made, kernels, strict=True):
        assert isinstance(module.weight, Tensor)
        module.weight.copy_(kernel.reshape(module.weight.shape))
    if bias is not None:
        assert isinstance(made[-1].bias, Tensor)
        made[-1].bias.copy_(bias)
    return made


def composed(made: nn.Sequential) -> Tensor:
    """The one kernel that the factors compute, float64."""
    total: Tensor | None = None
    for module in made:
        assert isinstance(module.weight, Tensor)
        kernel = module.weight.detach().double()
        if total is None:
            total = kernel
        elif getattr(module, "groups", 1) > 1:  # a channel for itself
            total = kernel * total
        else:  # an axis has taps in one of the two, and 1 in the other
            total = torch.einsum("om...,mi...->oi...", kernel, total)
    assert total is not None
    return total


def decompose(layer: nn.Module, form: str, ranks: Sequence[int], *, seed: int = 0) -> nn.Sequential:
    """The layer as factors by its weights alone; the layer stays as it is.

    ``channel`` and ``spatial`` are the closest in the Frobenius norm; ``tucker`` and ``cp`` are
    what tensorly's iterations reach (``seed``: of those).

    Raises :class:`ArgumentError` for a layer or ranks that do not fit, and where tensorly is
    needed and not there.
    """
    check_layer(layer)
    this: Any = layer
    bias = None if this.bias is None else this.bias.detach()
    made = build(this, form, ranks, bias=bias is not None)
    weight = this.weight.detach().double().cpu()
    if form == "channel":
        kernels = _shared_svd(weight.flatten(1), ranks[0])
    elif form == "spatial":
        kernels = _spatial(weight, ranks)
    else:
        kernels = _tensorly(weight, form, ranks, seed)
    return fill(made, kernels, bias)


def spectrum(layer: Any, side: Literal["outputs", "inputs", "spatial"]) -> Tensor:
    """Squared singular values of a kernel's matrix: by output, by input channel, or separable."""
    weight = layer.weight.detach().double()
    if side == "inputs":
        weight = weight.movedim(1, 0)
    elif side == "spatial":
        weight = _separable(weight)
    return torch.linalg.svdvals(weight.flatten(1)).square()


def _separable(weight: Tensor) -> Tensor:
    """(d, c, k1, k2) as (d k2, c k1)."""
    d, c, k1, k2 = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(d * k2, c * k1)


def _shared_svd(values: Tensor, rank: int) -> list[Tensor]:
    """(rank, columns) and (rows, rank), the singular values shared evenly."""
    u, s, v = torch.linalg.svd(values, full_matrices=False)
    if rank > len(s):  # more outputs than inputs: the rest of the rank has nothing to hold
        pad = rank - len(s)
        u, v = nn.functional.pad(u, (0, pad)), nn.functional.pad(v, (0, 0, 0, pad))
        s = nn.functional.pad(s, (0, pad))
    half = s[:rank].sqrt()
    return [half[:, None] * v[:rank], u[:, :rank] * half]


def _spatial(weight: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    d, _, _, k2 = weight.shape
    vertical, other = _shared_svd(_separable(weight), ranks[0])
    # rows of ``other`` are (d, k2): the horizontal kernel is (d, a, 1, k2)
    horizontal = other.reshape(d, k2, ranks[0]).movedim(1, 2)
    if len(ranks) == 1:
        return [vertical, horizontal]
    return [vertical, *_shared_svd(horizontal.flatten(1), ranks[1])]


def _tensorly(weight: Tensor, form: str, ranks: Sequence[int], seed: int) -> list[Tensor]:
    try:
        from tensorly.decomposition import parafac, partial_tucker
    except ImportError as e:
        raise ArgumentError(f"form {form!r} needs tensorly; pip install 'gossamer[lowrank]'") from e
    values = weight.numpy()
    with warnings.catch_warnings():  # of ranks above a side's length, which it handles
        warnings.simplefilter("ignore", UserWarning)
        if form == "tucker":
            (core, (out, inner)), _ = partial_tucker(
                values, rank=list(ranks), modes=[0, 1], n_iter_max=100, tol=1e-9, random_state=seed
            )
            return [torch.tensor(inner.T), torch.tensor(core), torch.tensor(out)]
        scales, (out, inner, *taps) = parafac(
            values, rank=ranks[0], n_iter_max=200, tol=1e-9, init="svd", random_state=seed
        )
    first = torch.tensor(inner).T
    return [first, *(torch.tensor(t).T for t in taps), torch.tensor(out * scales)]
