"""The 1,797 digits of 8 x 8 pixels that come with scikit-learn (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from pathlib import Path

import torch

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
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().div_(16).unsqueeze(1)
    labels = torch.from_numpy(data.target).long()
    testing = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(10):
        testing[torch.nonzero(labels == c).reshape(-1)[4::5]] = True
    everything = Split(images, labels)
    rest = everything.take(torch.nonzero(~testing).reshape(-1))
    train, held = carve(rest, validation, default=0.1, seed=seed)
    test = everything.take(torch.nonzero(testing).reshape(-1))
    return Dataset("digits", balanced(train, subset, 10, seed=seed), held, test, 10)
