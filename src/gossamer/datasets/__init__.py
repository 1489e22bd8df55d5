"""Datasets in memory; they know nothing of the rest.

:func:`load` makes them by name: ``digits`` (embedded), ``mnist``, ``cifar10``,
``text:NAME-or-FILE`` (language models), or a user's own ``module:function`` that returns a
:class:`Dataset`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from gossamer.core.errors import ArgumentError
from gossamer.core.locate import called, function
from gossamer.datasets.base import Dataset, Split, balanced, batches, carve
from gossamer.datasets.checks import check, check_split
from gossamer.datasets.cifar10 import cifar10, crop_and_flip
from gossamer.datasets.digits import digits
from gossamer.datasets.files import FILES, read
from gossamer.datasets.given import Collated, as_dataset, as_split
from gossamer.datasets.mnist import mnist, read_idx
from gossamer.datasets.text import text

__all__ = [
    "DATASETS",
    "Collated",
    "Dataset",
    "Split",
    "as_dataset",
    "as_split",
    "balanced",
    "batches",
    "carve",
    "check",
    "check_split",
    "crop_and_flip",
    "load",
    "read_idx",
    "text",
]

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
}


def load(
    name: str,
    *,
    root: str | Path | None = None,
    validation: float | int | None = None,
    seed: int = 0,
    download: bool = True,
    subset: int | None = None,
    **options: Any,
) -> Dataset:
    """A dataset by name.

    Args:
        name: one of :data:`DATASETS`; ``text:tiny-shakespeare``, ``text:war-and-peace`` or
            ``text:PATH``, with options after a question mark if wanted
            (``text:war-and-peace?level=word&bptt=35``, see :func:`text`); or ``module:function``
            (the current directory is importable; the function may take any of these keyword
            arguments, and returns what :func:`as_dataset` takes); or a file of inputs
            (:func:`gossamer.datasets.files.read`).
        root: folder with the data; None: ``$GOSSAMER_DATA``, ``../shared/data``, the user cache.
        validation: fraction or number of training examples held back; None: the dataset's own
            default. The test split is never touched.
        seed: of the validation split and the subset.
        download: allow downloads (checked by md5).
        subset: train on a class-balanced subset of this many examples.
        options: what this dataset takes besides.

    Raises :class:`ArgumentError` for an unknown name or option, :class:`DatasetError` for data
    that are missing or unsound.
    """
    if not isinstance(name, str):
        raise ArgumentError(
            f"dataset is of type {type(name).__name__}; give a name, or data themselves through "
            "gossamer.datasets.as_dataset"
        )
    if seed < 0:
        raise ArgumentError(f"seed={seed} must be 0 or more")
    common = {
        "root": root,
        "validation": validation,
        "seed": seed,
        "download": download,
        "subset": subset,
    }
    if name in DATASETS:
        return _call(DATASETS[name], f"dataset {name!r}", **common, **options)
    if name.startswith("text:"):
        source, _, query = name.removeprefix("text:").partition("?")
        asked = parse_qsl(query)
        given: dict[str, Any] = {**dict(asked), **options}
        twice = [key for key, _ in asked if key in (*common, "source")]
        twice += [key for key, _ in asked if [k for k, _ in asked].count(key) > 1]
        if twice:
            raise ArgumentError(
                f"dataset {name!r}: {twice[0]} is no option of its name, or given twice; the name "
                "takes level, bptt and vocabulary, once each"
            )
        for key in ("bptt", "vocabulary"):
            if isinstance(given.get(key), str):
                if not given[key].isdecimal():
                    raise ArgumentError(f"dataset {name!r}: {key}={given[key]!r} is no number")
                given[key] = int(given[key])
        return _call(text, f"dataset {name!r}", source=source, **common, **given)
    if Path(name).suffix in FILES:
        made = as_dataset(read(name), name=Path(name).name, seed=seed, **options)
        return replace(check(made), train=balanced(made.train, subset, None, seed=seed))
    if ":" not in name:
        raise ArgumentError(
            f"dataset {name!r} is not one of {', '.join(DATASETS)}, 'text:NAME-or-FILE', "
            f"'module:function', a file of inputs ({', '.join(FILES)})"
        )
    make, shrink = function(name, "dataset"), None
    accepted = inspect.signature(make).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        ignored = [k for k in ("root", "validation") if common[k] is not None and k not in accepted]
        if ignored:
            raise ArgumentError(
                f"dataset {name!r} takes no {ignored[0]}=; add the argument to the function, or "
                "leave it out"
            )
        shrink = None if "subset" in accepted else subset
        common = {k: v for k, v in common.items() if k in accepted}
    made = as_dataset(_call(make, f"dataset {name!r}", **common, **options), name=name, seed=seed)
    check(made)
    if shrink is None:
        return made
    return replace(made, train=balanced(made.train, shrink, made.classes, seed=seed))


def _call(make: Callable[..., Dataset], what: str, **options: Any) -> Dataset:
    try:
        inspect.signature(make).bind(**options)
    except TypeError as e:
        raise ArgumentError(f"{what}: {e}; it takes {inspect.signature(make)}") from e
    return called(make, what, **options)
