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
    from gossamer.deploy.fold import fold_batchnorm
    from gossamer.deploy.structure import load
    from gossamer.distill import soft_targets
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
    from gossamer.pipeline import Result, compress
    from gossamer.prune.dynamic import DynamicSparse
    from gossamer.prune.supermask import Supermask
    from gossamer.quantize import (
        LSQ,
        TTQ,
        IntegerNetwork,
        LossAware,
        Precision,
        Projected,
        QuantizedReLU,
        SharedWeights,
        calibrate,
        quantize_activations_,
        share,
        share_model,
    )
    from gossamer.quantizer import Quantizer
    from gossamer.recipe import Recipe
    from gossamer.training import TrainConfig, evaluate, train

try:
    __version__ = version("gossamer")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

# name -> (module, name there)
_HOME = {
    "LSQ": ("quantize.lsq", "LSQ"),
    "TTQ": ("quantize.ttq", "TTQ"),
    "Archive": ("pack", "Archive"),
    "ArgumentError": ("errors", "ArgumentError"),
    "Dataset": ("datasets", "Dataset"),
    "DatasetError": ("errors", "DatasetError"),
    "DynamicSparse": ("prune.dynamic", "DynamicSparse"),
    "FormatError": ("errors", "FormatError"),
    "GossamerError": ("errors", "GossamerError"),
    "IntegerNetwork": ("quantize.integer", "IntegerNetwork"),
    "LossAware": ("quantize.loss_aware", "LossAware"),
    "Masked": ("method", "Masked"),
    "Masks": ("masks", "Masks"),
    "Method": ("method", "Method"),
    "Precision": ("quantize.network", "Precision"),
    "Projected": ("quantize.projected", "Projected"),
    "Quantized": ("codebook", "Quantized"),
    "QuantizedReLU": ("quantize.activations", "QuantizedReLU"),
    "Quantizer": ("quantizer", "Quantizer"),
    "Recipe": ("recipe", "Recipe"),
    "RecipeError": ("errors", "RecipeError"),
    "Result": ("pipeline", "Result"),
    "SharedWeights": ("quantize", "SharedWeights"),
    "Split": ("datasets", "Split"),
    "Supermask": ("prune.supermask", "Supermask"),
    "TrainConfig": ("training", "TrainConfig"),
    "calibrate": ("quantize.network", "calibrate"),
    "compress": ("pipeline", "compress"),
    "evaluate": ("training", "evaluate"),
    "fold_batchnorm": ("deploy.fold", "fold_batchnorm"),
    "keep_top": ("masks", "keep_top"),
    "load": ("deploy.structure", "load"),
    "quantize_activations_": ("quantize.activations", "quantize_activations_"),
    "share": ("quantize", "share"),
    "share_model": ("quantize", "share_model"),
    "soft_targets": ("distill", "soft_targets"),
    "train": ("training", "train"),
    "unpack": ("pack", "unpack"),
}

__all__ = [
    "LSQ",
    "TTQ",
    "Archive",
    "ArgumentError",
    "Dataset",
    "DatasetError",
    "DynamicSparse",
    "FormatError",
    "GossamerError",
    "IntegerNetwork",
    "LossAware",
    "Masked",
    "Masks",
    "Method",
    "Precision",
    "Projected",
    "Quantized",
    "QuantizedReLU",
    "Quantizer",
    "Recipe",
    "RecipeError",
    "Result",
    "SharedWeights",
    "Split",
    "Supermask",
    "TrainConfig",
    "calibrate",
    "compress",
    "evaluate",
    "fold_batchnorm",
    "keep_top",
    "load",
    "quantize_activations_",
    "share",
    "share_model",
    "soft_targets",
    "train",
    "unpack",
]


# modules of the package that ``import gossamer`` alone makes usable: ``gossamer.datasets.load``
_MODULES = (
    "analysis",
    "budgets",
    "codebook",
    "curvature",
    "datasets",
    "deploy",
    "distill",
    "distribute",
    "errors",
    "factorize",
    "masks",
    "method",
    "names",
    "nets",
    "pack",
    "pipeline",
    "progress",
    "prune",
    "quantize",
    "quantizer",
    "reallocation",
    "recipe",
    "report",
    "reproduce",
    "schedule",
    "seeded",
    "theory",
    "training",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"gossamer.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(f"gossamer.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
