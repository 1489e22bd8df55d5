"""Networks with other modules: folded, factorized, with dead units taken out."""

from gossamer.structure.absorb import absorb_batchnorm
from gossamer.structure.coupling import coupled_groups
from gossamer.structure.dead import DeadUnits, dead_units, remove_dead
from gossamer.structure.fold import fold_batchnorm
from gossamer.structure.group_lasso import GroupLasso
from gossamer.structure.surgery.shrink import Pinned, Shrunk, shrink
from gossamer.structure.svd import SVDSize, factorize, svd_size, sweep

__all__ = [
    "DeadUnits",
    "GroupLasso",
    "Pinned",
    "SVDSize",
    "Shrunk",
    "absorb_batchnorm",
    "coupled_groups",
    "dead_units",
    "factorize",
    "fold_batchnorm",
    "remove_dead",
    "shrink",
    "svd_size",
    "sweep",
]
