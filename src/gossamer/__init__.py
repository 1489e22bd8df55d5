"""Gossamer: from a trained PyTorch network to a small file and a fast network.

Everything is loaded when asked for, so that importing the package stays light.

>>> import gossamer
>>> sorted(gossamer.__all__)[:4]
['Archive', 'ArgumentError', 'Dataset', 'DatasetError']
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any


@cache
def _table() -> dict[str, tuple[str, str]]:
    """Public name -> module, and name there ("" for the module itself); read from the stub."""
    import ast  # with pathlib it takes longer than all that the runtime imports
    from pathlib import Path

    here = Path(__file__)
    found: dict[str, tuple[str, str]] = {}
    for line in ast.parse(here.with_suffix(".pyi").read_text()).body:
        for alias in line.names if isinstance(line, ast.ImportFrom) else ():
            module, name = str(line.module), alias.name
            place = here.parent.joinpath(*module.split(".")[1:], name)
            if place.is_dir() or place.with_suffix(".py").exists():
                module, name = f"{module}.{name}", ""
            found[str(alias.asname)] = module, name
    return found


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # as slow as all the rest

    try:
        return version("gossamer")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+source"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name == "__all__":
        # modules are left out of ``from gossamer import *``: their names are everyday words
        return sorted(name for name, (_, attribute) in _table().items() if attribute)
    if name.startswith("__") or name not in _table():
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    module, attribute = _table()[name]
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *_table()})
