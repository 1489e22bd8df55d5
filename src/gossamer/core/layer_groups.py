"""The groups of a network's layers, by kind.

Within a weight (Wen et al., *Learning Structured Sparsity in Deep Neural Networks*, NIPS 2016,
section 3): ``filter`` W[n], ``channel`` W[:, c], ``shape`` W[:, c, m, k] (a column of the lowered
matrix), ``2d-filter`` W[n, c], ``depth`` (the layer), ``row`` and ``column`` of a matrix; for
kernels that skip them ``block-1xN`` (N input channels of one output) and ``N:M`` (M input
channels, of which N stay). Across weights: ``unit`` of a recurrent layer (Wen et al., *Learning
Intrinsic Sparse Structures within LSTM*, ICLR 2018, figure 3), attention ``head``,
``feed-forward`` unit. Groups that follow a network's graph are :mod:`gossamer.structure`'s.

Channels and shapes of a grouped convolution are counted in each of its parts, as its lowered
matrices are separate. Biases are members of what makes their outputs; penalties leave them out
(:meth:`gossamer.core.groups.Family.weights_only`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.groups import Face, Family, Role
from gossamer.core.tables import near
from gossamer.core.unit_groups import UNITS

__all__ = ["KINDS", "check_kind", "layer_groups"]

_Conv = nn.modules.conv._ConvNd
_BLOCK, _N_OF_M = re.compile(r"block-1x(\d+)"), re.compile(r"(\d+):(\d+)")


class _CannotHave(Exception):
    """Why a layer has no such groups."""


@dataclass(frozen=True)
class _Layer:
    """A weight of two or more dimensions, and the module that owns it."""

    weight: str
    module: nn.Module
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.weight.removesuffix(".weight")

    @property
    def conv(self) -> _Conv:
        if not isinstance(self.module, _Conv):
            raise _CannotHave(f"is of {type(self.module).__name__}, no convolution")
        return self.module

    @property
    def parts(self) -> Tensor:
        """Places of a convolution's weight as (groups, outputs, inputs, positions)."""
        conv, places = self.conv, torch.arange(math.prod(self.shape))
        if conv.transposed:
            shape = (conv.groups, self.shape[0] // conv.groups, self.shape[1], -1)
            return places.view(shape).movedim(1, 2)
        return places.view(conv.groups, self.shape[0] // conv.groups, self.shape[1], -1)

    @property
    def outputs(self) -> int:
        """The axis of a matrix that outputs are along; ``Conv1D`` of transformers has 1."""
        if len(self.shape) != 2:
            raise _CannotHave(f"has {len(self.shape)} dimensions, a matrix has two")
        return int(type(self.module).__name__ == "Conv1D")

    def inputs(self) -> Tensor:
        """(outputs, positions, inputs): places, inputs behind so that they can be cut in runs."""
        if isinstance(self.module, _Conv):
            return self.parts.movedim(2, 3).flatten(0, 1)
        places = torch.arange(math.prod(self.shape)).view(self.shape)
        return (places.T if self.outputs else places)[:, None, :]

    def axis(self, axis: int, role: Role, view: tuple[int, ...] = ()) -> Face:
        """A group for each index along an axis."""
        view = view or self.shape
        each = torch.arange(view[axis])
        return Face(self.weight, self.shape, view, axis, each, each, role)

    def labelled(self, places: Tensor, role: Role) -> Face:
        """Groups of places: (groups, places in each), or -1 for none."""
        groups = torch.arange(len(places))[:, None].expand_as(places)
        there = places >= 0
        whole = (math.prod(self.shape),)
        return Face(self.weight, self.shape, whole, 0, places[there], groups[there], role)

    def bias(self, count: int) -> list[Face]:
        """The bias of a layer with so many outputs, where it has one."""
        bias = getattr(self.module, "bias", None)
        if not isinstance(bias, nn.Parameter) or tuple(bias.shape) != (count,):
            return []
        name, each = f"{self.weight.removesuffix('weight')}bias", torch.arange(count)
        return [Face(name, (count,), (count,), 0, each, each)]

    def family(
        self, kind: str, faces: list[Face], grid: Iterable[int], *, sparse: tuple[int, int] | None
        = None
    ) -> Family:  # fmt: skip
        """Groups that are numbered over a grid."""
        grid, layer = tuple(grid), self.name

        def title(number: int) -> str:
            at = [int(i) for i in torch.unravel_index(torch.tensor(number), grid)]
            return f"{layer} {kind}{at}"

        return Family(kind, layer, math.prod(grid), faces, names=title, sparse=sparse)


def _filters(x: _Layer) -> Family:
    conv = x.conv
    if not conv.transposed:
        face = x.axis(0, "produces")
    elif conv.groups == 1:
        face = x.axis(1, "produces")
    else:
        face = x.labelled(x.parts.flatten(2).flatten(0, 1), "produces")
    return x.family("filter", [face, *x.bias(conv.out_channels)], [conv.out_channels])


def _channels(x: _Layer) -> Family:
    conv = x.conv
    if conv.transposed:
        face = x.axis(0, "consumes")
    elif conv.groups == 1:
        face = x.axis(1, "consumes")
    else:
        face = x.labelled(x.parts.movedim(1, 2).flatten(2).flatten(0, 1), "consumes")
    return x.family("channel", [face], [conv.in_channels])


def _shapes(x: _Layer) -> Family:
    conv = x.conv
    if conv.transposed:
        raise _CannotHave("is a transposed convolution, which is lowered to columns of outputs")
    if conv.groups == 1:
        face = x.axis(1, "consumes", (x.shape[0], math.prod(x.shape[1:])))
    else:
        face = x.labelled(x.parts.movedim(1, 3).flatten(0, 2), "consumes")
    return x.family("shape", [face], [conv.in_channels, *x.shape[2:]])


def _kernels(x: _Layer) -> Family:
    view = (math.prod(x.shape[:2]), math.prod(x.shape[2:]))
    if not isinstance(x.module, _Conv):
        raise _CannotHave(f"is of {type(x.module).__name__}, no convolution")
    return x.family("2d-filter", [x.axis(0, "produces", view)], x.shape[:2])


def _depth(x: _Layer) -> Family:
    size = math.prod(x.shape)
    face = Face(x.weight, x.shape, (1, size), 0, torch.zeros(1, dtype=torch.int64), torch.zeros(
        1, dtype=torch.int64))  # fmt: skip
    biases = [
        Face(b.parameter, b.shape, b.view, 0, b.entries, torch.zeros_like(b.groups))
        for count in {x.shape[0], x.shape[1]}
        for b in x.bias(count)
    ]
    return x.family("depth", [face, *biases], [1])


def _rows(x: _Layer) -> Family:
    face = x.axis(x.outputs, "produces")
    count = x.shape[x.outputs]
    return x.family("row", [face, *x.bias(count)], [count])


def _columns(x: _Layer) -> Family:
    return x.family("column", [x.axis(1 - x.outputs, "consumes")], [x.shape[1 - x.outputs]])


def _blocks(x: _Layer, width: int, sparse: int | None = None) -> Family:
    places = x.inputs()
    missing = -places.shape[-1] % width
    if missing and sparse is not None:
        raise _CannotHave(f"has {places.shape[-1]} inputs to an output, no multiple of {width}")
    padded = nn.functional.pad(places, (0, missing), value=-1)
    face = x.labelled(padded.reshape(-1, width), "produces")
    grid = (*places.shape[:2], padded.shape[-1] // width)
    if sparse is None:
        return x.family(f"block-1x{width}", [face], grid)
    return x.family(f"{sparse}:{width}", [face], grid, sparse=(sparse, width))


_WITHIN: dict[str, Callable[[_Layer], Family]] = {
    "filter": _filters,
    "channel": _channels,
    "shape": _shapes,
    "2d-filter": _kernels,
    "depth": _depth,
    "row": _rows,
    "column": _columns,
}
KINDS = (*_WITHIN, "block-1x4", "2:4", *UNITS)
"""The kinds of groups; of ``block-1xN`` and ``N:M`` any N from 1 and M above N."""


def _builder(kind: str) -> Callable[[_Layer], Family]:
    if kind in _WITHIN:
        return _WITHIN[kind]
    if (found := _BLOCK.fullmatch(kind)) and int(found[1]) > 0:
        return partial(_blocks, width=int(found[1]))
    if (found := _N_OF_M.fullmatch(kind)) and 0 < int(found[1]) < int(found[2]):
        return partial(_blocks, width=int(found[2]), sparse=int(found[1]))
    raise ArgumentError(
        f"groups {kind!r} is not one of {', '.join(KINDS)} (or block-1xN, N:M with N under M)"
        + near(kind, KINDS)
    )


def check_kind(kind: str) -> None:
    """Raise :class:`ArgumentError` for an unknown kind."""
    if kind not in UNITS:
        _builder(kind)


def layer_groups(
    model: nn.Module,
    kind: str,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    consumers: Mapping[str, str | Iterable[str]] | None = None,
) -> list[Family]:
    """The groups of a kind, a family a weight (or a recurrent layer, attention, feed-forward).

    Args:
        kind: one of :data:`KINDS`.
        include, exclude: patterns as in :func:`gossamer.core.names.select`. Without ``include``
            layers that cannot have such groups are left out; with it they are refused.
        consumers: of kind ``unit``: name of a recurrent layer -> the layers that read its
            outputs, whose columns belong to its units.

    >>> [str(g) for g in layer_groups(nn.Sequential(nn.Linear(2, 1)), "row")[0]]
    ['0 row[0]: 0.weight[0], 0.bias[0]']

    Raises :class:`ArgumentError` for an unknown kind, a pattern that matches nothing, a layer
    that was named and cannot have such groups, or when no layer has any.
    """
    check_kind(kind)
    if consumers and kind != "unit":
        raise ArgumentError(f"consumers are of groups 'unit', not of {kind!r}; leave them out")
    chosen = names.weights(model, include=include, exclude=exclude)
    found: list[Family] = []
    if kind in UNITS:
        found = UNITS[kind](model, set(chosen), consumers or {})
        inside = {name for family in found for name in family.parameters}
        left = [name for name in chosen if name not in inside]
        if include is not None and left:
            raise ArgumentError(f"{left[0]} has no groups {kind!r}; exclude it")
    else:
        build, owners = _builder(kind), _owners(model)
        for name, parameter in chosen.items():
            try:
                found.append(build(_Layer(name, owners[name], tuple(parameter.shape))))
            except _CannotHave as e:
                if include is not None:
                    raise ArgumentError(
                        f"{name} has no groups {kind!r}: it {e}; exclude it"
                    ) from None
    if not found:
        raise ArgumentError(
            f"no layer has groups {kind!r}; weights are: {', '.join([*chosen][:40])}"
        )
    return found


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """Clean name of each parameter -> the module that computes with it."""
    known = names.cleaned(model)
    found: dict[str, nn.Module] = {}
    for prefix, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            found.setdefault(known[f"{prefix}.{leaf}".lstrip(".")], module)
    return found
