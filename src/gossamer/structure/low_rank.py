"""Low-rank approximation of a layer's responses.

Zhang, Zou, He and Sun, "Accelerating very deep convolutional networks for classification and
detection", TPAMI 2016 (arXiv:1505.06798). A layer's responses ``y = W x`` (d outputs at a position,
bias included) lie near a subspace: ``y ~ M y^ + b`` with M of rank d' makes the layer two, ``Q W``
of d' filters and ``P`` of 1 x 1, where ``M = P Q``. What M is fitted to:

- *linear* (section 3.1): the responses themselves, by principal components;
- *nonlinear* (3.2): ``min sum |r(y) - r(M y^ + b)|^2``, r = ReLU, relaxed with targets z,
  ``+ lambda |z - (M y^ + b)|^2``, solved by turns: (M, b) by a generalised singular value
  decomposition, z in closed form by entry; lambda .1 for 30 turns, then 1 for 20;
- *asymmetric* (3.3): ``y`` is the original network's, ``y^`` is what the layer gives for inputs
  that the layers approximated before it make. The two are the same otherwise.

The decomposition (reduced-rank regression): with both centred, ``M^ = Z Y^T (Y Y^T)^+``; the
singular value decomposition of ``M^ Y``, cut to d' and mapped back, is ``M = U U^T M^`` where U
holds the d' leading eigenvectors of ``M^ Y Y^T M^^T``. Sums alone are needed, so a stream of
responses will do. All is in double precision.

Deviations: ``Y Y^T`` is singular where responses depend on each other; its pseudo-inverse is taken
(eigenvalues below 1e-10 of the largest count as zero), with which each turn still is an exact
minimiser. The first targets are the responses; the result is, of all turns and of the linear fit,
the one with the least ReLU error, for the relaxed objective does not bound that error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError

__all__ = [
    "TURNS",
    "Pairs",
    "Reconstruction",
    "energies",
    "fit_linear",
    "fit_nonlinear",
    "objective",
    "relu_error",
    "solve_targets",
]

TURNS = ((0.1, 30), (1.0, 20))
"""Lambda and how many turns, one after the other: the authors' code."""
_SINGULAR = 1e-10  # eigenvalues below this part of the largest are rounding


@dataclass(frozen=True)
class Reconstruction:
    """``y ~ second @ first @ y^ + bias``.

    Attributes:
        first: (rank, d), of orthonormal or mapped-back components.
        second: (d, rank), orthonormal columns.
        bias: (d,).
    """

    first: Tensor
    second: Tensor
    bias: Tensor

    @property
    def rank(self) -> int:
        """Of the product."""
        return len(self.first)

    def __call__(self, responses: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        return responses @ self.first.T @ self.second.T + self.bias


@dataclass
class Pairs:
    """Sums over pairs of responses (n, d): those of the layer now, and what they should be.

    Attributes:
        count: n.
        now, wanted: sums, (d,).
        gram: sum of y^ y^^T, (d, d); cross: of z y^^T.
    """

    count: int
    now: Tensor
    wanted: Tensor
    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, now: Tensor, wanted: Tensor) -> Pairs:
        """Of one batch.

        Raises :class:`ArgumentError` for other shapes than (n, d) of both, and NaN or infinity.
        """
        if now.ndim != 2 or now.shape != wanted.shape or not len(now):
            raise ArgumentError(
                f"responses of shapes {tuple(now.shape)} and {tuple(wanted.shape)}; give (n, d) "
                "twice, n at least 1"
            )
        y, z = now.double(), wanted.double()
        if not bool(torch.isfinite(y).all() and torch.isfinite(z).all()):
            raise ArgumentError("responses hold NaN or infinity; clean the weights and inputs")
        return cls(len(y), y.sum(0), z.sum(0), y.T @ y, z.T @ y)

    def __add__(self, other: Pairs) -> Pairs:
        """Of both batches."""
        return Pairs(
            self.count + other.count,
            self.now + other.now,
            self.wanted + other.wanted,
            self.gram + other.gram,
            self.cross + other.cross,
        )

    def centred(self) -> tuple[Tensor, Tensor]:
        """(Y Y^T, Z Y^T), each side without its own mean."""
        gram = self.gram - torch.outer(self.now, self.now) / self.count
        return (gram + gram.T) / 2, self.cross - torch.outer(self.wanted, self.now) / self.count


