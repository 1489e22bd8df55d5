"""All weights' inputs in one pass over the network, layer by layer.

Every batch goes through the network twice, as it was and as it becomes. All passes stand still
before the product of a weight, until that weight has been set; then they go on to the next. Alive
are what the passes hold at that place and what is gathered of one weight (its moments, or a
sample), whatever the network's depth. A pass is a thread that waits most of the time: one of them
runs at once, so what is gathered is always the same.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gossamer.core.dispatch import Watching
from gossamer.core.errors import ArgumentError
from gossamer.core.modes import evaluating
from gossamer.training.layer_inputs import Pick, Use, feed, inputs_of, plain_kernels, watched
from gossamer.training.moments import Gathers, same

__all__ = ["stream", "streamed"]

G = TypeVar("G", bound=Gathers)


class _Reads(Watching):
    """What operations read of weights and biases; views of them read nothing."""

    def __init__(self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.order: list[str] = []
        self.count = 0
        self.apart = False  # a bias is read elsewhere than right behind its weight's product
        self._weights = {w.untyped_storage().data_ptr() for w in weights.values()}
        self._biases = {b.untyped_storage().data_ptr(): n for n, b in biases.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    place = leaf.untyped_storage().data_ptr()
                    self.count += place in self._weights
                    owner = self._biases.get(place)
                    self.apart |= owner is not None and self.order[-1:] != [owner]
        return func(*args, **(kwargs or {}))


def streamed(
    model: nn.Module,
    batches: Iterable[Any],
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
) -> list[str] | None:
    """The weights in the order of their use, where one pass can serve them all; else None.

    It can where every batch uses the same weights in the same order, each once, nothing but those
    products reads them, and a bias is read with its weight.
    """
    order: list[str] | None = None
    for batch in batches:
        reads = _Reads(weights, biases)

        def see(use: Use, mine: list[str] = reads.order) -> None:
            mine.append(use.name)

        with reads:
            inputs_of(model, batch, weights, see)
        mine = reads.order
        if order is None:
            order = mine
        if mine != order or len(set(mine)) != len(mine) or reads.count != len(mine) or reads.apart:
            return None
    return order


class _Pass:
    """A network's way through one batch, stopped before each product of the weights."""

    def __init__(
        self, model: nn.Module, batch: Any, weights: Mapping[str, Tensor], pick: Pick | None
    ) -> None:
        self._what = model, batch, weights, pick
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._use: Use | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        model, batch, weights, pick = self._what
        self._go.acquire()
        try:
            if not self._closing:
                torch.set_num_threads(self._threads)  # a thread has its own number; bits hang on it
                with torch.no_grad(), watched(weights, self._wait, pick):
                    feed(model, batch)
        except BaseException as e:  # raised again where the pass is asked to go on
            self._error = e
        self._use = None
        self._stopped.release()

    def _wait(self, use: Use) -> None:
        self._use = use
        self._stopped.release()
        self._go.acquire()
        if self._closing:
            raise SystemExit

    def next(self, name: str) -> Use:
        """Go on to the next product, which must be that of ``name``."""
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        if self._use is None or self._use.name != name:
            raise ArgumentError(
                f"{name} is used otherwise in the compressed network than before: its inputs "
                "decide where it is used; exclude it"
            )
        return self._use

    def forget(self) -> None:
        """Let go of the inputs: the product that it waits before needs them no more."""
        self._use = None

    def close(self) -> None:
        """End it where it is."""
        self._closing = True
        self._go.release()
        self._thread.join()


def stream(
    model: nn.Module,
    batches: Sequence[Any],
    order: Sequence[str],
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    *,
    gather: Callable[[str], G],
    known: Container[str] = (),
    held: int = 0,
    picks: Callable[[int], Pick] | None = None,
) -> Generator[tuple[str, G | None]]:
    """Each weight in the order of its use, with its inputs; the caller sets it before the next.

    Args:
        model: changed between two steps by whoever iterates: that weight and its bias.
        batches: as :func:`gossamer.training.layer_inputs.inputs_of` takes them.
        order: of :func:`streamed`.
        weights, biases: clean name of a weight -> it, and the bias beside it.
        gather: name of a weight -> what takes its inputs, such as new ``Moments``.
        known: names whose inputs are not needed: they come with None, and are to be set all the
            same.
        held: how many of the last batches are held back.
        picks: number of a batch -> which rows of its inputs are looked at, in both networks; None:
            all.

    Raises :class:`ArgumentError` for a network that uses its weights otherwise than before.
    """
    watched_ = {n: weights[n] for n in order}
    with evaluating(model), plain_kernels(model), contextlib.ExitStack() as passes:
        pairs = []
        for number, batch in enumerate(batches):
            pick = None if picks is None else picks(number)
            pair = _Pass(model, batch, watched_, pick), _Pass(model, batch, watched_, pick)
            for one in pair:
                passes.callback(one.close)
            pairs.append(pair)
        last: list[tuple[Tensor, Tensor, Tensor]] = []  # tensors as they are, were and have become
        for name in order:
            found = None if name in known else gather(name)
            for number, (original, now) in enumerate(pairs):
                for tensor, was, _ in last:
                    tensor.data.copy_(was)
                before = original.next(name)
                for tensor, _, become in last:
                    tensor.data.copy_(become)
                use = now.next(name)
                if found is not None:
                    apart = number >= len(pairs) - held
                    found.add(use, same(use, before), len(weights[name]), held=apart)
                now.forget()
                original.forget()
                del use, before
            changing = [weights[name], *([biases[name]] if name in biases else [])]
            old = [t.detach().clone() for t in changing]
            yield name, found
            last = [(t, was, t.detach().clone()) for t, was in zip(changing, old, strict=True)]
