"""Splits, batches of them, and the carving of validation and quick-run subsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.core import nest
from gossamer.core.errors import ArgumentError

__all__ = [
    "Dataset",
    "Split",
    "balanced",
    "batches",
    "carve",
    "held_back",
]

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Split:
    """Examples in memory; not to be changed once made.

    Args:
        inputs: (N, ...) float32 ready for use, token ids (int64), or uint8 images of shape
            (N, C, H, W) with the ``mean`` and ``std`` that normalise them; a tuple of tensors,
            which the network takes in order, or a mapping of them, which it takes by name.
        targets: (N,) class indices, or (N, T) next tokens; int64; or what the run's task reads.
            None: there are no labels.
        mean, std: per channel, of pixels scaled to [0, 1]; None when ``inputs`` is ready for use.

    Attributes:
        stored: the inputs as kept in memory; :meth:`batch` prepares what it takes from them.

    What it holds is looked at by :func:`check`, which :func:`gossamer.compress` and
    :func:`gossamer.train` call before any work. Data in batches, loaders and datasets of other
    libraries become splits by :func:`gossamer.datasets.as_split`.
    """

    in_memory: ClassVar[bool] = True

    def __init__(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if (mean is None) != (std is None):
            raise ArgumentError("mean and std go together; give both or neither")
        self.stored = inputs
        self.targets = targets
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)

    def __repr__(self) -> str:
        found = nest.leaves(self.stored)
        if not found or isinstance(self.stored, list):
            return f"Split(inputs of type {type(self.stored).__name__})"
        if isinstance(self.stored, Tensor):
            return f"Split({len(self)} x {tuple(self.stored.shape[1:])}, {self.stored.dtype})"
        return f"Split({len(self)} x {nest.shown(self.one()[0])})"

    def __len__(self) -> int:
        return nest.count(self.stored)

    @cached_property
    def inputs(self) -> Any:
        """All inputs as the network wants them; uint8 images are turned into float32 once."""
        return self.prepare(self.stored)

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor] | None:
        if self.mean is None or self.std is None:
            return None
        scale = 1 / (255 * torch.tensor(self.std, dtype=torch.float64))
        shift = -torch.tensor(self.mean, dtype=torch.float64) / torch.tensor(
            self.std, dtype=torch.float64
        )
        shape, device = (1, -1, 1, 1), self.stored.device
        return (
            scale.float().view(shape).to(device),
            shift.float().view(shape).to(device),
        )

    def prepare(self, stored: Any) -> Any:
        """Normalise a batch of stored inputs: ``(x / 255 - mean) / std``, or as it is."""
        if self._affine is None:
            return stored
        scale, shift = self._affine
        return torch.addcmul(shift, stored.float(), scale)

    def batch(
        self,
        index: Tensor | slice,
        augment: Augment | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, Any]:
        """Inputs and targets of some examples; ``augment`` sees the stored form."""
        stored, targets = self._rows(index)
        if augment is not None:
            if generator is None:
                raise ArgumentError("augment needs a torch.Generator; pass generator=")
            stored = augment(stored, generator)
        return self.prepare(stored), targets

    def _rows(self, index: Tensor | slice) -> tuple[Any, Any]:
        """Stored inputs and targets of some examples."""
        if isinstance(index, slice):
            rows: Callable[[Tensor], Tensor] = lambda t: t[index]  # noqa: E731
        else:
            rows = lambda t: t.index_select(0, index.to(t.device))  # noqa: E731
        return nest.mapped(rows, self.stored), nest.mapped(rows, self.targets)

    def one(self) -> tuple[Any, Any]:
        """Inputs and targets of the first example, without the dimension that counts."""
        return nest.mapped(lambda t: t[0], self.batch(slice(0, 1)))

    def _like(self, stored: Any, targets: Any) -> Split:
        return Split(stored, targets, mean=self.mean, std=self.std)

    def take(self, index: Tensor | slice) -> Split:
        """A split of some of the examples, in the order of ``index``."""
        rows: Callable[[Tensor], Tensor] = lambda t: t[index]  # noqa: E731
        return self._like(nest.mapped(rows, self.stored), nest.mapped(rows, self.targets))

    def to(self, device: torch.device | str) -> Split:
        """The split on a device; itself where it is there already."""
        where = torch.device(device)
        held = nest.leaves(self.stored) + nest.leaves(self.targets)
        if all(t.to(where) is t for t in held):
            return self
        return self._like(nest.moved(self.stored, where), nest.moved(self.targets, where))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits; ``test`` takes part in no choice.

    Data of other kinds becomes one by :func:`gossamer.datasets.as_dataset`.

    Attributes:
        name: as messages and the page call it.
        train, validation, test: the examples. ``validation`` may be empty for :func:`train
            <gossamer.training.train>`; :func:`gossamer.compress` needs all three.
        classes: how many; targets lie below it. None: not known, or not classes.
        augment: ``augment(stored, generator)`` transforms a training batch.
        vocabulary: the tokens of a text, by id.
        task: what a network on it is for: a name, or a :class:`gossamer.training.Task`; None: by
            the targets.
        notes: what is to be said of how the data was made.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int | None = None
    augment: Augment | None = None
    vocabulary: tuple[str, ...] | None = field(default=None, repr=False)
    task: Any = None
    notes: tuple[str, ...] = ()

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one input, (C, H, W) for images, (T,) for text; () for tuples and mappings."""
        inputs = self.train.one()[0]
        return tuple(inputs.shape) if isinstance(inputs, Tensor) else ()


