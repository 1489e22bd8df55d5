"""Pruning: which weights go."""

from gossamer.prune.dead import DeadUnits, dead_units, remove_dead
from gossamer.prune.magnitude import EmptyLayerWarning, prune, rescale_dropout, threshold_masks
from gossamer.prune.sensitivity import Sensitivity, scan
from gossamer.prune.supermask import Supermask

__all__ = [
    "DeadUnits",
    "EmptyLayerWarning",
    "Sensitivity",
    "Supermask",
    "dead_units",
    "prune",
    "remove_dead",
    "rescale_dropout",
    "scan",
    "threshold_masks",
]
