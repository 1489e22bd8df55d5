"""Networks that answer fast: exported, compared with the original, timed in engines, compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from gossamer.runtime.plan.plan import Plan

__all__ = ["include", "load"]


def load(path: str | Path, *, cache: bool = True) -> Plan:
    """The network of a plan's file (:meth:`gossamer.runtime.plan.plan.Plan.save`), ready to run.

    Or of a ``.gsm`` file, whose plan for this processor ``gossamer compile`` left beside it.

    It takes and gives numpy arrays; torch is not imported. Kernels that this machine lacks are
    replaced by portable ones, and the example in the file is computed and compared first.

    ``cache``: what a file of a megabyte or more is packed into for this processor is kept beside
    it, and read from there the next time (:mod:`gossamer.runtime.plan.ready`).

    Raises :class:`FormatError` for a file that is damaged, or no plan, and :class:`ArgumentError`
    for a ``.gsm`` file without a plan that was made of just that file.
    """
    from gossamer.runtime.plan.plan import Plan

    if str(path).endswith(".gsm"):
        from gossamer.runtime.plan.beside import plan_of

        path = plan_of(path)
    return Plan.load(path, cache=cache)


def include() -> Path:
    """The folder of ``gossamer.h`` and ``gossamer.cpp``, which run a plan's file from C.

    ``gossamer.cpp`` is all there is to compile, for any processor; docs: Deploy, "From C".

    >>> sorted(path.name for path in include().glob("gossamer.*"))
    ['gossamer.cpp', 'gossamer.h']

    Raises :class:`FileNotFoundError` where the package was installed without its native sources.
    """
    from pathlib import Path

    from gossamer import _native

    folders = [Path(p) / "c" for p in _native.__path__]
    folders.append(Path(__file__).parents[3] / "native" / "c")  # a checkout that runs in place
    for folder in folders:
        if (folder / "gossamer.h").is_file():
            return folder
    raise FileNotFoundError(
        f"gossamer.h is in none of {', '.join(map(str, folders))}: install the package anew"
    )
