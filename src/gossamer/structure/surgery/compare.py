"""A smaller network beside the one that it is made of: the same outputs, on inputs of any size.

The example, a batch of other values, and batches of other sizes along every axis that the network
lets vary: a length that fits the example alone (a constant's, a number that counts two things)
would give other outputs later, without a word.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.access import copied
from gossamer.core.graph import undisturbed
from gossamer.structure.surgery.trace import outputs

__all__ = ["TOLERANCE", "Sameness", "difference"]

TOLERANCE = 1e-5  # of the largest output
_MOST = 1 << 26  # entries of a batch of another size
_KEPT = 6  # such batches, at most
_ROWS = 2  # examples of each


@dataclass
class Sameness:
    """What a network gives, to be compared with.

    Args:
        model: any.
        example: one batch; it must run.
    """

    model: nn.Module
    example: Any
    near: list[tuple[Any, list[Tensor]]] = field(init=False)
    _sized: list[tuple[Any, list[Tensor]]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.near = [(self.example, _run(self.model, self.example))]
        self.near += _taken(self.model, _another(self.example))

    @property
    def sized(self) -> list[tuple[Any, list[Tensor]]]:
        """Batches of other sizes that the network takes; made when first asked for."""
        if self._sized is None:
            self._sized = []
            on_cpu = all(t.device.type == "cpu" for t in nest.leaves(self.example))
            apart = copied(self.model)  # longer inputs may make tables grow
            # elsewhere an index out of range would end the process
            for given in _resized(self.example) if on_cpu else ():
                if len(self._sized) < _KEPT:
                    self._sized += _taken(apart, given)
        return self._sized

    def off(self, model: nn.Module) -> float:
        """The largest difference of another network's outputs; raises what its forward raises."""
        worst = max(difference(wanted, _run(model, given)) for given, wanted in self.near)
        if worst > TOLERANCE:
            return worst
        apart = copied(model)
        with _quiet():
            others = [difference(wanted, _run(apart, given)) for given, wanted in self.sized]
        return max([worst, *(off for off in others if off > TOLERANCE)])


def difference(wanted: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference, in parts of a tensor's largest value; infinite for other shapes."""
    if [t.shape for t in wanted] != [t.shape for t in got]:
        return float("inf")
    worst = 0.0
    for a, b in zip(wanted, got, strict=True):
        if not a.numel() or torch.equal(a, b):
            continue
        x, y = a.double(), b.double()
        same = (x == y) | (x.isnan() & y.isnan())
        if bool((~same & ~(x.isfinite() & y.isfinite())).any()):
            return float("inf")
        most = float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0
        off = float((x - y)[~same].abs().max()) if bool((~same).any()) else 0.0
        worst = max(worst, off / most if most else float("inf") if off > 1e-12 else 0.0)
    return worst


def _taken(model: nn.Module, given: Any) -> list[tuple[Any, list[Tensor]]]:
    """A batch and what the network gives for it; nothing where it does not take it."""
    # the user's own code: random values, or another size, may be none of its
    with contextlib.suppress(Exception), _quiet():
        return [(given, _run(model, given))]
    return []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of sizes that nobody has asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with undisturbed(model):
        return [t.clone() for t in outputs(nest.feed(model, nest.mapped(Tensor.clone, inputs)))]


def _another(example: Any) -> Any:
    """A batch of the same kind with other values."""
    source = torch.Generator().manual_seed(0)

    def other(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.numel():
            scale = float(t.std()) if t.numel() > 1 else 1.0
            noise = torch.randn(t.shape, generator=source, dtype=torch.float64).to(t)
            return noise * (scale or 1.0) + t.mean()
        return t.flip(0) if t.ndim else t

    return nest.mapped(other, example)


def _resized(example: Any) -> Iterator[Any]:
    """Batches of other sizes: each length of the example in turn, wherever it stands.

    One more tells what is rounded down from what is rounded up; twice and more, what is fixed.
    """
    tensors = nest.leaves(example)
    batch = next((len(t) for t in tensors if t.ndim), 0)
    lengths = {s for t in tensors for d, s in enumerate(t.shape) if s > 1 and (d or s != batch)}
    for old in sorted(lengths, reverse=True):
        for new in (old + 1, 2 * old, 2 * old + 3):
            yield from _stretched(example, old, new, batch)
    yield from _stretched(example, batch, batch + 1, None)


def _stretched(example: Any, old: int, new: int, batch: int | None) -> Iterator[Any]:
    """The example with lengths ``old`` made ``new`` by repeating it; batch None: the batch's."""

    def longer(t: Tensor) -> Tensor:
        for axis, size in enumerate(t.shape):
            mine = axis == 0 if batch is None else axis > 0 or size != batch
            if size == old and mine:
                t = t.index_select(axis, torch.arange(new) % old)
            elif axis == 0 and size == batch:
                t = t[:_ROWS]
        return t

    sizes = [t.shape for t in nest.leaves(example)]
    most = max((s.numel() for s in sizes), default=0) * max(1, new // max(1, old) + 1) ** 3
    if old and most <= _MOST:
        yield nest.mapped(longer, example)
