"""Gossamer: from a trained PyTorch network to a small file and a fast network.

Everything is loaded when asked for, so that importing the package stays light.

>>> import gossamer
>>> sorted(gossamer.__all__)[:4]
['Archive', 'ArgumentError', 'Dataset', 'DatasetError']
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.codebook import Quantized
    from gossamer.datasets import Dataset, Split
    from gossamer.errors import (
        ArgumentError,
        DatasetError,
        FormatError,
        GossamerError,
        RecipeError,
    )
    from gossamer.masks import Masks, keep_top
    from gossamer.method import Masked, Method
    from gossamer.pack import Archive, unpack
    from gossamer.pack import load_into as load
    from gossamer.pipeline import Result, compress
    from gossamer.prune.dynamic import DynamicSparse
    from gossamer.prune.supermask import Supermask
    from gossamer.quantize import SharedWeights, share, share_model
    from gossamer.recipe import Recipe
    from gossamer.training import TrainConfig, evaluate, train

try:
    __version__ = version("gossamer")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

# name -> (module, name there)
_HOME = {
    "Archive": ("pack", "Archive"),
    "ArgumentError": ("errors", "ArgumentError"),
    "Dataset": ("datasets", "Dataset"),
    "DatasetError": ("errors", "DatasetError"),
    "DynamicSparse": ("prune.dynamic", "DynamicSparse"),
    "FormatError": ("errors", "FormatError"),
    "GossamerError": ("errors", "GossamerError"),
    "Masked": ("method", "Masked"),
    "Masks": ("masks", "Masks"),
    "Method": ("method", "Method"),
    "Quantized": ("codebook", "Quantized"),
    "Recipe": ("recipe", "Recipe"),
    "RecipeError": ("errors", "RecipeError"),
    "Result": ("pipeline", "Result"),
    "SharedWeights": ("quantize", "SharedWeights"),
    "Split": ("datasets", "Split"),
    "Supermask": ("prune.supermask", "Supermask"),
    "TrainConfig": ("training", "TrainConfig"),
    "compress": ("pipeline", "compress"),
    "evaluate": ("training", "evaluate"),
    "keep_top": ("masks", "keep_top"),
    "load": ("pack", "load_into"),
    "share": ("quantize", "share"),
    "share_model": ("quantize", "share_model"),
    "train": ("training", "train"),
    "unpack": ("pack", "unpack"),
}

__all__ = [
    "Archive",
    "ArgumentError",
    "Dataset",
    "DatasetError",
    "DynamicSparse",
    "FormatError",
    "GossamerError",
    "Masked",
    "Masks",
    "Method",
    "Quantized",
    "Recipe",
    "RecipeError",
    "Result",
    "SharedWeights",
    "Split",
    "Supermask",
    "TrainConfig",
    "compress",
    "evaluate",
    "keep_top",
    "load",
    "share",
    "share_model",
    "train",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(f"gossamer.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
