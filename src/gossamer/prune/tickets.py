"""One small file for every round's masks.

Per weight the file holds the round that removed it, 0 for a survivor of all, as an entropy-coded
integer tensor; the rounds' figures are in its metadata.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.masks import Masks
from gossamer.pack import Archive, pack

__all__ = ["Tickets", "load_tickets", "save_tickets"]

_FORMAT = 1  # of the metadata


@dataclass(frozen=True)
class Tickets:
    """What a search found.

    Attributes:
        masks: each round's, the dense network's first; each within the one before.
        rows: one a finished round: round, density, densities (by layer), and what the training
            function returned.
        settings: of the search.
    """

    masks: list[Masks]
    rows: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def save_tickets(path: str | Path, tickets: Tickets) -> int:
    """Write the masks of all rounds as one file, atomically; returns its bytes.

    Raises :class:`ArgumentError` for no masks, masks of different tensors, or not nested.
    """
    masks = tickets.masks
    if not masks:
        raise ArgumentError("tickets.masks is empty; give at least one round's")
    removed = {n: torch.zeros(m.shape, dtype=torch.int32) for n, m in masks[0].items()}
    before = Masks({n: torch.ones_like(m) for n, m in masks[0].items()})
    for number, current in enumerate(masks):
        if set(current) != set(removed):
            raise ArgumentError(f"masks of round {number} are of other tensors than round 0's")
        current.check(removed)
        for name, mask in current.items():
            if bool((mask & ~before[name]).any()) or not (number or bool(mask.all())):
                raise ArgumentError(
                    f"mask {name!r} of round {number} is not within round {number - 1}'s; the "
                    "first must keep all, and each those within the one before"
                )
            removed[name][(before[name] & ~mask).cpu()] = number
        before = current
    kind = torch.uint8 if len(masks) <= 256 else torch.int32
    about = {
        "gossamer_tickets": _FORMAT,
        "rounds": len(masks) - 1,
        "rows": tickets.rows,
        "settings": tickets.settings,
    }
    with pack({n: t.to(kind) for n, t in removed.items()}, path, metadata=about) as archive:
        return archive.file_bytes


def load_tickets(path: str | Path) -> Tickets:
    """Masks, rows and settings of a file of :func:`save_tickets`; nothing in it is executed.

    Raises :class:`FormatError` when the file is damaged or of another kind.
    """
    with Archive(path) as archive:
        about = archive.metadata
        rounds, rows = about.get("rounds"), about.get("rows")
        mine = about.get("gossamer_tickets") == _FORMAT
        if not (mine and isinstance(rounds, int) and rounds >= 0 and isinstance(rows, list)):
            raise FormatError(f"{path} is no tickets file of this version")
        removed = {name: archive.tensor(name) for name in archive.names}
    for name, tensor in removed.items():
        whole = tensor.dtype in (torch.uint8, torch.int32)
        if not whole or (tensor.numel() and not 0 <= int(tensor.max()) <= rounds):
            raise FormatError(f"{path}: {name!r} names rounds outside 0 to {rounds}")
    masks = [Masks({n: (t == 0) | (t > r) for n, t in removed.items()}) for r in range(rounds + 1)]
    return Tickets(masks, rows, about.get("settings", {}))
