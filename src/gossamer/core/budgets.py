"""Budgets: how many weights each layer keeps, for one density of the whole network.

- uniform: the same density in every layer.
- erdos-renyi: a layer of shape (n_out, n_in, ...) has a density proportional to
  (n_in + n_out) / (n_in n_out), so that its weights grow with its units, not with their product
  (Mocanu et al., Nature Communications 2018, equation 3).
- er-kernel: the same with the kernel's sides: (sum of the dimensions) / (their product)
  (Evci et al., ICML 2020, section 3).

A layer that would exceed density 1 is whole, and the others share what it cannot take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.masks import Masks

__all__ = ["DISTRIBUTIONS", "apportion", "layer_counts", "random_masks"]

DISTRIBUTIONS = ("uniform", "erdos-renyi", "er-kernel")


def apportion(
    shares: Mapping[str, float],
    total: int,
    capacity: Mapping[str, int],
    *,
    overflow: Literal["proportional", "equal"] = "proportional",
) -> dict[str, int]:
    """Divide ``total`` in proportion to ``shares``, none above its capacity; the sum is exact.

    Args:
        shares: name -> weight of its claim, at least 0.
        capacity: name -> the most it can take.
        overflow: what exceeds a capacity goes to the others in proportion to their shares, or
            in equal parts.

    Fractions are rounded by largest remainder, ties to the earlier name.

    >>> apportion({"a": 3.0, "b": 1.0}, 8, {"a": 4, "b": 10})
    {'a': 4, 'b': 4}

    Raises :class:`ArgumentError` when the capacities together are under ``total``, a share is
    negative or not finite, all shares are 0 while ``total`` is not, or ``overflow`` is unknown.
    """
    one_of("overflow", overflow, ("proportional", "equal"))
    if sum(capacity[n] for n in shares) < total:
        raise ArgumentError(
            f"total={total} is more than all capacities together, "
            f"{sum(capacity[n] for n in shares)}"
        )
    odd = {n: s for n, s in shares.items() if not (s >= 0 and math.isfinite(s))}
    if odd:
        raise ArgumentError(f"shares must be at least 0 and finite, got {odd}")
    whole = sum(shares.values())
    if not whole:
        if total:
            raise ArgumentError(f"all shares are 0, so total={total} has nowhere to go")
        return dict.fromkeys(shares, 0)
    exact = {n: total * s / whole for n, s in shares.items()}
    room = set(shares)
    while True:
        full = {n for n in room if exact[n] >= capacity[n]}
        excess = sum(exact[n] - capacity[n] for n in full)
        for n in full:
            exact[n] = float(capacity[n])
        room -= full
        if not full or not room or excess <= 0:
            break
        claims = {n: shares[n] if overflow == "proportional" else 1.0 for n in room}
        # Claims of 0 only: equal parts, or the excess would be lost.
        together = sum(claims.values())
        for n in room:
            exact[n] += excess * (claims[n] / together if together else 1 / len(room))
    counts = {n: min(capacity[n], math.floor(e + 1e-9)) for n, e in exact.items()}
    left = total - sum(counts.values())
    order = sorted(shares, key=lambda n: counts[n] - exact[n])  # stable: ties to the earlier
    while left > 0:
        for n in order:
            if left and counts[n] < capacity[n]:
                counts[n] += 1
                left -= 1
    return counts


def layer_counts(
    shapes: Mapping[str, Sequence[int]],
    density: float | Mapping[str, float],
    distribution: str = "uniform",
) -> dict[str, int]:
    """Weights that each layer keeps.

    Args:
        shapes: name -> shape, ``(out, in, ...)``.
        density: of all weights together, in (0, 1]; or one for each name, where ``distribution``
            plays no part.
        distribution: one of :data:`DISTRIBUTIONS`.

    The counts sum to ``density`` times all weights, rounded to nearest.

    >>> layer_counts({"a": (10, 10), "b": (10, 90)}, 0.2, "erdos-renyi")
    {'a': 33, 'b': 167}

    Raises :class:`ArgumentError` for a density outside (0, 1], an unknown distribution, no
    layers, or names that differ.
    """
    if not shapes:
        raise ArgumentError("there is no layer to make sparse; name some with include=")
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    if isinstance(density, Mapping):
        if set(density) != set(shapes):
            differing = ", ".join(sorted(set(density) ^ set(shapes)))
            raise ArgumentError(f"densities and layers name different tensors: {differing}")
        for name, value in density.items():
            _check(value, f"{name}=")
        return {n: int(density[n] * size + 0.5) for n, size in sizes.items()}
    _check(density)
    if distribution not in DISTRIBUTIONS:
        raise ArgumentError(
            f"distribution {distribution!r} is not one of {', '.join(DISTRIBUTIONS)}"
        )
    total = int(density * sum(sizes.values()) + 0.5)
    if distribution == "uniform":
        claims = {n: float(size) for n, size in sizes.items()}
    else:
        # density * size is the sum of the sides, up to one factor for all layers
        sides = slice(2) if distribution == "erdos-renyi" else slice(None)
        claims = {
            n: sum(shape[sides]) / math.prod(shape[sides]) * sizes[n]
            for n, shape in ((n, tuple(s)) for n, s in shapes.items())
        }
    return apportion(claims, total, sizes)


def _check(density: float, name: str = "=") -> None:
    if not 0 < density <= 1:
        raise ArgumentError(f"density {name}{density} is outside (0, 1] (the fraction kept)")


def random_masks(
    shapes: Mapping[str, Sequence[int]], counts: Mapping[str, int], generator: torch.Generator
) -> Masks:
    """Masks that keep ``counts[name]`` weights of each tensor at random."""
    masks = Masks()
    for name, shape in shapes.items():
        size = math.prod(shape)
        if not 0 <= counts[name] <= size:
            raise ArgumentError(f"count {name}={counts[name]} is outside [0, {size}]")
        flat = torch.zeros(size, dtype=torch.bool)
        flat[torch.randperm(size, generator=generator)[: counts[name]]] = True
        masks[name] = flat.view(tuple(shape))
    return masks
