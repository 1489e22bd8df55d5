"""Splits in memory, batches of them, and the carving of validation and quick-run subsets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError, DatasetError

__all__ = [
    "Dataset",
    "Split",
    "balanced",
    "batches",
    "carve",
    "check",
    "check_split",
    "held_back",
]

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Split:
    """Examples in memory; not to be changed once made.

    Args:
        inputs: (N, ...) float32 ready for use, token ids (int64), or uint8 images of shape
            (N, C, H, W) with the ``mean`` and ``std`` that normalise them.
        targets: (N,) class indices, or (N, T) next tokens; int64.
        mean, std: per channel, of pixels scaled to [0, 1]; None when ``inputs`` is ready for use.

    Attributes:
        stored: the inputs as kept in memory; :meth:`batch` prepares what it takes from them.

    What it holds is looked at by :func:`check`, which :func:`gossamer.compress` and
    :func:`gossamer.train` call before any work.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
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
        if not isinstance(self.stored, Tensor):
            return f"Split(inputs of type {type(self.stored).__name__})"
        return f"Split({len(self)} x {tuple(self.stored.shape[1:])}, {self.stored.dtype})"

    def __len__(self) -> int:
        return self.stored.shape[0]

    @cached_property
    def inputs(self) -> Tensor:
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

    def prepare(self, stored: Tensor) -> Tensor:
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
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some examples; ``augment`` sees the stored form."""
        if isinstance(index, slice):
            stored, targets = self.stored[index], self.targets[index]
        else:
            stored = self.stored.index_select(0, index)
            targets = self.targets.index_select(0, index)
        if augment is not None:
            if generator is None:
                raise ArgumentError("augment needs a torch.Generator; pass generator=")
            stored = augment(stored, generator)
        return self.prepare(stored), targets

    def _like(self, stored: Tensor, targets: Tensor) -> Split:
        return Split(stored, targets, mean=self.mean, std=self.std)

    def take(self, index: Tensor | slice) -> Split:
        """A split of some of the examples, in the order of ``index``."""
        return self._like(self.stored[index], self.targets[index])

    def to(self, device: torch.device | str) -> Split:
        """The split on a device; itself where it is there already."""
        stored, targets = self.stored.to(device), self.targets.to(device)
        if stored is self.stored and targets is self.targets:
            return self
        return self._like(stored, targets)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits; ``test`` takes part in no choice.

    Attributes:
        name: as messages and the page call it.
        train, validation, test: the examples. ``validation`` may be empty for :func:`train
            <gossamer.training.train>`; :func:`gossamer.compress` needs all three.
        classes: how many; targets lie below it.
        augment: ``augment(stored, generator)`` transforms a training batch.
        vocabulary: the tokens of a text, by id.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    augment: Augment | None = None
    vocabulary: tuple[str, ...] | None = field(default=None, repr=False)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one input, (C, H, W) for images, (T,) for text."""
        return tuple(self.train.stored.shape[1:])


def batches(
    split: Split,
    batch_size: int,
    *,
    generator: torch.Generator | None,
    augment: Augment | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
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
        order = order.to(split.stored.device)
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


def balanced(split: Split, count: int | None, classes: int, *, seed: int) -> Split:
    """A class-balanced random subset: classes differ by at most one example where they can.

    Raises :class:`ArgumentError` for a count outside [1, len(split)].
    """
    if count is None:
        return split
    if not 1 <= count <= len(split):
        raise ArgumentError(f"subset={count} is outside [1, {len(split)}] (training examples)")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator)
    if split.targets.ndim != 1:
        return split.take(order[:count].sort().values)
    # Rank each example within its class, then take the lowest ranks of all classes.
    labels = split.targets[order]
    rank = torch.zeros(len(split), dtype=torch.int64)
    for c in range(classes):
        mine = labels == c
        rank[mine] = torch.arange(int(mine.sum()))
    chosen = order[torch.argsort(rank, stable=True)[:count]]
    return split.take(chosen.sort().values)


def check_split(split: object, where: str = "split") -> None:
    """Raise :class:`DatasetError` where a split is none, or holds no two tensors of one length.

    Values are not looked at; ``where`` names the split in messages.
    """
    if not isinstance(split, Split):
        raise DatasetError(
            f"{where} is of type {type(split).__name__}; give gossamer.Split(inputs, targets) with "
            "all examples as two tensors"
        )
    for name, value in (("inputs", split.stored), ("targets", split.targets)):
        _check_tensor(value, f"{where}: {name}", _FIXES[name])
    if len(split.stored) != len(split.targets):
        raise DatasetError(
            f"{where}: {len(split.stored)} inputs but {len(split.targets)} targets; give one "
            "target for each input"
        )
    if split.mean is not None and split.std is not None:
        _check_scale(split.stored, split.mean, split.std, where)


