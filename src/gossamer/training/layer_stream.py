"""The moments of all weights' inputs in one pass over the network, layer by layer.

Every batch goes through the network twice, as it was and as it becomes. All passes stand still
before the product of a weight, until that weight has been set; then they go on to the next. Alive
are what the passes hold at that place and the moments of one weight, whatever the network's depth.
A pass is a thread that waits most of the time: one of them runs at once, so the sums are always
the same.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Container, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.modes import evaluating
from gossamer.training.layer_inputs import (
    Moments,
    _feed,
    _plain_kernels,
    _Watch,
    inputs_of,
    moments,
    readers,
)

__all__ = ["layer_by_layer", "streamed"]

_Seen = tuple[str, bool, list[Tensor]]


class _Reads(TorchDispatchMode):
    """How many operations read the values of each weight; views of it read nothing."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.count = 0
        self._places = {w.untyped_storage().data_ptr() for w in weights.values()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view:
            self.count += sum(
                isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in self._places
                for leaf in tree_leaves((args, kwargs))
            )
        return func(*args, **(kwargs or {}))


def streamed(
    model: nn.Module, batches: Iterable[Any], weights: Mapping[str, Tensor]
) -> list[str] | None:
    """The weights in the order of their use, where one pass can serve them all; else None.

    It can where every batch uses the same weights in the same order, each once, and nothing but
    those products reads them.
    """
    order: list[str] | None = None
    for batch in batches:
        mine: list[str] = []

        def see(name: str, turned: bool, inputs: list[Tensor], mine: list[str] = mine) -> None:
            mine.append(name)

        with _Reads(weights) as reads:
            inputs_of(model, batch, weights, see)
        if order is None:
            order = mine
        if mine != order or len(set(mine)) != len(mine) or reads.count != len(mine):
            return None
    return order


class _Pass:
    """A network's way through one batch, stopped before each product of the weights."""

    def __init__(self, model: nn.Module, batch: Any, weights: Mapping[str, Tensor]) -> None:
        self._what = model, batch, weights
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._seen: _Seen | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        model, batch, weights = self._what
        self._go.acquire()
        try:
            if not self._closing:
                torch.set_num_threads(self._threads)  # a thread has its own number; bits hang on it
                with torch.no_grad(), _Watch(weights, self._wait):
                    _feed(model, batch)
        except BaseException as e:  # raised again where the pass is asked to go on
            self._error = e
        self._seen = None
        self._stopped.release()

    def _wait(self, name: str, turned: bool, inputs: list[Tensor]) -> None:
        self._seen = name, turned, inputs
        self._stopped.release()
        self._go.acquire()
        if self._closing:
            raise SystemExit

    def next(self, name: str) -> _Seen:
        """Go on to the next product, which must be that of ``name``."""
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        if self._seen is None or self._seen[0] != name:
            raise ArgumentError(
                f"{name} is used otherwise in the compressed network than before: its inputs "
                "decide where it is used; exclude it"
            )
        return self._seen

    def close(self) -> None:
        """End it where it is."""
        self._closing = True
        self._go.release()
        self._thread.join()


def _stream(
    model: nn.Module, batches: Sequence[Any], order: Sequence[str], known: Container[str]
) -> Generator[tuple[str, Moments | None]]:
    weights = {n: names.parameters(model)[n] for n in order}
    with evaluating(model), _plain_kernels(model), contextlib.ExitStack() as passes:
        pairs = []
        for batch in batches:
            pair = _Pass(model, batch, weights), _Pass(model, batch, weights)
            for one in pair:
                passes.callback(one.close)
            pairs.append(pair)
        last: tuple[Tensor, Tensor, Tensor] | None = None  # a weight as it is, was and has become
        for name in order:
            found = None if name in known else Moments()
            for original, now in pairs:
                if last is not None:
                    last[0].data.copy_(last[1])
                _, _, before = original.next(name)
                if last is not None:
                    last[0].data.copy_(last[2])
                _, turned, inputs = now.next(name)
                if found is not None:
                    found.turned = turned
                    found.add([x.float() for x in inputs], [x.float() for x in before])
                inputs.clear()  # the waiting passes need them no more
                before.clear()
            was = weights[name].detach().clone()
            yield name, found
            last = weights[name], was, weights[name].detach().clone()


def layer_by_layer(
    model: nn.Module, batches: Sequence[Any], include: Sequence[str], known: Container[str] = ()
) -> Generator[tuple[str, Moments | None]]:
    """Each weight in the order of its use, with its moments; the caller sets it before the next.

    Args:
        model: changed between two steps by whoever iterates.
        batches: as :func:`gossamer.training.layer_inputs.inputs_of` takes them.
        include: clean names of the weights. Those whose products cannot be seen come last.
        known: names whose moments are not needed: they come with None, and are to be set all the
            same.

    Yields names with their moments, None where they are not needed or cannot be had.

    Raises as :func:`gossamer.training.layer_inputs.moments`.
    """
    weights = {n: names.parameters(model)[n] for n in include}
    order = streamed(model, batches, weights)
    if order is not None:
        with contextlib.closing(_stream(model, batches, order, known)) as stream:
            yield from stream
    else:
        original, uses = copy.deepcopy(model), readers(model, batches[0], include)
        order = list(uses)
        for name in order:
            yield (
                name,
                None if name in known else moments(model, original, batches, name, uses[name]),
            )
    for name in include:
        if name not in order:
            yield name, None
