"""Groups across weights: recurrent units, attention heads, feed-forward units.

A unit of an LSTM or GRU (intrinsic sparse structures): its row in each gate of both weights, its
column of the recurrent weight, and its column of whatever reads the layer's outputs. In torch's
layout (gates * hidden, inputs) the paper's columns are rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.groups import Face, Family, Role

__all__ = ["UNITS", "attention_heads", "feed_forward_units"]

_GATES = {"LSTM": 4, "GRU": 3}


def _face(
    tensors: Mapping[str, Tensor], name: str, axis: int, groups: Tensor, role: Role, first: int = 0
) -> list[Face]:
    """``groups[i]`` owns index ``first + i`` along an axis; nothing where there is no tensor."""
    if name not in tensors:
        return []
    shape = tuple(tensors[name].shape)
    return [Face(name, shape, shape, axis, torch.arange(first, first + len(groups)), groups, role)]


def _join(layer: str, leaf: str) -> str:
    return f"{layer}.{leaf}" if layer else leaf


def _named(model: nn.Module) -> dict[str, nn.Module]:
    return {"": model, **names.modules(model)}


def _recurrent(
    model: nn.Module, chosen: set[str], consumers: Mapping[str, str | Iterable[str]]
) -> list[Family]:
    tensors, modules = names.parameters(model), _named(model)
    made, recurrent = list[Family](), set[str]()
    for layer, module in modules.items():
        gates = next((g for k, g in _GATES.items() if type(module).__name__ in (k, f"{k}Cell")), 0)
        if not gates or not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        if getattr(module, "proj_size", 0):
            if any(_join(layer, n) in chosen for n, _ in module.named_parameters()):
                raise ArgumentError(
                    f"{layer}: proj_size={module.proj_size} separates units from outputs, so its "
                    "units are no groups; exclude it"
                )
            continue
        single = isinstance(module, nn.RNNCellBase)
        recurrent.add(layer)
        layers: int = 1 if isinstance(module, nn.RNNCellBase) else module.num_layers
        ways = [""] if single or not module.bidirectional else ["", "_reverse"]
        for depth in range(layers):
            for side, way in enumerate(ways):
                own = "" if single else f"_l{depth}{way}"
                weight = _join(layer, f"weight_ih{own}")
                if weight not in chosen:
                    continue
                size, first = module.hidden_size, side * module.hidden_size
                units, rows = torch.arange(size), torch.arange(size).repeat(gates)
                faces = _face(tensors, weight, 0, rows, "produces")
                faces += _face(tensors, _join(layer, f"weight_hh{own}"), 0, rows, "produces")
                faces += _face(tensors, _join(layer, f"weight_hh{own}"), 1, units, "consumes")
                faces += _face(tensors, _join(layer, f"bias_ih{own}"), 0, rows, "produces")
                faces += _face(tensors, _join(layer, f"bias_hh{own}"), 0, rows, "produces")
                if depth + 1 < layers:
                    for other in ways:
                        after = _join(layer, f"weight_ih_l{depth + 1}{other}")
                        faces += _face(tensors, after, 1, units, "consumes", first)
                else:
                    for after in _readers(layer, len(ways) * size, consumers, modules, tensors):
                        faces += _face(tensors, after, 1, units, "consumes", first)
                title = f"{layer}{own}" if layer else own.lstrip("_") or "unit"
                made.append(Family("unit", title, size, faces))
    unknown = sorted(set(consumers) - recurrent)
    if unknown:
        raise ArgumentError(
            f"consumers names {unknown[0]!r}, which is no recurrent layer; there are: "
            + ", ".join(sorted(recurrent))
        )
    return made


def _readers(
    layer: str,
    width: int,
    consumers: Mapping[str, str | Iterable[str]],
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
) -> list[str]:
    """The weights whose columns read a layer's outputs."""
    given = consumers.get(layer, ())
    found = []
    for name in [given] if isinstance(given, str) else given:
        module = modules.get(name)
        if isinstance(module, nn.RNNBase):
            leaves = ["weight_ih_l0", *["weight_ih_l0_reverse"] * module.bidirectional]
        else:
            leaves = ["weight_ih" if isinstance(module, nn.RNNCellBase) else "weight"]
        for weight in (_join(name, leaf) for leaf in leaves):
            shape = tuple(tensors[weight].shape) if weight in tensors else None
            if shape is None or len(shape) != 2 or shape[1] != width:
                raise ArgumentError(
                    f"consumers[{layer!r}]: {name!r} has no matrix of {width} columns "
                    f"({'no such weight' if shape is None else shape}); name what reads its outputs"
                )
            found.append(weight)
    return found


