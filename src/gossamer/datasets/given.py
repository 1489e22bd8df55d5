"""Data as people have it, made into splits: tensors, batches, loaders, datasets of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    default_collate,
)

from gossamer.core import nest
from gossamer.core.errors import DatasetError
from gossamer.datasets.base import Augment, Dataset, Split, carve
from gossamer.datasets.checks import check_split

__all__ = ["Collated", "as_dataset", "as_split"]

LABELS = ("labels", "label", "targets", "target")
"""The keys of a mapping under which its targets are looked for, in this order."""

Separate = Callable[[Any], tuple[Any, Any]]


def separate(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets (None: no labels) of a batch.

    A tensor is inputs; a pair is inputs and targets; of a mapping the entry under one of
    :data:`LABELS` is the targets; one thing in a tuple is the inputs.

    Raises :class:`DatasetError` for a longer tuple, and what holds no tensor.
    """
    targets = None
    if isinstance(batch, Mapping):
        inputs: Any = {k: v for k, v in batch.items() if v is not None}
        key = next((name for name in LABELS if name in inputs), None)
        targets = None if key is None else inputs.pop(key)
        wrong = [k for k, v in inputs.items() if not isinstance(v, Tensor)]
        if wrong:
            raise DatasetError(
                f"a batch's {wrong[0]!r} is {nest.shown(inputs[wrong[0]])}, no tensor; remove "
                "that column, or give tensors (a Hugging Face dataset: .with_format('torch'))"
            )
    elif isinstance(batch, (tuple, list)):
        if len(batch) > 2 or not batch:
            raise DatasetError(
                f"a batch is {nest.shown(batch)}: which of them are inputs? Give pairs (inputs, "
                "targets), inputs being a tensor, a tuple or a mapping, or separate=, a function "
                "that makes them"
            )
        inputs, targets = batch if len(batch) == 2 else (batch[0], None)
        inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    else:
        inputs = batch
    if not nest.leaves(inputs):
        raise DatasetError(
            f"a batch's inputs are {nest.shown(inputs)}: no tensor; give tensors, or a collate_fn "
            "that makes them"
        )
    return inputs, targets


class Collated(Split):
    """Examples of a map-style dataset, fetched and put into batches when they are asked for.

    Args:
        dataset: has ``len()`` and gives an example for an index.
        collate: list of examples -> batch.
        separate: batch -> (inputs, targets).
        index: the examples that belong to it; None: all.
    """

    in_memory: ClassVar[bool] = False

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any] = default_collate,
        separate: Separate = separate,
        index: Tensor | None = None,
    ) -> None:
        self.dataset, self.collate, self.separate = dataset, collate, separate
        self.index = torch.arange(len(dataset)) if index is None else index
        super().__init__(None, None)
        if len(self.index):
            # one example says whether there are labels, and what they are like
            self.stored, self.targets = self._rows(slice(0, 1))

    def __repr__(self) -> str:
        return f"Collated({len(self)} x {type(self.dataset).__name__})"

    def __len__(self) -> int:
        return len(self.index)

    def _rows(self, index: Tensor | slice) -> tuple[Any, Any]:
        chosen = self.index[index if isinstance(index, slice) else index.cpu()].tolist()
        return self.separate(self.collate([self.dataset[i] for i in chosen]))

    @property
    def inputs(self) -> Any:
        """All inputs, put into memory."""
        return self.batch(slice(None))[0]

    def take(self, index: Tensor | slice) -> Split:
        """A split of some of the examples; nothing is fetched."""
        chosen = self.index[index if isinstance(index, slice) else index.cpu()]
        return Collated(self.dataset, self.collate, self.separate, chosen)

    def to(self, device: torch.device | str) -> Split:
        """Itself: examples come when they are asked for."""
        return self


def as_split(
    data: Any, *, separate: Separate = separate, what: str = "data"
) -> tuple[Split, list[str]]:
    """A split of what there is, and what is to be said of it.

    Args:
        data: a split; a tensor of inputs; a tuple (inputs, targets); a mapping of tensors, by
            name; a map-style dataset of
            torch or Hugging Face or a ``DataLoader`` over one, whose examples are fetched when
            they are asked for; any other iterable of batches, which is read into memory once.
        separate: a batch -> (inputs, targets).

    Raises :class:`DatasetError` for what is none of these, no batches at all, or batches whose
    structure or shapes differ.
    """
    if isinstance(data, Split):
        return data, []
    if isinstance(data, Tensor):
        return Split(data), []
    if isinstance(data, tuple):  # a list holds batches
        return Split(*separate(data)), []
    if isinstance(data, Mapping) and data and all(isinstance(v, Tensor) for v in data.values()):
        return Split(*separate(data)), []
    if isinstance(data, DataLoader):
        if data.batch_sampler is not None and not isinstance(data.dataset, IterableDataset):
            return Collated(data.dataset, data.collate_fn, separate, _drawn(data, what)), []
    elif _map_style(data):
        return Collated(data, default_collate, separate), []
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
        raise DatasetError(
            f"{what} is {nest.shown(data)}; give tensors, a gossamer.Split, a DataLoader, a "
            "dataset with len() and indexing, or an iterable of batches"
        )
    return _read(data, separate, what)


