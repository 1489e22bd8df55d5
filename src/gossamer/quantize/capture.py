"""Finding the ReLUs of a model, as modules or as calls in its graph, without changing it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.graph import check_modes, check_same, check_writes, trace

__all__ = ["Places", "Sample", "activations", "checked", "inputs", "known", "shapes"]

Places = dict[str, list[tuple[nn.Module, str]]]  # name -> where the module hangs: owner, attribute

_MODULES = (nn.ReLU, nn.ReLU6)
_CALLS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, "relu": nn.ReLU, F.relu6: nn.ReLU6,
    F.relu_: nn.ReLU, torch.relu_: nn.ReLU, "relu_": nn.ReLU,
}  # fmt: skip
_IN_PLACE = (F.relu_, torch.relu_, "relu_")
_FROZEN = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.batch_norm)


def activations(
    model: nn.Module,
    functional: bool,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
) -> tuple[nn.Module, Places]:
    """The model, or a captured graph of it where ReLUs are called, and the places of its ReLUs.

    Raises :class:`ArgumentError` for a graph that cannot be captured, or that differs between
    training and evaluation, a ReLU that cannot be replaced or that changes in place what others
    read (named), a pattern that matches nothing, or no ReLU.
    """
    target: nn.Module = model
    graph: fx.GraphModule | None = None
    if functional:
        graph, calls = _trace(model)
        target = graph if calls else model
    found = _places(target)
    hidden = {n: m for n, m in target.named_modules() if _hides(m)}
    chosen = [*found, *hidden]
    if include is not None:
        chosen = names.select(chosen, include)
    if exclude is not None:
        out = set(names.select([*found, *hidden], exclude))
        chosen = [name for name in chosen if name not in out]
    for name in chosen:
        if name in hidden:
            raise ArgumentError(
                f"module {name!r} ({type(hidden[name]).__name__}) computes a ReLU inside, which "
                "cannot be replaced; write it with nn.ReLU, or leave it out with exclude="
            )
    if not chosen:
        raise ArgumentError(
            "the model has no ReLU to replace"
            + ("" if functional else " as a module; functional=True looks at calls, too")
        )
    places = {name: found[name] for name in chosen}
    _check_in_place(model, graph, places)
    return target, places


def _check_in_place(model: nn.Module, graph: fx.GraphModule | None, found: Places) -> None:
    """Refuse ReLUs in place on what others read: what takes their place makes a new tensor."""
    writing = {
        id(module): name
        for name, places in found.items()
        for module in (getattr(owner, attribute) for owner, attribute in places)
        if module.inplace
    }
    if not writing:
        return
    try:
        graph = trace(model) if graph is None else graph
    except ArgumentError as e:
        raise ArgumentError(
            f"activation {next(iter(writing.values()))!r} works in place, and whether others read "
            f"its input cannot be seen: {e}. Set inplace=False"
        ) from e
    modules = dict(graph.named_modules())
    check_writes(graph, lambda n: n.op == "call_module" and id(modules[str(n.target)]) in writing)


def checked(
    model: nn.Module,
    target: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
) -> Iterator[Any]:
    """The batches; on the first, a captured graph is compared with the model in both modes.

    Raises :class:`ArgumentError` where they differ.
    """
    rest = iter(batches)
    if target is model:
        return rest
    # at once, not when the batches are read: whoever reads them watches the network
    begin = list(itertools.islice(rest, 1))
    for batch in begin:
        check_same(model, target, batch, "the captured graph", forward=forward)
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(first, Tensor) or len(first) > 1:  # batch-norm trains on several
            check_same(model, target, batch, "the captured graph", training=True, forward=forward)
    return itertools.chain(begin, rest)


def known(model: nn.Module, functional: bool) -> list[str]:
    """The names of the activations that :func:`activations` can find; the model stays as it is."""
    if functional:
        graph, calls = _trace(model)
        return list(_places(graph if calls else model))
    return list(_places(model))


def _hides(module: nn.Module) -> bool:
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return module.activation in (F.relu, torch.relu)
    return isinstance(module, (nn.RNN, nn.RNNCell)) and module.nonlinearity == "relu"


def _places(model: nn.Module) -> Places:
    first: dict[int, str] = {}
    found: Places = {}
    known = names.cleaned(model)
    for prefix, owner in model.named_modules():
        for attribute, child in owner._modules.items():
            if isinstance(child, _MODULES):
                name = known[f"{prefix}.{attribute}".lstrip(".")]
                found.setdefault(first.setdefault(id(child), name), []).append((owner, attribute))
    return found


def _trace(model: nn.Module) -> tuple[fx.GraphModule, bool]:
    """The model's graph with every called ReLU as a module, and whether any is called."""
    try:
        traced = trace(model)
    except ArgumentError as e:
        raise ArgumentError(
            f"{type(model).__name__} cannot be captured ({e.__cause__}), so that ReLUs it calls "
            "would be missed; use nn.ReLU modules, and functional=False to replace these alone"
        ) from e
    traced.training = model.training
    calls = [
        node
        for node in traced.graph.nodes
        if node.op in ("call_function", "call_method") and node.target in _CALLS
    ]
    if not calls:
        return traced, False
    for node in traced.graph.nodes:
        if node.target in _FROZEN:
            raise ArgumentError(
                f"node {node.name!r} ({node.target.__name__}) would keep the present mode for good "
                "in the captured graph; write it as a module, such as nn.Dropout"
            )
    check_modes(model)
    for node in calls:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node):
            raise ArgumentError(f"node {node.name!r} is a ReLU of no tensor of the graph")
        in_place = node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))
        if in_place and len(source.users) > 1:
            raise ArgumentError(
                f"node {node.name!r} is a ReLU in place on {source.name!r}, which others read "
                "too; set inplace=False"
            )
    check_writes(traced, lambda node: node in calls)
    for node in calls:
        source = node.args[0] if node.args else node.kwargs["input"]
        name = node.name
        while hasattr(traced, name):
            name += "_"
        traced.add_submodule(name, _CALLS[node.target]())
        with traced.graph.inserting_before(node):
            node.replace_all_uses_with(traced.graph.call_module(name, (source,)))
        traced.graph.erase_node(node)
    traced.recompile()
    return traced, True


