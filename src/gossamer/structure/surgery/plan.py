"""What is done to a network, as plain values: a file can tell it, and it can be done again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.structure.lowered import LoweredConv2d
from gossamer.structure.surgery.modules import Constant, Heads, PartOfLayerNorm, Stacked

__all__ = ["Plan", "Replaced", "apply", "fill"]

_CONVS = (nn.modules.conv._ConvNd,)
_NORMS = (nn.modules.batchnorm._NormBase,)


@dataclass(frozen=True)
class Replaced:
    """A module that stands in for another.

    Attributes:
        kind: ``recurrent`` (sizes of the layers, then inputs), ``heads`` (their number, then the
            width of one), ``layer-norm`` (values), ``lowered`` (rows and columns of the matrix),
            ``constant`` (channels, their axis, and how many times shorter the output is) or
            ``identity``.
        sizes: as the kind says.
        kept: of ``lowered``: the rows that are left, then the columns.
    """

    kind: str
    sizes: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How a network's modules differ from those of its class.

    Attributes:
        replaced: module -> what stands there.
        shapes: parameter or buffer -> its shape; a bias that the module did not have, too.
        numbers: module -> attribute -> its value.
        picked: buffer that is not persistent, whose values no file holds -> of each axis the
            entries that are left; () is all of them.
    """

    replaced: Mapping[str, Replaced] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    picked: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As plain values, which a file's metadata hold."""
        found = {"kind": "shrunk", **dataclasses.asdict(self)}
        if not self.picked:  # as files from before there was such a thing
            del found["picked"]
        return found


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Do it, in place; parameters get their new shapes, and zeros, picked buffers their entries.

    Raises :class:`ArgumentError` where the network is not the one that the plan is of; some of it
    may then be done.
    """
    modules = dict(model.named_modules())
    for name, new in plan.replaced.items():
        if new.kind != "lowered":
            _replace(model, modules, name, new)
    modules = dict(model.named_modules())
    for name, shape in plan.shapes.items():
        _reshape(modules, name, tuple(shape), plan.picked.get(name))
    for name, numbers in plan.numbers.items():
        module = modules.get(name)
        for attribute, value in numbers.items():
            old = None if module is None else vars(module).get(attribute)
            if type(old) is not int or not 1 <= value <= old:
                raise ArgumentError(
                    f"the network has no number {name[:100]}.{attribute[:100]} that could be "
                    f"{str(value)[:20]}; it is not the one that was shrunk"
                )
            setattr(module, attribute, value)
    for name in {n.rpartition(".")[0] for n in plan.shapes} | set(plan.numbers):
        _sync(modules[name])
    for name, new in plan.replaced.items():  # of the sizes that are left
        if new.kind == "lowered":
            _replace(model, modules, name, new)
    return model


def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set parameters and buffers."""
    there = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in values.items():
            there[name].copy_(value)


def _replace(model: nn.Module, modules: Mapping[str, nn.Module], name: str, new: Replaced) -> None:
    old = modules.get(name) if name else None
    if old is None:
        raise ArgumentError(f"the network has no module {name[:100]!r}, which was replaced")
    made: nn.Module
    if new.kind == "recurrent" and isinstance(old, nn.RNNBase):
        *sizes, inputs = new.sizes
        if len(sizes) != old.num_layers or max(sizes) > old.hidden_size or inputs > old.input_size:
            raise ArgumentError(f"{name!r} has not the layers that were made smaller")
        made = Stacked(old, sizes, inputs)
    elif new.kind == "heads" and isinstance(old, nn.MultiheadAttention):
        heads, width = new.sizes
        if heads > old.num_heads or width != old.head_dim:
            raise ArgumentError(f"{name!r} has not the heads that were made fewer")
        made = Heads(old, heads, width)
    elif new.kind == "layer-norm" and isinstance(old, nn.LayerNorm) and len(new.sizes) == 1:
        if len(old.normalized_shape) != 1 or new.sizes[0] > old.normalized_shape[0]:
            raise ArgumentError(f"{name!r} has not {new.sizes[0]} values to normalise")
        made = PartOfLayerNorm(old, new.sizes[0])
    elif new.kind == "lowered" and isinstance(old, nn.Conv2d) and len(new.sizes) == 2:
        rows, columns = new.sizes
        if len(new.kept) != rows + columns:
            raise ArgumentError(f"{name!r}: {len(new.kept)} numbers are not {rows} + {columns}")
        kept = torch.tensor(new.kept)
        made = LoweredConv2d(old, kept[:rows], kept[rows:])
    elif new.kind == "identity":
        made = nn.Identity()
    elif new.kind == "constant":
        like: Any = next(iter([*old.parameters(), *old.buffers()]), torch.zeros(()))
        if len(new.sizes) != 3 or new.sizes[0] > max(like.shape, default=1):
            raise ArgumentError(f"{name!r} cannot have given a constant of {new.sizes[:8]}")
        channels, axis, step = new.sizes
        made = Constant(like.new_zeros(channels, dtype=like.dtype), axis, step)
    else:
        raise ArgumentError(f"{name!r} is {type(old).__name__}, and was not replaced like that")
    made.train(old.training)
    parent, _, attribute = name.rpartition(".")
    setattr(modules[parent], attribute, made)


