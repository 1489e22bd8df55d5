"""Clean parameter names and the selection of layers by glob, regular expression or type.

Parametrized modules store ``parametrizations.weight.original``, compiled and distributed ones
prefix ``_orig_mod.`` or ``module.`` (:mod:`gossamer.core.places`); none of these reach a user:
every table, file and recipe speaks of ``layer.weight``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.core import access
from gossamer.core.errors import ArgumentError
from gossamer.core.places import join, walk
from gossamer.core.regular import Regular

__all__ = [
    "Tensors",
    "clean",
    "clean_state_dict",
    "cleaned",
    "ends",
    "matrices",
    "modules",
    "parameters",
    "select",
    "snapshot",
    "tensors",
    "tied",
    "weights",
]

Tensors = dict[str, Tensor]

_RESERVED = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
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
# The same of other libraries, by class (a name, so that nothing is imported for it).
_WEIGHTED_ELSEWHERE = ("transformers.pytorch_utils.Conv1D",)


def _multiplies(module: nn.Module) -> bool:
    """Whether a module's matrices are weights; one that was made from a graph says so itself."""
    if isinstance(module, _WEIGHTED) or getattr(module, "multiplies", False) is True:
        return True
    return any(
        f"{k.__module__}.{k.__qualname__}" in _WEIGHTED_ELSEWHERE for k in type(module).__mro__
    )


def clean(name: str) -> str:
    """The user-facing name of a parameter, as far as the name alone tells.

    Only marks that torch reserves are taken off. A leading ``module.`` stays: it may be a
    submodule's own name. With the model at hand, :func:`cleaned` knows.

    >>> clean("net.0.parametrizations.weight.original")
    'net.0.weight'
    >>> clean("_orig_mod.fc.bias"), clean("module.fc.bias")
    ('fc.bias', 'module.fc.bias')
    >>> clean("fc.parametrizations.weight.0.scales")
    'fc.weight.scales'
    """
    name = _BESIDE.sub(r"\1\2.", _PARAMETRIZED.sub(r"\1\2", name))
    previous = None
    while previous != name:
        previous, name = name, _RESERVED.sub(r"\1", name).replace("..", ".").lstrip(".")
    return name


class Cleaned(dict[str, str]):
    """torch's name -> clean name; a name that only ``state_dict`` knows, by its module's."""

    def __missing__(self, raw: str) -> str:
        head, _, leaf = raw.rpartition(".")
        return join(self[head], leaf) if head else raw


def cleaned(model: nn.Module) -> Cleaned:
    """torch's name -> clean name, of every module, parameter and buffer in every place.

    What torch's wrappers added is left out: compiled, (fully sharded) data parallel, averaged and
    checkpointed modules are told by their class, so that a submodule called ``module`` keeps its
    name. The latent parameter of a method of this library goes by its weight's name; the sources
    of other parametrizations keep theirs, for they are no weights.

    >>> inner = nn.ModuleDict({"module": nn.Linear(2, 2)})
    >>> list(cleaned(nn.DataParallel(inner)).values())[-2:]
    ['module.weight', 'module.bias']

    Raises :class:`ArgumentError` where two tensors would get one name, and for TorchScript.
    """
    found = Cleaned()
    first: dict[str, str] = {}
    for place in walk(model):
        found.setdefault(place.raw, place.clean)
        found.setdefault(place.stored, place.clean)
        for leaf, whole in place.tensors.items():
            at = join(place.raw, leaf)
            if first.setdefault(whole, at) != at:
                raise ArgumentError(
                    f"{first[whole]!r} and {at!r} would both be called {whole!r}; rename one of "
                    "them, or take the model out of its wrapper"
                )
            found[at] = whole
            found.setdefault(join(place.stored, leaf), whole)
    return found


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Clean name -> module, without the model itself; of a wrapper, what it wraps."""
    known = cleaned(model)
    every = {known[name]: module for name, module in model.named_modules()}
    return {name: module for name, module in every.items() if name}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Clean name -> parameter, in definition order; a tied parameter once, under its first name.

    Raises :class:`ArgumentError` as :func:`cleaned` does.
    """
    known = cleaned(model)
    return {known[name]: p for name, p in model.named_parameters()}


def tensors(model: nn.Module) -> Tensors:
    """All parameters and buffers by clean name, detached; writing to one writes to the model."""
    known = cleaned(model)
    buffers = {known[name]: b for name, b in model.named_buffers()}
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
    known = cleaned(model)
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    for name, tensor in named:
        canonical = first.setdefault(id(tensor), known[name])
        if canonical != known[name]:
            aliases[known[name]] = canonical
    return aliases


