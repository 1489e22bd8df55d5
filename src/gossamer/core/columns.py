"""Rows of words as lines of text, their columns aligned."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["columns"]


def columns(rows: Sequence[Sequence[str]], left: int, *, last: bool = False) -> list[str]:
    """A line a row.

    Args:
        rows: of equally many cells.
        left: so many columns stand to the left, the others to the right.
        last: the last column stands to the left too.

    >>> columns([["layer", "ms"], ["a", "1.5"]], 1)
    ['layer   ms', 'a      1.5']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    ends = {len(widths) - 1} if last else set()
    return [
        "  ".join(
            cell.ljust(w) if i < left or i in ends else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
