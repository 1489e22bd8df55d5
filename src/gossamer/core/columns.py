"""Rows of words as lines of text, their columns aligned."""

from __future__ import annotations

from collections.abc import Container, Sequence

__all__ = ["columns"]


def columns(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """A line a row.

    Args:
        rows: of equally many cells.
        left: numbers of the columns that stand to the left; the others stand to the right.

    >>> columns([["layer", "ms"], ["a", "1.5"]])
    ['layer   ms', 'a      1.5']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