_FIXES = {
    "inputs": "give a float32 tensor, such as torch.tensor(values, dtype=torch.float32)",
    "targets": "give class indices as an int64 tensor, one for each input",
}


def _check_tensor(value: object, what: str, fix: str) -> None:
    if not isinstance(value, Tensor):
        kind = "None" if value is None else f"of type {type(value).__name__}"
        fix = "wrap it in torch.from_numpy()" if type(value).__name__ == "ndarray" else fix
        raise DatasetError(f"{what} is {kind}; {fix}")
    if value.ndim < 1:
        raise DatasetError(f"{what} is a scalar; its first dimension counts the examples")
    if value.layout != torch.strided:
        raise DatasetError(f"{what} is {value.layout}; give a dense tensor (.to_dense())")


def _check_scale(
    stored: Tensor, mean: tuple[float, ...], std: tuple[float, ...], where: str
) -> None:
    if stored.ndim != 4:
        raise DatasetError(
            f"{where}: mean and std are of images (N, C, H, W), but inputs have shape "
            f"{tuple(stored.shape)}"
        )
    if not len(mean) == len(std) == stored.shape[1]:
        raise DatasetError(
            f"{where}: {len(mean)} means and {len(std)} deviations for {stored.shape[1]} channels; "
            "give one of each for a channel"
        )
    if not all(math.isfinite(m) for m in mean) or not all(0 < s < math.inf for s in std):
        raise DatasetError(
            f"{where}: mean={mean}, std={std}: give finite means and deviations above 0"
        )


_CHUNK = 1 << 20  # values that are looked at together, so that no copy of the data is made


def check(dataset: Dataset) -> Dataset:
    """Return the dataset when it is sound; every value is looked at, none is copied for it.

    Raises :class:`DatasetError` for splits that hold no tensors or lengths that differ
    (:func:`check_split`), an empty train or test split, other dtypes, NaN or infinite inputs,
    inputs whose shapes differ, token ids below 0 or beyond the vocabulary, or targets
    outside [0, classes).
    """
    whole = isinstance(dataset.classes, int) and not isinstance(dataset.classes, bool)
    if not whole or dataset.classes < 1:
        raise DatasetError(
            f"dataset {dataset.name!r}: classes={dataset.classes!r} must be a whole number from 1"
        )
    for part in ("train", "validation", "test"):
        split: Split = getattr(dataset, part)
        where = f"dataset {dataset.name!r}, {part}"
        check_split(split, where)
        if not len(split):
            if part == "validation":
                continue  # allowed: nothing is validated then
            raise DatasetError(f"{where} is empty")
        kind = split.stored.dtype
        if kind not in (torch.float32, torch.int64) and not (
            kind == torch.uint8 and split.mean is not None
        ):
            raise DatasetError(
                f"{where}: inputs are {kind}; use float32 (.float()), int64 token ids, or uint8 "
                "images with mean and std"
            )
        if split.stored.shape[1:] != dataset.train.stored.shape[1:]:
            raise DatasetError(
                f"{where}: inputs of shape {tuple(split.stored.shape[1:])}, those of train have "
                f"{dataset.in_shape}"
            )
        if split.stored.is_floating_point():
            bad = _first_not_finite(split.stored)
            if bad is not None:
                raise DatasetError(
                    f"{where}: inputs hold NaN or infinity, first in example {bad}; clean them "
                    "first, or leave such examples out"
                )
        elif kind == torch.int64:
            _check_tokens(split.stored, dataset.vocabulary, where)
        if split.targets.is_floating_point():
            continue  # a regression: the user's own loss judges it
        low, high = int(split.targets.min()), int(split.targets.max())
        if low < 0 or high >= dataset.classes:
            raise DatasetError(
                f"{where}: targets reach from {low} to {high}, but classes={dataset.classes} "
                f"allows 0 to {dataset.classes - 1}"
            )
        if split.targets.dtype != torch.int64:
            raise DatasetError(
                f"{where}: targets are {split.targets.dtype}; use torch.int64 (.long())"
            )
    return dataset


def _first_not_finite(stored: Tensor) -> int | None:
    """The first example with NaN or infinity in it, a chunk of examples at a time."""
    step = max(1, _CHUNK // max(1, stored[0].numel()))
    for start in range(0, len(stored), step):
        fine = torch.isfinite(stored[start : start + step])
        if not bool(fine.all()):
            return start + int((~fine.flatten(1).all(1) if fine.ndim > 1 else ~fine).int().argmax())
    return None


def _check_tokens(stored: Tensor, vocabulary: tuple[str, ...] | None, where: str) -> None:
    if not stored.numel():
        return
    low, high = int(stored.min()), int(stored.max())
    if low < 0:
        raise DatasetError(f"{where}: inputs are int64 token ids, and one is {low}; ids begin at 0")
    if vocabulary is not None and high >= len(vocabulary):
        raise DatasetError(
            f"{where}: token id {high} is beyond the vocabulary of {len(vocabulary):,} words"
        )
