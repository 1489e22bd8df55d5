"""Where data and a user's own code are found; shared by datasets and networks."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gossamer.core.errors import ArgumentError, DatasetError, GossamerError

__all__ = ["cache_folder", "called", "failure", "find", "function", "places"]


def cache_folder() -> Path:
    """The user's cache: ``$XDG_CACHE_HOME/gossamer``, by default ``~/.cache/gossamer``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "gossamer"


def places(root: str | Path | None = None) -> list[Path]:
    """The folders looked at for data, first to last; downloads go to the last one.

    ``root`` alone where it is given; else ``$GOSSAMER_DATA``, ``../shared/data`` where there is
    such a folder, and the user's cache.
    """
    if root is not None:
        return [Path(root).expanduser()]
    found = []
    if os.environ.get("GOSSAMER_DATA"):
        found.append(Path(os.environ["GOSSAMER_DATA"]).expanduser())
    shared = Path.cwd().parent / "shared" / "data"
    if shared.is_dir():
        found.append(shared)
    found.append(cache_folder())
    return found


def find(relative: str, root: str | Path | None = None) -> Path:
    """The first existing ``place / relative``.

    Raises :class:`DatasetError` naming every place looked at and the fix.
    """
    looked = [place / relative for place in places(root)]
    for path in looked:
        if path.exists():
            return path
    raise DatasetError(
        f"no {relative}; looked at {', '.join(map(str, looked))}. Put it into one of these, or "
        "name the folder that holds it with root= or $GOSSAMER_DATA"
    )


def function(spec: str, what: str) -> Callable[..., Any]:
    """The user's own ``module:function`` or ``path/to/file.py:function``.

    The current directory, or the file's, is importable. ``what`` names the thing in messages
    ("dataset", "network"). Raises :class:`ArgumentError` when the module does not import, or has
    no such callable.
    """
    module_name, _, attribute = spec.rpartition(":")
    if not module_name or not attribute:
        raise ArgumentError(f"{what} {spec!r} is not of the form 'module:function'")
    here, file = str(Path.cwd()), None
    if module_name.endswith(".py"):
        file = Path(module_name).expanduser().resolve()
        if not file.is_file():
            raise ArgumentError(f"{what} {spec!r}: there is no file {file}")
        here, module_name = str(file.parent), file.stem
    if here not in sys.path:  # stays: the function may import its neighbours when it is called
        sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        raise ArgumentError(
            f"{what} {spec!r}: no module named {e.name!r}; looked in {here} and the installed "
            "packages. Run from the folder that holds it, or install it"
        ) from e
    except (ImportError, SyntaxError) as e:
        raise ArgumentError(f"{what} {spec!r}: module {module_name!r} does not import: {e}") from e
    except GossamerError:
        raise
    except (Exception, SystemExit) as e:  # the user's own code may raise anything
        raise ArgumentError(f"{what} {spec!r}: module {module_name!r} {failure(e)}") from e
    if file is not None and Path(module.__file__ or "").resolve() != file:
        raise ArgumentError(
            f"{what} {spec!r}: {module_name!r} is the name of another module, "
            f"{module.__file__ or 'built in'}; rename the file"
        )
    value: Any = module
    for part in attribute.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        known = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ArgumentError(
            f"{what} {spec!r}: {module_name} has no function {attribute!r}; "
            f"it has: {', '.join(known[:20]) or 'none'}"
        )
    return value


def called(make: Callable[..., Any], what: str, /, *given: Any, **options: Any) -> Any:
    """What a user's function returns; what it raises is told with file and line.

    Raises :class:`ArgumentError` in place of the function's own errors, which stay its cause;
    the library's and the system's (``OSError``) pass as they are.
    """
    try:
        return make(*given, **options)
    except (GossamerError, OSError):
        raise
    except (Exception, SystemExit) as e:  # the user's own code may raise anything
        raise ArgumentError(f"{what} {failure(e)}") from e


def failure(error: BaseException) -> str:
    """An error of somebody's code in one sentence: where it happened, and what it says."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and "/gossamer/" not in frame.filename
    ]
    place = f" at {own[-1].filename}, line {own[-1].lineno}" if own else ""
    fix = ""
    if "CUDA" in said or "NVIDIA" in said:
        fix = "; there is no usable GPU here: leave out .cuda(), or map to the CPU"
    return f"fails{place}: {type(error).__name__}: {said[:300]}{fix}"