def _picked(old: Tensor, picked: tuple[tuple[int, ...], ...], name: str) -> Tensor:
    """The entries of a buffer that are left."""
    fits = len(picked) == old.ndim and all(
        sorted({*kept}) == [*kept] and all(0 <= i < size for i in kept)
        for kept, size in zip(picked, old.shape, strict=True)
    )
    if not fits:
        raise ArgumentError(
            f"the buffer {name[:100]!r} of shape {tuple(old.shape)} has not the entries that were "
            "left; the network is not the one that was shrunk"
        )
    for axis, kept in enumerate(picked):
        if kept:
            old = old.index_select(axis, torch.tensor(kept, device=old.device))
    return old


def _reshape(
    modules: Mapping[str, nn.Module],
    name: str,
    shape: tuple[int, ...],
    picked: tuple[tuple[int, ...], ...] | None,
) -> None:
    """Another tensor in every place of a parameter or buffer."""
    parent, _, attribute = name.rpartition(".")
    module = modules.get(parent)
    old = None if module is None else getattr(module, attribute, None)
    weight = None if module is None else getattr(module, "weight", None)
    if module is not None and old is None and attribute == "bias" and isinstance(weight, Tensor):
        if not isinstance(module, (nn.Linear, *_CONVS)) or shape != (weight.shape[0],):
            raise ArgumentError(f"{name[:100]!r} cannot be a bias of shape {shape[:8]}")
        made = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        module.bias = nn.Parameter(made)
        return
    fits = isinstance(old, Tensor) and len(shape) == old.ndim
    if (
        not isinstance(old, Tensor)
        or not fits
        or any(not 1 <= s <= o for s, o in zip(shape, old.shape, strict=True))
    ):
        raise ArgumentError(
            f"the network has no tensor {name[:100]!r} that could be made {shape[:8]}; it is not "
            "the one that was shrunk"
        )
    made = torch.zeros(shape, dtype=old.dtype, device=old.device)
    if picked is not None:
        left = _picked(old.detach(), picked, name)
        if left.shape != shape:
            raise ArgumentError(f"{name[:100]!r}: entries of {tuple(left.shape)} are not {shape}")
        made.copy_(left)
    if isinstance(old, nn.Parameter):
        made = nn.Parameter(made, requires_grad=old.requires_grad)
    for place in modules.values():
        for table in (place._parameters, place._buffers):
            for key, tensor in list(table.items()):
                if tensor is old:
                    setattr(place, key, made)


def _sync(module: nn.Module) -> None:
    """The sizes that torch's modules keep beside their tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _CONVS):
        first, second = module.get_parameter("weight").shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, _NORMS):
        tensor = weight if isinstance(weight, Tensor) else module.running_mean
        if isinstance(tensor, Tensor):
            module.num_features = len(tensor)
    elif isinstance(module, nn.GroupNorm) and isinstance(weight, Tensor):
        module.num_channels = len(weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.RNNBase):
        module.hidden_size = module.get_parameter("weight_hh_l0").shape[1]
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
