"""What all ranks must hold alike, and how they find out that they do not.

The first thing that an exchange sends is of one size whatever the settings (layout fingerprint,
step, two numbers), so that ranks that differ never send each other messages of lengths that the
other does not expect: the transport ends a process that receives more than that. Only where
fingerprints differ are the layouts themselves compared.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import ExchangeError
from gossamer.distribute.exchange.group import AllGather
from gossamer.distribute.wire.message import Layout

__all__ = ["NUMBERS", "agree", "difference", "padded"]

NUMBERS = 2
"""How many numbers the first agreement of an exchange has, on all ranks."""


def agree(
    layout: Layout, step: int, numbers: Sequence[int], device: torch.device | str
) -> Generator[Any, Any, list[list[int]]]:
    """Everybody's numbers, by rank.

    Raises :class:`ExchangeError` on all ranks where layouts or steps differ, naming what and who.
    """
    mine = [layout.fingerprint, step, *numbers]
    data = torch.tensor(mine, dtype=torch.int64, device=device).view(torch.uint8)
    rows = torch.stack((yield AllGather(data))).cpu().view(torch.int64).tolist()
    if any(row[0] != mine[0] for row in rows):
        text = torch.frombuffer(bytearray(layout.text.encode()), dtype=torch.uint8).to(device)
        size = torch.tensor([text.numel()], device=device).view(torch.uint8)
        sizes = torch.stack((yield AllGather(size))).cpu().view(torch.int64).flatten().tolist()
        found = yield AllGather(padded(text, max(sizes)))
        texts = [bytes(t[:n].tolist()).decode() for t, n in zip(found, sizes, strict=True)]
        raise ExchangeError(
            f"the ranks do not exchange the same: {difference(texts)}. Build the same model with "
            "the same settings on every rank"
        )
    if any(row[1] != step for row in rows):
        raise ExchangeError(
            f"the ranks are not at the same step: {_by_value([str(row[1]) for row in rows])}. "
            "Load the same checkpoint on every rank, and exchange equally often"
        )
    return [row[2:] for row in rows]


def padded(data: Tensor, size: int) -> Tensor:
    """Bytes made longer; what follows is never read."""
    if data.numel() == size:
        return data
    out = data.new_zeros(size)
    out[: data.numel()] = data
    return out


def difference(texts: Sequence[str]) -> str:
    """How the layouts of the ranks, in order, differ: all settings that do, else a parameter.

    >>> difference(["seed = 0\\na 3 exact", "seed = 0\\na 3 exact", "seed = 1\\na 3 exact"])
    'seed is 0 on ranks 0, 1 and 1 on rank 2'
    >>> difference(["seed = 0\\na 3 exact", "seed = 0"])
    "'a 3 exact' on rank 0 and nothing on rank 1"
    """
    found = []
    for lines in zip_longest(*(text.split("\n") for text in texts)):
        if len(set(lines)) == 1:
            continue
        pairs = [(line or "").partition(" = ") for line in lines]
        name, equals, _ = pairs[0]
        if equals and all(pair[:2] == (name, equals) for pair in pairs):
            found.append(f"{name} is {_by_value([value for _, _, value in pairs])}")
        elif not found:  # what settings make of a parameter is no difference of its own
            return _by_value([repr(line) if line else "nothing" for line in lines])
    return "; ".join(found) or "in nothing"


def _by_value(values: Sequence[str]) -> str:
    """Which ranks have what."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return " and ".join(
        f"{value} on rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}"
        for value, who in ranks.items()
    )
