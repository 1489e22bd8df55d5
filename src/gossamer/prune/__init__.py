"""Pruning: which weights go."""

from gossamer.prune.magnitude import EmptyLayerWarning, prune, rescale_dropout, threshold_masks
from gossamer.prune.sensitivity import Sensitivity, scan
from gossamer.prune.supermask import Supermask

__all__ = [
    "EmptyLayerWarning",
    "Sensitivity",
    "Supermask",
    "prune",
    "rescale_dropout",
    "scan",
    "threshold_masks",
]
