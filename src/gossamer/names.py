"""Clean parameter names and the selection of layers by glob, regular expression or type.

Parametrized modules store ``parametrizations.weight.original``, compiled and distributed ones
prefix ``_orig_mod.`` or ``module.``; none of these reach a user: every table, file and recipe
speaks of ``layer.weight``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gossamer.errors import ArgumentError

__all__ = [
    "Tensors",
    "clean",
    "clean_state_dict",
    "ends",
    "parameters",
    "select",
    "snapshot",
    "tensors",
    "tied",
    "weights",
]

Tensors = dict[str, Tensor]

_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|module|_fsdp_wrapped_module)(?=\.)")
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original0?$")
_BESIDE = re.compile(r"(^|\.)parametrizations\.([^.]+)\.\d+\.(?=[^.]+$)")  # a step size, a mask

# The modules whose weights compress by default: everything that multiplies.
_WEIGHTED = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNCellBase,
)


def clean(name: str) -> str:
    """Return the user-facing name of a parameter.

    >>> clean("module.net.0.parametrizations.weight.original")
    'net.0.weight'
    >>> clean("_orig_mod.fc.bias")
    'fc.bias'
    >>> clean("fc.parametrizations.weight.0.scales")
    'fc.weight.scales'
    """
    name = _BESIDE.sub(r"\1\2.", _PARAMETRIZED.sub(r"\1\2", name))
    previous = None
    while previous != name:
        previous, name = name, _WRAPPERS.sub(r"\1", name).replace("..", ".").lstrip(".")
    return name


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Clean name -> parameter, in definition order; a tied parameter once, under its first name."""
    return {clean(name): p for name, p in model.named_parameters()}


def tensors(model: nn.Module) -> Tensors:
    """All parameters and buffers by clean name, detached; writing to one writes to the model."""
    buffers = {clean(name): b for name, b in model.named_buffers()}
    return {**{name: p.detach() for name, p in parameters(model).items()}, **buffers}


def snapshot(model: nn.Module) -> Tensors:
    """A copy of all parameters and buffers by clean name, on the CPU."""
    return {name: t.detach().cpu().clone() for name, t in tensors(model).items()}


def tied(model: nn.Module) -> dict[str, str]:
    """Alias -> canonical name, for parameters (and buffers) that share one tensor object.

    >>> net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    >>> net["b"].weight = net["a"].weight
    >>> tied(net)
    {'b.weight': 'a.weight'}
    """
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    for name, tensor in named:
        canonical = first.setdefault(id(tensor), clean(name))
        if canonical != clean(name):
            aliases[clean(name)] = canonical
    return aliases


def clean_state_dict(model: nn.Module) -> Tensors:
    """The state as a user would name it: parametrizations evaluated, wrappers stripped, tied once.

    Tensors are detached and share memory with the model, except parametrized ones, which are
    computed.
    """
    aliases = tied(model)
    state: Tensors = {}
    for prefix, module in model.named_modules():
        lists = getattr(module, "parametrizations", None)
        if lists is not None:
            for attribute in lists:
                with torch.no_grad():
                    state[clean(f"{prefix}.{attribute}".lstrip("."))] = getattr(
                        module, attribute
                    ).detach()
    ordered: Tensors = {}
    for name, value in model.state_dict().items():
        if ".parametrizations." in f".{name}":
            name = clean(re.sub(r"\.original\d*$", ".original", name))
            if name in state:
                ordered.setdefault(name, state[name])
            continue
        if isinstance(value, Tensor) and clean(name) not in aliases:
            ordered[clean(name)] = value.detach()
    return ordered


def weights(
    model: nn.Module,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> dict[str, nn.Parameter]:
    """The compressible weights: parameters of two or more dimensions in layers that multiply.

    Linear, convolution (grouped and transposed too), recurrent and attention weights; biases,
    batch-norm and embeddings stay out unless ``include`` names them. Definition order; tied
    weights once. An embedding tied to a linear layer counts as the linear layer's weight.

    ``include`` / ``exclude``: patterns as in :func:`select`, over parameter names.
    Raises :class:`ArgumentError` when a pattern matches nothing.
    """
    everything = parameters(model)
    by_id = {id(p): name for name, p in everything.items()}
    if include is not None:
        chosen = set(select(everything, include))
    else:
        chosen = set()
        for module in model.modules():
            if isinstance(module, _WEIGHTED):
                for p in module.parameters():
                    if p.ndim >= 2 and id(p) in by_id:
                        chosen.add(by_id[id(p)])
    if exclude is not None:
        chosen -= set(select(everything, exclude))
    return {name: p for name, p in everything.items() if name in chosen}


def ends(model: nn.Module) -> list[str]:
    """The compressible weights of the first and of the last layer that has any.

    In definition order, which is the order of use in most networks. Published few-bit networks
    keep these two in floating point.

    >>> ends(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)))
    ['0.weight', '2.weight']
    """
    found = list(weights(model))
    layers = [name.rpartition(".")[0] for name in found]
    return [n for n, layer in zip(found, layers, strict=True) if layer in (layers[0], layers[-1])]


def select(names: Mapping[str, object] | Iterable[str], patterns: str | Iterable[str]) -> list[str]:
    """Names that match any pattern, in the order of ``names``.

    A pattern is an exact name, a layer name (``conv1`` means ``conv1.weight`` where that exists,
    else everything below it), a glob (``layer*.weight``), or ``re:`` and a regular expression
    that must match the whole name.

    >>> select(["conv1.weight", "conv1.bias", "fc.weight"], ["conv1", "re:f.*"])
    ['conv1.weight', 'fc.weight']

    Raises :class:`ArgumentError` for a pattern that matches nothing, naming what there is.
    """
    pool = list(names)
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        if pattern.startswith("re:"):
            try:
                hits = [n for n in pool if re.fullmatch(pattern[3:], n)]
            except re.error as e:
                raise ArgumentError(
                    f"layer pattern {pattern!r} is no regular expression: {e}"
                ) from e
        elif pattern in pool:
            hits = [pattern]
        elif f"{pattern}.weight" in pool:
            hits = [f"{pattern}.weight"]
        else:
            hits = [n for n in pool if fnmatch.fnmatchcase(n, pattern)]
            # a glob over layer names: "layer1.*" style patterns may also mean ".weight"
            hits = hits or [n for n in pool if fnmatch.fnmatchcase(n, f"{pattern}.weight")]
            hits = hits or [n for n in pool if n.startswith(f"{pattern}.")]
        if not hits:
            raise ArgumentError(
                f"layer pattern {pattern!r} matches nothing; names are: {', '.join(pool[:40])}"
                + (" ..." if len(pool) > 40 else "")
            )
        found.update(hits)
    return [n for n in pool if n in found]