def energies(pairs: Pairs) -> Tensor:
    """Eigenvalues of the centred responses' Y Y^T, (d,), the largest first, none below zero."""
    gram, _ = pairs.centred()
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def fit_linear(pairs: Pairs, rank: int) -> Reconstruction:
    """The rank-limited map with the least ``sum |z - (M y^ + b)|^2``.

    Where both are the same responses this is their principal components (section 3.1).

    >>> y = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> fit_linear(Pairs.of(y, y), 1)(torch.tensor([[3.0, 1.0]], dtype=torch.float64)).tolist()
    [[3.0, 0.0]]

    Raises :class:`ArgumentError` for a rank outside 1 to d.
    """
    gram, cross = pairs.centred()
    _check_rank(rank, len(gram))
    return _reduced(cross, _inverse(gram), pairs.now, pairs.wanted, pairs.count, rank)


def fit_nonlinear(
    now: Tensor, wanted: Tensor, rank: int, *, turns: Sequence[tuple[float, int]] = TURNS
) -> Reconstruction:
    """The rank-limited map with a small ``sum |r(y) - r(M y^ + b)|^2``, r = ReLU.

    Args:
        now: y^ (n, d); wanted: y (n, d), before ReLU both.
        turns: lambda and how many turns, one after the other.

    Raises as :class:`Pairs` and :func:`fit_linear`, and for a lambda that is not positive.
    """
    pairs = Pairs.of(now, wanted)
    if any(not weight > 0 or count < 0 for weight, count in turns):
        raise ArgumentError(f"turns={turns!r}: each is a lambda above 0 and a count")
    y, target = now.double(), wanted.double().clamp_min(0)
    inverse = _inverse(pairs.centred()[0])
    found = best = fit_linear(pairs, rank)
    least = relu_error(best, y, target)
    centre = y - y.mean(0)
    for weight, count in turns:
        for _ in range(count):
            z = solve_targets(target, found(y), weight)
            cross = (z - z.mean(0)).T @ centre
            found = _reduced(cross, inverse, pairs.now, z.sum(0), len(y), rank)
            error = relu_error(found, y, target)
            if error < least:
                best, least = found, error
    return best


def solve_targets(target: Tensor, given: Tensor, weight: float) -> Tensor:
    """The z with the least ``(r(y) - r(z))^2 + weight (z - y')^2``, entry by entry.

    Args:
        target: r(y), not below zero. given: y' = M y^ + b. weight: lambda.

    >>> solve_targets(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), 1.0).tolist()
    [0.5, 1.0]
    """
    low = given.clamp_max(0)
    high = ((weight * given + target) / (weight + 1)).clamp_min(0)
    low_cost = target.square() + weight * (low - given).square()
    high_cost = (target - high).square() + weight * (high - given).square()
    return torch.where(low_cost < high_cost, low, high)


def objective(target: Tensor, z: Tensor, given: Tensor, weight: float) -> float:
    """The relaxed objective: ``sum (r(y) - r(z))^2 + weight (z - y')^2``."""
    return float((target - z.clamp_min(0)).square().sum() + weight * (z - given).square().sum())


def relu_error(found: Reconstruction, now: Tensor, target: Tensor) -> float:
    """``sum |r(y) - r(M y^ + b)|^2``; ``target``: r(y)."""
    return float((target.double() - found(now.double()).clamp_min(0)).square().sum())


def _check_rank(rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise ArgumentError(f"rank={rank} is outside 1 to {most}, the outputs of the layer")


def _inverse(gram: Tensor) -> Tensor:
    """The pseudo-inverse of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _SINGULAR * values[-1].clamp_min(0)
    inverse = torch.where(kept, 1 / values.where(kept, torch.ones_like(values)), 0.0)
    return (vectors * inverse) @ vectors.T


def _reduced(
    cross: Tensor, inverse: Tensor, now: Tensor, wanted: Tensor, count: int, rank: int
) -> Reconstruction:
    """``M = U U^T M^``, U the leading eigenvectors of ``M^ Y Y^T M^^T = Z Y^T (Y Y^T)^+ Y Z^T``."""
    whole = cross @ inverse
    explained = whole @ cross.T
    vectors = torch.linalg.eigh((explained + explained.T) / 2).eigenvectors.flip(1)[:, :rank]
    first = vectors.T @ whole
    bias = wanted / count - vectors @ (first @ (now / count))
    return Reconstruction(first, vectors, bias)