def _heads(
    model: nn.Module, chosen: set[str], _: Mapping[str, str | Iterable[str]]
) -> list[Family]:
    tensors, made = names.parameters(model), []
    for layer, module in _named(model).items():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        output = _join(layer, "out_proj.weight")
        if output not in chosen:
            continue
        heads = torch.arange(module.num_heads).repeat_interleave(module.head_dim)
        faces = _face(tensors, _join(layer, "in_proj_weight"), 0, heads.repeat(3), "produces")
        for leaf in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            faces += _face(tensors, _join(layer, leaf), 0, heads, "produces")
        faces += _face(tensors, _join(layer, "in_proj_bias"), 0, heads.repeat(3), "produces")
        for leaf in ("bias_k", "bias_v"):
            faces += _face(tensors, _join(layer, leaf), 2, heads, "produces")
        faces += _face(tensors, output, 1, heads, "consumes")
        made.append(Family("head", layer or "attention", module.num_heads, faces))
    return made


def _outputs(model: nn.Module, layer: str, groups: Tensor) -> list[Face]:
    """Weight and bias of a linear layer (or ``Conv1D``), by output."""
    tensors, axis = names.parameters(model), int(_is_conv1d(model, layer))
    weight = _matrix(tensors, layer)
    if tensors[weight].shape[axis] != len(groups):
        raise ArgumentError(
            f"{layer!r} has {tensors[weight].shape[axis]} outputs, not {len(groups)}"
        )
    return [
        *_face(tensors, weight, axis, groups, "produces"),
        *_face(tensors, _join(layer, "bias"), 0, groups, "produces"),
    ]


def _inputs(model: nn.Module, layer: str, groups: Tensor) -> list[Face]:
    tensors, axis = names.parameters(model), 1 - int(_is_conv1d(model, layer))
    weight = _matrix(tensors, layer)
    if tensors[weight].shape[axis] != len(groups):
        raise ArgumentError(
            f"{layer!r} reads {tensors[weight].shape[axis]} inputs, not {len(groups)}"
        )
    return _face(tensors, weight, axis, groups, "consumes")


def _is_conv1d(model: nn.Module, layer: str) -> bool:
    """Whether a layer is of transformers' class, whose weight is (inputs, outputs)."""
    return type(_named(model).get(layer)).__name__ == "Conv1D"


def _matrix(tensors: Mapping[str, Tensor], layer: str) -> str:
    """The name of a linear layer's weight."""
    weight = _join(layer, "weight")
    if weight not in tensors or tensors[weight].ndim != 2:
        raise ArgumentError(f"{layer!r} has no matrix; name a linear layer")
    return weight


def attention_heads(
    model: nn.Module,
    *,
    query: str,
    key: str,
    value: str,
    output: str,
    heads: int,
    key_heads: int | None = None,
) -> Family:
    """Heads of an attention made of linear layers.

    With fewer ``key_heads`` than ``heads`` (grouped queries) a group is a key head with the
    queries that share it. One layer named three times makes queries, keys and values in a row.

    Raises :class:`ArgumentError` for layers that do not fit, or heads that do not divide.
    """
    key_heads = heads if key_heads is None else key_heads
    weight = names.parameters(model)[_matrix(names.parameters(model), output)]
    width = weight.shape[1 - int(_is_conv1d(model, output))]
    if min(heads, key_heads) < 1 or heads % key_heads or width % heads:
        raise ArgumentError(
            f"heads={heads} must divide {width}, the inputs of {output}, and be a multiple of "
            f"key_heads={key_heads}"
        )
    groups = torch.arange(key_heads)
    queries = groups.repeat_interleave(width // key_heads)
    keys = groups.repeat_interleave(width // heads)
    if query == key == value:
        faces = _outputs(model, query, torch.cat([queries, keys, keys]))
    else:
        faces = [*_outputs(model, query, queries), *_outputs(model, key, keys)]
        faces += _outputs(model, value, keys)
    faces += _inputs(model, output, queries)
    return Family("head", output.rpartition(".")[0] or output, key_heads, faces)


def feed_forward_units(model: nn.Module, *, up: str | Sequence[str], down: str) -> Family:
    """Units between linear layers; a gated pair names both in ``up``.

    Raises :class:`ArgumentError` for layers that do not fit.
    """
    up = [up] if isinstance(up, str) else list(up)
    weight = names.parameters(model)[_matrix(names.parameters(model), up[0])]
    units = torch.arange(weight.shape[int(_is_conv1d(model, up[0]))])
    faces = [face for name in up for face in _outputs(model, name, units)]
    faces += _inputs(model, down, units)
    return Family("feed-forward", down.rpartition(".")[0] or down, len(units), faces)


def _feed_forward(
    model: nn.Module, chosen: set[str], _: Mapping[str, str | Iterable[str]]
) -> list[Family]:
    kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return [
        feed_forward_units(model, up=_join(layer, "linear1"), down=_join(layer, "linear2"))
        for layer, module in _named(model).items()
        if isinstance(module, kinds) and _join(layer, "linear1.weight") in chosen
    ]


_Units = Callable[[nn.Module, set[str], Mapping[str, str | Iterable[str]]], list[Family]]
UNITS: dict[str, _Units] = {"unit": _recurrent, "head": _heads, "feed-forward": _feed_forward}
"""Kinds whose groups span several weights."""
