"""Files of inputs: what somebody has at hand who has no labels."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gossamer.core.errors import DatasetError
from gossamer.datasets.given import LABELS

__all__ = ["FILES", "read"]

FILES = (".npy", ".npz", ".safetensors", ".pt")


def read(path: str | Path) -> Any:
    """What :func:`gossamer.datasets.as_dataset` makes a dataset of.

    ``.npy``: an array of inputs, (N, ...). ``.npz``, ``.safetensors``: arrays by name, which the
    network takes by these names; one under a name of :data:`gossamer.datasets.given.LABELS` is the
    targets, and a single other one is fed as it is. ``.pt``: tensors, or tuples, lists and
    dictionaries of them, such as a list of batches; nothing in it is run.

    Raises :class:`DatasetError` for a file that is missing, damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"there is no file {path.absolute()}")
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        if path.suffix == ".safetensors":
            found: dict[str, Tensor] = load_file(path)
        else:
            given = np.load(path, allow_pickle=False)
            if isinstance(given, np.ndarray):
                return torch.from_numpy(given)
            found = {name: torch.from_numpy(given[name]) for name in given.files}
    except (pickle.UnpicklingError, OSError, ValueError, LookupError, TypeError, RuntimeError,
            EOFError, SafetensorError) as e:  # fmt: skip
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise DatasetError(
            f"{path} cannot be read as {path.suffix} of plain arrays: {reason}; write it anew "
            "with numpy.save, numpy.savez, safetensors or torch.save"
        ) from e
    rest = [name for name in found if name not in LABELS]
    if len(rest) == 1 and len(found) > 1:  # inputs and targets
        targets = next(found[name] for name in found if name in LABELS)
        return [(found[rest[0]], targets)]
    return found[rest[0]] if len(rest) == 1 else found
