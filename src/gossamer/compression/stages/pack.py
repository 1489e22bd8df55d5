"""How the file is written."""

from __future__ import annotations

from typing import ClassVar, Literal

from gossamer.compression.stage import Stage
from gossamer.compression.state import State

__all__ = ["Pack"]


class Pack(Stage):
    """Write the file; once, after every stage that changes the network."""

    stage: Literal["pack"] = "pack"
    profile: Literal["smallest", "fast", "huffman"] = "smallest"

    only_before: ClassVar[tuple[str, ...] | None] = ("evaluate",)
    otherwise: ClassVar[str] = (
        "{} after pack would change nothing in the file; move pack to the end"
    )

    def run(self, state: State) -> None:
        """Nothing: the run packs at its end, with or without this stage."""
