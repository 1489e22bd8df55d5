"""The 1,797 digits of 8 x 8 pixels that come with scikit-learn (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gossamer.datasets.base import Dataset, Split, balanced, carve

__all__ = ["digits"]


def digits(
    *,
    root: str | Path | None = None,
    validation: float | int | None = None,
    seed: int = 0,
    download: bool = True,
    subset: int | None = None,
) -> Dataset:
    """Digits: (N, 1, 8, 8) float32 in [0, 1]; needs no download.

    Every fifth example of each class tests, whatever the seed; 10 % of the rest validate.
    """
    images, labels = _read()
    testing = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(10):
        testing[torch.nonzero(labels == c).reshape(-1)[4::5]] = True
    everything = Split(images, labels)
    rest = everything.take(torch.nonzero(~testing).reshape(-1))
    train, held = carve(rest, validation, default=0.1, seed=seed)
    test = everything.take(torch.nonzero(testing).reshape(-1))
    return Dataset("digits", balanced(train, subset, 10, seed=seed), held, test, 10)


def _read() -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels.

    From scikit-learn's file: to import the package for it takes seconds. Where another version
    keeps it elsewhere, by the package.
    """
    package = find_spec("sklearn")
    places = [] if package is None else package.submodule_search_locations or []
    for place in places:
        path = Path(place, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            table = np.loadtxt(path, delimiter=",")
            break
    else:
        from sklearn.datasets import load_digits

        data = load_digits()
        table = np.concatenate([data.data, data.target[:, None]], 1)
    images = torch.from_numpy(table[:, :-1]).float().div_(16).reshape(-1, 1, 8, 8)
    return images, torch.from_numpy(table[:, -1]).long()