def batches(
    split: Split,
    batch_size: int,
    *,
    generator: torch.Generator | None,
    augment: Augment | None = None,
) -> Iterator[tuple[Any, Any]]:
    """One pass over a split, shuffled if and only if a generator is given.

    Inputs come prepared (float32); the last batch may be smaller.

    >>> split = Split(torch.arange(5.0), torch.arange(5))
    >>> [len(x) for x, _ in batches(split, 2, generator=None)]
    [2, 2, 1]

    Raises :class:`ArgumentError` for a batch size under 1.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size} must be at least 1")
    order = None
    if generator is not None:
        order = torch.randperm(len(split), generator=generator, device=generator.device)
    for start in range(0, len(split), batch_size):
        part = slice(start, start + batch_size)
        yield split.batch(part if order is None else order[part], augment, generator)


def held_back(validation: float | int, total: int) -> int:
    """How many of ``total`` training examples a fraction or number means.

    Raises :class:`ArgumentError` when nothing would be left to train on.
    """
    whole = isinstance(validation, int)
    sound = not isinstance(validation, bool) and 0 <= validation < (total if whole else 1)
    count = int(validation if whole else validation * total + 0.5) if sound else total
    if count >= total:
        raise ArgumentError(
            f"validation={validation} of {total} examples: give a fraction in [0, 1) or a number "
            f"of examples under {total}"
        )
    return count


def carve(
    split: Split, validation: float | int | None, *, default: float | int, seed: int
) -> tuple[Split, Split]:
    """Split training data into (train, validation), at random by ``seed``.

    ``validation``: a fraction in [0, 1) or a number of examples; None takes ``default``. The rest
    keeps its order.

    Raises :class:`ArgumentError` when nothing would be left to train on.
    """
    total = len(split)
    count = held_back(default if validation is None else validation, total)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return split.take(order[count:].sort().values), split.take(order[:count].sort().values)


def balanced(split: Split, count: int | None, classes: int | None, *, seed: int) -> Split:
    """A class-balanced random subset: classes differ by at most one example where they can.

    Raises :class:`ArgumentError` for a count outside [1, len(split)].
    """
    if count is None:
        return split
    if not 1 <= count <= len(split):
        raise ArgumentError(f"subset={count} is outside [1, {len(split)}] (training examples)")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator)
    listed = split.in_memory and isinstance(split.targets, Tensor)
    if not listed or split.targets.ndim != 1 or split.targets.is_floating_point():
        return split.take(order[:count].sort().values)
    # Rank each example within its class, then take the lowest ranks of all classes.
    labels = split.targets[order]
    rank = torch.zeros(len(split), dtype=torch.int64)
    many = int(labels.max()) + 1 if classes is None else classes
    for c in range(many):
        mine = labels == c
        rank[mine] = torch.arange(int(mine.sum()))
    chosen = order[torch.argsort(rank, stable=True)[:count]]
    return split.take(chosen.sort().values)
