"""Whether data are what they must be: looked at once, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gossamer.core import nest
from gossamer.core.errors import DatasetError
from gossamer.datasets.base import Dataset, Split

__all__ = ["check", "check_split"]


def check_split(split: object, where: str = "split") -> None:
    """Raise :class:`DatasetError` where a split is none, or holds no tensors of one length.

    Values are not looked at; ``where`` names the split in messages.
    """
    if not isinstance(split, Split):
        raise DatasetError(
            f"{where} is of type {type(split).__name__}; give gossamer.Split(inputs, targets) with "
            "all examples as two tensors"
        )
    if not split.in_memory:
        return
    _check_tensors(split.stored, f"{where}: inputs", _FIXES["inputs"])
    if split.targets is not None:
        _check_tensors(split.targets, f"{where}: targets", _FIXES["targets"])
        numbers = [len(nest.leaves(part)[0]) for part in (split.stored, split.targets)]
        if numbers[0] != numbers[1]:
            raise DatasetError(
                f"{where}: {numbers[0]} inputs but {numbers[1]} targets; give one target for "
                "each input"
            )
    if split.mean is not None and split.std is not None:
        _check_scale(split.stored, split.mean, split.std, where)


_FIXES = {
    "inputs": "give a float32 tensor, such as torch.tensor(values, dtype=torch.float32)",
    "targets": "give class indices as an int64 tensor, one for each input",
}


def _check_tensors(value: object, what: str, fix: str) -> None:
    """A tensor, or a tuple or mapping of tensors of one length."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            _check_tensor(part, f"{what}[{key!r}]", fix)
    elif isinstance(value, tuple) and value:
        for number, part in enumerate(value):
            _check_tensor(part, f"{what}[{number}]", fix)
    else:
        _check_tensor(value, what, fix)
    if len({len(t) for t in nest.leaves(value)}) > 1:
        raise DatasetError(
            f"{what}: {nest.shown(value)} differ in their first dimension, which counts the "
            "examples"
        )


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
    if stored.dtype != torch.uint8:
        raise DatasetError(
            f"{where}: mean and std are of uint8 images, which are divided by 255 first, but "
            f"inputs are {stored.dtype}; normalise them ((x - mean) / std), and leave both out"
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
    classes = dataset.classes
    whole = isinstance(classes, int) and not isinstance(classes, bool)
    if classes is not None and (not whole or classes < 1):
        raise DatasetError(
            f"dataset {dataset.name!r}: classes={classes!r} must be a whole number from 1"
        )
    for part in ("train", "validation", "test"):
        split: Split = getattr(dataset, part)
        where = f"dataset {dataset.name!r}, {part}"
        check_split(split, where)
        if not len(split):
            if part == "validation":
                continue  # allowed: nothing is validated then
            raise DatasetError(f"{where} is empty")
        if split.in_memory:
            _check_inputs(split, dataset, where)
            if isinstance(split.targets, Tensor):
                _check_targets(split.targets, classes, where)
    return dataset


def _check_inputs(split: Split, dataset: Dataset, where: str) -> None:
    first = dataset.train.one()[0] if len(dataset.train) else split.one()[0]
    if not isinstance(split.stored, Tensor):
        mine, other = nest.shown(split.one()[0]), nest.shown(first)
        if mine != other:
            raise DatasetError(f"{where}: inputs are {mine}, those of train {other}")
        for number, stored in enumerate(nest.leaves(split.stored)):
            if stored.is_floating_point():
                _check_finite(stored, f"{where}: inputs, tensor {number + 1},")
        return
    kind = split.stored.dtype
    if kind not in _KINDS and not (kind == torch.uint8 and split.mean is not None):
        raise DatasetError(
            f"{where}: inputs are {kind}; use float32 (.float()), int64 token ids, or uint8 "
            "images with mean and std"
        )
    if split.stored.shape[1:] != first.shape:
        raise DatasetError(
            f"{where}: inputs of shape {tuple(split.stored.shape[1:])}, those of train have "
            f"{tuple(first.shape)}"
        )
    if split.stored.is_floating_point():
        _check_finite(split.stored, f"{where}: inputs")
    elif kind == torch.int64:
        _check_tokens(split.stored, dataset.vocabulary, where)


_KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int64)


def _check_finite(stored: Tensor, what: str) -> None:
    bad = _first_not_finite(stored)
    if bad is not None:
        raise DatasetError(
            f"{what} hold NaN or infinity, first in example {bad}; clean them "
            "first, or leave such examples out"
        )


def _check_targets(targets: Tensor, classes: int | None, where: str) -> None:
    if targets.is_floating_point():
        _check_finite(targets, f"{where}: targets")
        return  # values, which the task judges
    counted = targets
    if targets.ndim > 1:
        counted = targets[targets != -100]  # torch's own mark of what does not count
        if not counted.numel():
            return
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or (classes is not None and high >= classes):
        allowed = "0 and more" if classes is None else f"0 to {classes - 1}"
        raise DatasetError(
            f"{where}: targets reach from {low} to {high}, but classes={classes} allows {allowed}"
        )
    if targets.dtype != torch.int64:
        raise DatasetError(f"{where}: targets are {targets.dtype}; use torch.int64 (.long())")


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
