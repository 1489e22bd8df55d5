"""Optimal Brain Damage: weights go by the increase of the loss that their removal predicts.

LeCun, Denker, Solla, NIPS 1989: saliency s_k = h_kk u_k^2 / 2 (equation 5 and step 4 of the
recipe): train, compute the diagonal h (:func:`gossamer.training.curvature.hessian_diagonal`),
remove the smallest saliencies, retrain with them frozen at zero, repeat.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.core.names import Tensors

__all__ = ["predicted_increase", "saliency"]


def saliency(weights: Mapping[str, Tensor], diagonal: Mapping[str, Tensor]) -> Tensors:
    """s = h u^2 / 2 for each weight; higher = keep.

    >>> import torch
    >>> saliency({"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([1.0, 6.0])})
    {'w': tensor([2., 3.])}

    Raises :class:`ArgumentError` for a weight without a diagonal, or of another shape.
    """
    scores: Tensors = {}
    for name, u in weights.items():
        if name not in diagonal:
            raise ArgumentError(
                f"weight {name!r} has no diagonal; there are: {', '.join(diagonal)}"
            )
        h = diagonal[name]
        if h.shape != u.shape:
            raise ArgumentError(
                f"diagonal of {name!r} has shape {tuple(h.shape)}, the weight {tuple(u.shape)}"
            )
        scores[name] = h * u.detach().square() / 2
    return scores


def predicted_increase(saliencies: Mapping[str, Tensor], masks: Masks) -> float:
    """Sum of the saliencies of what the masks remove: the loss's predicted increase.

    Raises :class:`ArgumentError` when a mask has no saliency of its shape.
    """
    masks.check(saliencies)
    return sum(float(saliencies[n].double()[~m].sum()) for n, m in masks.items())
