"""Networks with other modules: folded, factorized, with dead units taken out."""

from gossamer.structure.absorb import absorb_batchnorm
from gossamer.structure.coupling import coupled_groups
from gossamer.structure.dead import DeadUnits, dead_units, remove_dead
from gossamer.structure.factors import decompose
from gossamer.structure.fit_network import approximate, survey
from gossamer.structure.fold import fold_batchnorm
from gossamer.structure.group_lasso import GroupLasso
from gossamer.structure.low_rank import Pairs, energies, fit_linear, fit_nonlinear
from gossamer.structure.norms import norms_behind
from gossamer.structure.rank_selection import Ladder, choose_ranks
from gossamer.structure.surgery.shrink import Pinned, Shrunk, shrink
from gossamer.structure.svd import SVDSize, factorize, svd_size, sweep

__all__ = [
    "DeadUnits",
    "GroupLasso",
    "Ladder",
    "Pairs",
    "Pinned",
    "SVDSize",
    "Shrunk",
    "absorb_batchnorm",
    "approximate",
    "choose_ranks",
    "coupled_groups",
    "dead_units",
    "decompose",
    "energies",
    "factorize",
    "fit_linear",
    "fit_nonlinear",
    "fold_batchnorm",
    "norms_behind",
    "remove_dead",
    "shrink",
    "survey",
    "svd_size",
    "sweep",
]