def clean_state_dict(model: nn.Module) -> Tensors:
    """The state as a user would name it: parametrizations evaluated, wrappers stripped, tied once.

    Tensors are detached and share memory with the model, except parametrized ones, which are
    computed.
    """
    known = cleaned(model)
    held = {known[raw] for raw in model.state_dict()}
    # a tied tensor whose first place is not persistent is stored at the next that is
    aliases = {a: n for a, n in tied(model).items() if n in held}
    computed: Tensors = {}
    latent: dict[str, str] = {}  # what state_dict's names of its parts begin with -> the weight
    owners = {id(module.parametrizations): module for module in model.modules()
              if parametrize.is_parametrized(module)}  # fmt: skip
    owner = model
    for place in walk(model):
        owner = owners.get(id(place.module), owner)
        if place.weight:
            attribute = place.raw.rpartition(".")[2]
            computed[place.weight] = _evaluated(owner, attribute, place.module)
            latent |= dict.fromkeys((f"{place.raw}.", f"{place.stored}."), place.weight)
    ordered: Tensors = {}
    for raw, value in model.state_dict().items():
        weight = next((w for prefix, w in latent.items() if raw.startswith(prefix)), None)
        name = known[raw] if weight is None else weight
        if isinstance(value, Tensor) and name not in aliases:
            ordered.setdefault(name, value.detach() if weight is None else computed[weight])
    return ordered


@torch.no_grad()
def _evaluated(module: nn.Module, attribute: str, steps: nn.Module) -> Tensor:
    """A parametrized tensor as in evaluation: reading one must not move its state."""
    modes = [(m, m.training) for m in steps.modules()]
    try:
        steps.eval()
        value: Tensor = getattr(module, attribute)
        return value.detach()
    finally:
        for part, mode in modes:
            part.training = mode


def matrices(model: nn.Module) -> set[str]:
    """Clean names of the weights that :func:`weights` takes by itself, unchecked."""
    by_id = {id(p): name for name, p in parameters(model).items()}
    layers = (module for module in model.modules() if _multiplies(module))
    own = (p for module in layers for p in module.parameters() if p.ndim >= 2)
    return {by_id[id(p)] for p in own if id(p) in by_id}


def weights(
    model: nn.Module,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> dict[str, nn.Parameter]:
    """The compressible weights: parameters of two or more dimensions in layers that multiply.

    Linear (transformers' ``Conv1D`` as well), convolution (grouped and transposed too), recurrent
    and attention weights; biases,
    batch-norm and embeddings stay out unless ``include`` names them. Definition order; tied
    weights once. An embedding tied to a linear layer counts as the linear layer's weight.

    ``include`` / ``exclude``: patterns as in :func:`select`, over parameter names.
    Raises :class:`ArgumentError` when a pattern matches nothing, and naming the fix for a weight
    that is computed from others (weight norm, spectral norm, ``torch.nn.utils.prune``) or that
    shares memory with another tensor (:mod:`gossamer.core.access`).
    """
    everything = parameters(model)
    chosen = matrices(model) if include is None else set(select(everything, include, model))
    if exclude is not None:
        chosen -= set(select(everything, exclude, model))
    found = {name: p for name, p in everything.items() if name in chosen}
    access.check_weights(model, found)
    return found


def _of_type(model: nn.Module, types: str) -> set[str]:
    """Clean names of the weights that modules of these types own."""
    known = cleaned(model)
    return {
        known[f"{prefix}.{name}".lstrip(".")]
        for prefix, module in model.named_modules()
        if fnmatch.fnmatchcase(type(module).__name__, types)
        for name, p in module.named_parameters(recurse=False)
        if p.ndim >= 2
    }


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


def select(
    names: Mapping[str, object] | Iterable[str],
    patterns: str | Iterable[str],
    model: nn.Module | None = None,
) -> list[str]:
    """Names that match any pattern, in the order of ``names``.

    A pattern is an exact name, a layer name (``conv1`` means ``conv1.weight`` where that exists,
    else everything below it), a glob (``layer*.weight``), or ``re:`` and a regular expression
    that must match the whole name (:class:`gossamer.core.regular.Regular`). With the ``model`` at
    hand also ``type:`` and a glob of module types (``type:Conv*``): the weights of two or more
    dimensions that these own; it may match nothing, so that one recipe serves networks with and
    without such layers.

    >>> select(["conv1.weight", "conv1.bias", "fc.weight"], ["conv1", "re:f.*"])
    ['conv1.weight', 'fc.weight']

    Raises :class:`ArgumentError` for a pattern that matches nothing, naming what there is.
    """
    pool = list(names)
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        if pattern.startswith("type:") and model is not None:
            found.update(_of_type(model, pattern[5:]).intersection(pool))
            continue
        if pattern.startswith("re:"):
            try:
                expression = Regular(pattern[3:])
            except ArgumentError as e:
                raise ArgumentError(f"layer pattern {pattern[:40]!r}: {e}") from e
            hits = [n for n in pool if expression.matches(n)]
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
