"""A method of each kind, with what it needs beside it, and what a finished one leaves."""

from collections.abc import Callable

import torch
from torch import nn

from gossamer.core.layer_groups import layer_groups
from gossamer.core.method import Masked, Method
from gossamer.prune import Supermask, prune
from gossamer.prune.dynamic import FAMILY, DynamicSparse
from gossamer.quantize import LSQ, TTQ, LossAware, RateAware, SharedWeights, share_model
from gossamer.structure import GroupLasso

STEPS = 12


def _rate_aware(model: nn.Module) -> list[Method]:
    masks = prune(model, 0.5)
    return [Masked(masks), RateAware.relative(model, step=0.3, lam=1e-4, masks=masks, every=3)]


def _sparse(rule: str) -> Callable[[nn.Module], list[Method]]:
    def make(model: nn.Module) -> list[Method]:
        generator = torch.Generator().manual_seed(0)
        return [DynamicSparse(FAMILY[rule], 0.5, steps=STEPS, every=3, generator=generator)]

    return make


METHODS: dict[str, Callable[[nn.Module], list[Method]]] = {
    "masks": lambda model: [Masked(prune(model, 0.3))],
    "rigl": _sparse("rigl"),
    "sparse momentum": _sparse("sparse-momentum"),
    "rate aware under masks": _rate_aware,
    "group lasso": lambda model: [GroupLasso(layer_groups(model, "row"), 0.01)],
    "shared": lambda model: [SharedWeights(share_model(model, bits=3))],
    "ttq, a group of its own": lambda model: [
        TTQ(threshold=0.05, start="fit", weight_decay=0.5, lr_factor=0.1, every=3, ends=True)
    ],
    "lsq": lambda model: [LSQ(bits=3, weight_decay=0.0, ends=True)],
    "loss aware": lambda model: [LossAware("lat", beta=0.9, clip=None, ends=True)],
    "supermask": lambda model: [
        Supermask(generator=torch.Generator().manual_seed(3), rescale=False)
    ],
}


FAMILIES = [
    "masks",
    "rigl",
    "rate aware under masks",
    "shared",
    "ttq, a group of its own",
]
"""One of each family, where a run takes a second or two."""


def same(a: nn.Module, b: nn.Module) -> bool:
    """Same names, same bits."""
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)
