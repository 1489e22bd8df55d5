"""Gossamer: from a trained PyTorch network to a small file and a fast network.

Everything is loaded when asked for, so that importing the package stays light.

>>> import gossamer
>>> sorted(gossamer.__all__)[:4]
['Archive', 'ArgumentError', 'Dataset', 'DatasetError']
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent


def _table() -> dict[str, tuple[str, str]]:
    """Public name -> module, and name there ("" for the module itself); read from the stub."""
    found: dict[str, tuple[str, str]] = {}
    for line in ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body:
        for alias in line.names if isinstance(line, ast.ImportFrom) else ():
            module, name = str(line.module), alias.name
            place = _ROOT.joinpath(*module.split(".")[1:], name)
            if place.is_dir() or place.with_suffix(".py").exists():
                module, name = f"{module}.{name}", ""
            found[str(alias.asname)] = module, name
    return found


_HOME = _table()
# Modules are left out of ``from gossamer import *``: their names are everyday words.
__all__ = sorted(name for name, (_, attribute) in _HOME.items() if attribute)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # as slow as all the rest

    try:
        return version("gossamer")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+source"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    module, attribute = _HOME[name]
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
