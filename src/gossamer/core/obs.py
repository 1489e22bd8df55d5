"""Optimal Brain Surgeon, layer by layer: weights removed or rounded, each error carried on.

- Hassibi, Stork, *Second order derivatives for network pruning: Optimal Brain Surgeon*, NIPS 1993:
  what the other weights do best when one is set to another value.
- Frantar, Alistarh, *Optimal Brain Compression*, NeurIPS 2022, arXiv 2208.11580: the same for a
  layer's output, where the Hessian is that of its inputs.

A layer's rows are independent: minimise (w - q) H (w - q)^T / 2 with H = X X^T over the layer's
inputs. Let U be upper with U^T U = H^-1. Column after column a value q_j is chosen, and the
columns behind take up what it leaves: err = (w_j - q_j) / U_jj, w_k -= err U_jk for k > j. Choosing
q_j costs err^2 / 2 exactly. Everything is computed in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError

__all__ = ["Choice", "Kept", "Solved", "factor", "solve", "start_from"]


class Choice(ABC):
    """What the columns of a layer become. ``rows`` are the layer's outputs."""

    def begin(self, weight: Tensor, diagonal: Tensor) -> None:  # noqa: B027 (optional)
        """Before the first column: ``weight`` (rows, columns), and U's ``diagonal`` (columns,)."""

    def block(self, start: int, weight: Tensor, diagonal: Tensor) -> None:  # noqa: B027 (optional)
        """Before the columns from ``start`` on, (rows, width), with all errors carried so far."""

    @abstractmethod
    def column(self, number: int, weight: Tensor, diagonal: Tensor) -> Tensor:
        """The values (rows,) of a column.

        Args:
            number: of the column.
            weight: (rows, columns that are left of its block), the column first, float64.
            diagonal: of U, for the same columns.
        """


class Kept(Choice):
    """Every value as it is."""

    def column(self, number: int, weight: Tensor, diagonal: Tensor) -> Tensor:
        """The column."""
        return weight[:, 0].clone()


@dataclass(frozen=True)
class Solved:
    """What :func:`solve` leaves.

    Attributes:
        weight: (rows, columns), float64.
        cost: (rows,): (w - q) H (w - q)^T / 2, H damped.
    """

    weight: Tensor
    cost: Tensor


def _damped(hessian: Tensor, damp: float) -> Tensor:
    """float64, with ``damp`` of the mean diagonal added; inputs that are always 0 count 1."""
    h = hessian.detach().double().clone()
    if h.ndim != 2 or h.shape[0] != h.shape[1]:
        raise ArgumentError(f"hessian has shape {tuple(h.shape)}; it must be square")
    if not torch.isfinite(h.sum()):  # of all, without a copy
        raise ArgumentError("hessian holds NaN or infinity; look at the calibration inputs")
    if not damp >= 0:
        raise ArgumentError(f"damp={damp} must be at least 0")
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    diagonal += damp * mean
    # an input that is always 0 says nothing of its weights: they keep to themselves
    diagonal[hessian.diagonal() == 0] = mean if mean > 0 else 1.0
    return h