@contextlib.contextmanager
def _watched(model: nn.Module, found: Places, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Evaluation mode, no gradients, ``see(name, input)`` at each ReLU; all undone at the end."""
    modes = [(m, m.training) for m in model.modules()]
    handles = []
    try:
        model.eval()
        for name, places in found.items():
            owner, attribute = places[0]

            def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                see(name, args[0].detach())

            handles.append(getattr(owner, attribute).register_forward_pre_hook(hook))
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode


def _run(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> None:
    given = batch[0] if forward is None and isinstance(batch, (tuple, list)) and batch else batch
    try:
        if forward is not None:
            forward(model, batch)
        else:
            model(given)
    except (TypeError, RuntimeError) as e:
        what = type(given).__name__
        if isinstance(given, Tensor):
            what = f"{given.dtype} of shape {tuple(given.shape)}"
        raise ArgumentError(
            f"{type(model).__name__} does not take a calibration batch ({what}): "
            f"{(str(e).splitlines() or [''])[0][:200]}; give what it takes, or "
            "forward=lambda model, batch: ..."
        ) from e


def _reached(found: Places, seen: Mapping[str, object], what: str) -> None:
    missing = [name for name in found if name not in seen]
    if missing:
        raise ArgumentError(
            f"activations {', '.join(missing)} are not reached by {what}; leave them out with "
            "exclude=, or give batches that reach them"
        )


def inputs(
    model: nn.Module,
    found: Places,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    most: int,
) -> names.Tensors:
    """At most ``most`` inputs of each ReLU, evenly spaced over all batches (:class:`Sample`).

    Raises :class:`ArgumentError` for a ReLU that no batch reaches.
    """
    parts: dict[str, Sample] = {}

    def see(name: str, x: Tensor) -> None:
        parts.setdefault(name, Sample(most)).add(x)

    with _watched(model, found, see):
        for batch in batches:
            _run(model, batch, forward)
    seen = {name: sample for name, sample in parts.items() if sample.seen}
    _reached(found, seen, "calibration")
    return {name: seen[name].values() for name in found}


class Sample:
    """At most ``most`` of the elements of a stream, evenly spaced, whatever the batches' sizes.

    Element i is kept while the fraction of i times the golden ratio is below 2^-k, and k grows
    when there are too many: three-distance spacing over the whole stream, so that no part of it
    weighs more than another, and no row length lines up with it. The same elements in other
    batches give the same sample. Memory is bounded by ``most`` and one batch.

    >>> sample = Sample(4)
    >>> for part in torch.arange(40.0).split(7):
    ...     sample.add(part)
    >>> sample.values().tolist()
    [0.0, 13.0, 34.0]
    """

    _GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
    _PART = 1 << 20  # elements looked at in one go

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, 0
        self._halvings = 0
        self._kept: list[tuple[np.ndarray, Tensor]] = []  # places in the stream, values

    def add(self, values: Tensor) -> None:
        """The next elements of the stream, of any shape."""
        for part in values.reshape(-1).split(self._PART):
            places = np.arange(self.seen, self.seen + len(part), dtype=np.uint64)
            chosen = self._choose(places)
            self.seen += len(part)
            index = torch.from_numpy(chosen).to(part.device)
            self._kept.append((places[chosen], part[index].clone()))
            while sum(len(p) for p, _ in self._kept) > self.most:
                self._halvings += 1
                self._kept = [
                    (p[keep], v[torch.from_numpy(keep).to(v.device)])
                    for p, v in self._kept
                    for keep in (self._choose(p),)
                ]

    def values(self) -> Tensor:
        """The sample, in the order of the stream."""
        return torch.cat([v for _, v in self._kept])

    def _choose(self, places: np.ndarray) -> np.ndarray:
        if not self._halvings:
            return np.arange(len(places))
        shifted = (places * self._GOLDEN) >> np.uint64(64 - self._halvings)
        return np.flatnonzero(shifted == 0)


def shapes(
    model: nn.Module,
    found: Places,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> dict[str, list[tuple[int, ...]]]:
    """The input shapes of each ReLU, one a call.

    Raises :class:`ArgumentError` for a ReLU that the batch does not reach.
    """
    seen: dict[str, list[tuple[int, ...]]] = {}
    with _watched(model, found, lambda name, x: seen.setdefault(name, []).append(tuple(x.shape))):
        _run(model, batch, forward)
    _reached(found, seen, "the batch")
    return {name: seen[name] for name in found}
