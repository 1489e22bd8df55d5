"""Networks with other modules: folded, factorized, with dead units taken out."""

from gossamer.structure.absorb import absorb_batchnorm
from gossamer.structure.dead import DeadUnits, dead_units, remove_dead
from gossamer.structure.fold import fold_batchnorm
from gossamer.structure.group_lasso import GroupLasso
from gossamer.structure.svd import SVDSize, factorize, svd_size, sweep

__all__ = [
    "DeadUnits",
    "GroupLasso",
    "SVDSize",
    "absorb_batchnorm",
    "dead_units",
    "factorize",
    "fold_batchnorm",
    "remove_dead",
    "svd_size",
    "sweep",
]