def factor(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """U, upper and float64, with U^T U the inverse of the damped Hessian.

    Args:
        hessian: (columns, columns), symmetric.
        damp: of the mean diagonal, added to the diagonal; doubled until the matrix is definite.

    Raises :class:`ArgumentError` for one that is not square, not finite or not positive.
    """
    for _ in range(40):
        # one copy is all that is made: a symmetric matrix's transpose is what LAPACK overwrites
        found, info = _damped(hessian, damp).mT, _info(hessian)
        torch.linalg.cholesky_ex(found, out=(found, info))
        if not info:
            torch.cholesky_inverse(found, out=found)
            torch.linalg.cholesky_ex(found, upper=True, out=(found, info))
            if not info:
                return found
        damp = max(2 * damp, 1e-10)
    raise ArgumentError(
        "hessian is not positive: it is no sum of products of inputs; accumulate X^T X"
    )


def _info(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int32, device=like.device)


def start_from(weight: Tensor, hessian: Tensor, cross: Tensor, damp: float = 0.01) -> Tensor:
    """The weights whose outputs on other inputs are nearest to the layer's own, before any choice.

    Minimises |W X - V Y|^2 over V, Y the inputs that the layer has by now (those of a network
    whose earlier layers are compressed), damped towards W.

    Args:
        weight: W (rows, columns).
        hessian: Y Y^T.
        cross: X Y^T.

    Returns V, float64; W where Y is X.
    """
    h, w, info = _damped(hessian, damp).mT, weight.detach().double(), _info(hessian)
    wanted = w @ cross.detach().double()
    wanted.addcmul_(w, h.diagonal() - hessian.detach().double().diagonal())
    torch.linalg.cholesky_ex(h, out=(h, info))
    if info:  # not definite by rounding
        return torch.linalg.solve(_damped(hessian, damp), wanted.T).T
    # as cholesky_solve, which would copy the factor
    half = torch.linalg.solve_triangular(h, wanted.T, upper=False)
    return torch.linalg.solve_triangular(h.mT, half, upper=True).T


def _carry(
    part: Tensor, inner: Tensor, errors: Tensor, taken: Tensor, choose: Callable[[int], Tensor]
) -> None:
    """Choose the columns of a block; what each leaves goes to those behind, in place.

    Args:
        part: (rows, width), the weights with all errors carried so far.
        inner: (width, width), U there.
        errors, taken: of ``part``'s shape, written: each column's error, and its values.
        choose: number of a column in the block -> its values.
    """
    for j in range(part.shape[1]):
        value = choose(j)
        error = (part[:, j] - value) / inner[j, j]
        taken[:, j], errors[:, j] = value, error
        part[:, j + 1 :].addr_(error, inner[j, j + 1 :], alpha=-1.0)


def _carry_numpy(
    part: Tensor, inner: Tensor, errors: Tensor, taken: Tensor, choose: Callable[[int], Tensor]
) -> None:
    """:func:`_carry` in main memory: on a layer's few rows an operation of torch costs more to
    call than to compute.
    """
    p, u, e, t = (tensor.numpy() for tensor in (part, inner, errors, taken))
    for j in range(p.shape[1]):
        t[:, j] = value = choose(j).numpy()
        e[:, j] = error = (p[:, j] - value) / u[j, j]
        p[:, j + 1 :] -= np.multiply.outer(error, u[j, j + 1 :])


@torch.no_grad()
def solve(
    weight: Tensor, upper: Tensor, choice: Choice, *, block: int = 128, order: Tensor | None = None
) -> Solved:
    """Choose the columns one after the other, each one's error carried to those behind.

    Args:
        weight: (rows, columns).
        upper: of :func:`factor`, its columns in the order given.
        choice: what the columns become.
        block: columns that are looked at together.
        order: a permutation of the columns in which they are chosen; ``upper`` is then of the
            Hessian permuted alike. ``choice`` sees places in that order.

    Raises :class:`ArgumentError` where shapes do not fit.
    """
    rows, columns = weight.shape
    if upper.shape != (columns, columns):
        raise ArgumentError(
            f"upper has shape {tuple(upper.shape)} for a weight of {columns} columns"
        )
    w = weight.detach().double().clone()
    if order is not None:
        w = w[:, order]
    diagonal = upper.diagonal()
    out, cost = torch.empty_like(w), torch.zeros(rows, dtype=torch.float64, device=w.device)
    choice.begin(w, diagonal)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, inner = w[:, start:stop], upper[start:stop, start:stop]
        choice.block(start, part, diagonal[start:stop])
        errors, taken = torch.empty_like(part), out[:, start:stop]
        carry = _carry_numpy if w.device.type == "cpu" else _carry
        carry(part, inner, errors, taken, lambda j: choice.column(
            start + j, part[:, j:], diagonal[start + j : stop]  # noqa: B023
        ))  # fmt: skip
        cost += errors.square().sum(1) / 2
        w[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1.0)
    if order is not None:
        back = torch.empty_like(out)
        back[:, order] = out
        out = back
    return Solved(out, cost)
