"""Pruning: which weights go."""

from gossamer.prune.dead import DeadUnits, dead_units, remove_dead
from gossamer.prune.magnitude import EmptyLayerWarning, prune, rescale_dropout, threshold_masks
from gossamer.prune.sensitivity import Sensitivity, scan

__all__ = [
    "DeadUnits",
    "EmptyLayerWarning",
    "Sensitivity",
    "dead_units",
    "prune",
    "remove_dead",
    "rescale_dropout",
    "scan",
    "threshold_masks",
]