def _drawn(loader: DataLoader[Any], what: str) -> Tensor | None:
    """The examples that a loader's sampler draws, once each; None: all of the dataset.

    Raises :class:`DatasetError` for a sampler that draws otherwise: an example twice, say.
    """
    group: Any = loader.batch_sampler
    sampler = group.sampler if type(group) is BatchSampler else group
    if type(sampler) is SubsetRandomSampler:
        return torch.as_tensor(list(sampler.indices), dtype=torch.int64).sort().values
    once = type(sampler) is RandomSampler and not sampler.replacement
    if (once or type(sampler) is SequentialSampler) and len(sampler) == len(loader.dataset):  # type: ignore[arg-type]
        return None
    raise DatasetError(
        f"{what} is a DataLoader that draws by a {type(sampler).__name__}, and a split holds every "
        "example once; give the dataset itself, or torch.utils.data.Subset(dataset, indices)"
    )


def _map_style(data: Any) -> bool:
    """Whether its items are examples: lists and tuples hold batches."""
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return indexed and not isinstance(data, (Mapping, Sequence, IterableDataset))


def _read(data: Iterable[Any], separate: Separate, what: str) -> tuple[Split, list[str]]:
    """All batches of an iterable, as one split in memory."""
    parts = [separate(batch) for batch in data]
    if not parts:
        raise DatasetError(f"{what} gives no batches: there is nothing to work on")
    for number, part in enumerate(parts):
        where = f"{what}, batch {number + 1}"
        count = nest.count(part[0], f"{where}: inputs")
        if nest.leaves(part[1]) and nest.count(part[1], f"{where}: targets") != count:
            raise DatasetError(
                f"{where} is {nest.shown(part)}: {count} inputs, and another number of targets; "
                "single examples are to be put into batches, as a DataLoader does"
            )
        if _kinds(part) != _kinds(parts[0]):
            raise DatasetError(
                f"{what}: batch {number + 1} is {nest.shown(part)}, the first "
                f"{nest.shown(parts[0])}; pad all to one shape, and give all the same parts"
            )
    inputs, targets = _joined([p[0] for p in parts]), _joined([p[1] for p in parts])
    told = []
    if not isinstance(data, (list, tuple)):
        told.append(f"{what} was read into memory: {len(parts):,} batches")
    return Split(inputs, targets), told


def _kinds(value: Any) -> Any:
    """Structure, types and shapes but for the number of examples."""
    shown = nest.mapped(lambda t: (tuple(t.shape[1:]), str(t.dtype)), value)
    return repr(shown)


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return first if len(parts) == 1 else torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)):
        return tuple(_joined([part[i] for part in parts]) for i in range(len(first)))
    return first


_PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def as_dataset(
    data: Any,
    *,
    name: str = "data",
    classes: int | None = None,
    task: Any = None,
    augment: Augment | None = None,
    separate: Separate = separate,
    seed: int = 0,
) -> Dataset:
    """A dataset of what there is; what is missing is carved, and said in its notes.

    Args:
        data: a dataset; a mapping of ``train``, ``validation``, ``test`` to what
            :func:`as_split` takes (a Hugging Face ``DatasetDict`` is one); or one such thing,
            of which a tenth each is held back, at random, for validation and test.
        name, classes, task, augment: as :class:`Dataset`'s; of a dataset those that are given are
            changed, but for its name.
        seed: of what is carved.

    Raises :class:`DatasetError` as :func:`as_split`, and for fewer than three examples.
    """
    if isinstance(data, Dataset):
        given = {"classes": classes, "task": task, "augment": augment}
        given = {key: value for key, value in given.items() if value is not None}
        return replace(data, **given) if given else data
    parts: dict[str, Any] = {"train": data}
    known = {word: part for part, words in _PARTS.items() for word in words}
    if isinstance(data, Mapping) and (
        set(data) <= set(known) or not all(isinstance(v, Tensor) for v in data.values())
    ):
        other = [key for key in data if key not in known]
        if other or not data:
            raise DatasetError(
                f"{name} is a mapping with {', '.join(map(repr, data)) or 'nothing'}; name its "
                "parts train, validation and test"
            )
        parts = {known[key]: value for key, value in data.items()}
        if len(parts) < len(data):
            raise DatasetError(
                f"{name} is a mapping with {', '.join(map(repr, data))}, two of which are one "
                "part; name its parts train, validation and test"
            )
    splits: dict[str, Split] = {}
    notes: list[str] = []
    for part, value in parts.items():
        splits[part], told = as_split(value, separate=separate, what=f"{name}, {part}")
        if splits[part].in_memory:
            check_split(splits[part], f"{name}, {part}")
        notes += told
    if "train" not in splits:
        raise DatasetError(f"{name} has no part 'train'; it holds {', '.join(splits)}")
    notes += _fill(splits, name, seed)
    return Dataset(
        name,
        splits["train"],
        splits["validation"],
        splits["test"],
        classes,
        augment,
        None,
        task,
        tuple(notes),
    )


def _fill(splits: dict[str, Split], name: str, seed: int) -> list[str]:
    """Carve validation and test where they are missing; what was done, in words."""
    missing = [part for part in ("validation", "test") if part not in splits]
    told = []
    whole = splits["train"]
    if len(whole) <= len(missing):
        raise DatasetError(
            f"{name}: {len(whole)} examples cannot be parted into train, {' and '.join(missing)}; "
            "give more, or each part by its name"
        )
    for part in missing:
        count = max(1, len(whole) // 10)
        splits["train"], splits[part] = carve(
            splits["train"], count, default=0, seed=seed + (part == "test")
        )
        told.append(
            f"{name}: {count:,} of {len(whole):,} examples were held back at random for {part}"
        )
    return told
