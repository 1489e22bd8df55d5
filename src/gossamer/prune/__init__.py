"""Pruning: which weights go."""

from gossamer.prune.magnitude import EmptyLayerWarning, prune, rescale_dropout, threshold_masks
from gossamer.prune.sensitivity import Sensitivity, scan

__all__ = [
    "EmptyLayerWarning",
    "Sensitivity",
    "prune",
    "rescale_dropout",
    "scan",
    "threshold_masks",
]
