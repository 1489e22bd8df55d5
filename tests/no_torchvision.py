"""A torchvision built for another torch raises on import; it is taken out of the way.

The trainers import it where it is installed, though no test of ours needs it. Run as a script,
with a script and its arguments, it does so for that one.
"""

import importlib.metadata
import runpy
import sys
from pathlib import Path
from typing import Any


def hide() -> None:
    """Neither the module nor its metadata are found, where it cannot be imported."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return  # there is none
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        return
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    whole: Any = importlib.metadata.Distribution.from_name.__func__  # type: ignore[attr-defined]

    def from_name(cls: Any, name: str) -> Any:
        if name.lower() == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return whole(cls, name)

    importlib.metadata.Distribution.from_name = classmethod(from_name)  # type: ignore[assignment]


if __name__ == "__main__":
    hide()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # the script's folder, not this one's
    runpy.run_path(sys.argv[0], run_name="__main__")
