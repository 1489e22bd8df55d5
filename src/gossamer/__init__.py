"""Gossamer: from a trained PyTorch network to a small file and a fast network.

>>> import gossamer
>>> sorted(gossamer.__all__)[:4]
['Archive', 'Masked', 'Masks', 'Method']
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.masks import Masks, keep_top
    from gossamer.method import Masked, Method
    from gossamer.pack import Archive, load_into, pack, unpack
    from gossamer.pipeline import Result, compress
    from gossamer.quantize import SharedWeights, share, share_model

try:
    __version__ = version("gossamer")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

# Loaded when asked for: `import gossamer` stays light.
_HOME = {
    "Archive": "pack",
    "Masked": "method",
    "Masks": "masks",
    "Method": "method",
    "Result": "pipeline",
    "SharedWeights": "quantize",
    "compress": "pipeline",
    "keep_top": "masks",
    "load_into": "pack",
    "pack": "pack",
    "share": "quantize",
    "share_model": "quantize",
    "unpack": "pack",
}

__all__ = [
    "Archive",
    "Masked",
    "Masks",
    "Method",
    "Result",
    "SharedWeights",
    "compress",
    "keep_top",
    "load_into",
    "pack",
    "share",
    "share_model",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    return getattr(import_module(f"gossamer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
