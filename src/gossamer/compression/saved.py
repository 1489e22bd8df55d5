"""The network after a stage, as a run keeps it on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from gossamer.compression import records
from gossamer.compression.state import State
from gossamer.core.masks import Masks
from gossamer.core.plain import copied
from gossamer.core.seeds import Seed
from gossamer.training import load_checkpoint, save_atomic

__all__ = ["restore", "save"]


def save(state: State, row: dict[str, Any], path: Path) -> None:
    """Write what the later stages and the report need of this one."""
    save_atomic(
        {
            "model": state.model.state_dict(),
            "structure": [r.model_dump(mode="json") for r in state.structure],
            "fixed": sorted(state.fixed),
            "masks": dict(state.masks),
            "scan": state.scan,
            "curves": state.curves,
            "seeds": {n: asdict(s) for n, s in state.seeds.items()},
            "row": row,
        },
        path,
    )


def restore(state: State, path: Path) -> dict[str, Any]:
    """Set the state to that after the stage; returns the stage's row."""
    found = load_checkpoint(path)
    structure = records.parse(found["structure"])
    if structure != state.structure:
        state.model = records.rebuild(copied(state.origin), structure)
        state.structure = structure
    state.model.load_state_dict(found["model"])
    state.fixed = set(found["fixed"])
    state.masks = Masks(found["masks"])
    state.scan, state.curves = found["scan"], found["curves"]
    state.seeds = {n: Seed(**s) for n, s in found["seeds"].items()}
    row: dict[str, Any] = found["row"]
    return row
