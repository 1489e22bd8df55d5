"""The coupled groups of a network: what would have to go for a unit to go.

Wen et al. (2016), section 3, for filters and the channels that read them; Wen et al. (2018) for
LSTM states; Fang et al., DepGraph (CVPR 2023), for any graph. Found as :mod:`.surgery` finds
them: by following one forward pass, element by element.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from torch import nn

from gossamer.core import names
from gossamer.core.errors import one_of
from gossamer.core.groups import Group, Role, Slice
from gossamer.structure.surgery import normalise, products, recurrent, rules, windows  # noqa: F401
from gossamer.structure.surgery.solve import Units
from gossamer.structure.surgery.trace import traced

__all__ = ["KINDS", "coupled_groups"]

KINDS = ("channel", "unit", "head", "feed-forward")
"""A channel of convolutions, a recurrent unit, an attention head, a unit of linear layers."""


def coupled_groups(
    model: nn.Module, example_inputs: Any, kinds: Collection[str] | None = None
) -> list[Group]:
    """Every unit of a network that could go, with all slices that would go with it.

    Args:
        model: in any mode; stays as it is.
        example_inputs: one batch: a tensor, a tuple of inputs in order, or a mapping by name.
        kinds: of :data:`KINDS`; all by default.

    Returns: one group a unit. A slice ``produces`` the unit's values (a row, its bias),
    ``consumes`` them (a column behind) or ``scales`` them (a norm's parameters). What has to stay
    whole beyond one unit (as many channels in each group of a convolution) is not said; nor are
    the columns of a grouped convolution, which each group has for itself.

    Raises :class:`ArgumentError` for an unknown kind, and as :func:`gossamer.shrink`.
    """
    for kind in kinds or ():
        one_of("kinds", kind, KINDS)
    units = Units.found(traced(model, example_inputs))
    known = names.cleaned(model)
    members: dict[int, list[Slice]] = {}
    roles: dict[int, set[str]] = {}
    for number, found in units.roles.items():
        roles.setdefault(int(units.of[number]), set()).update(found)
    modules: dict[int, set[type]] = {}
    for memory in units.trace.ledger.memories.values():
        if not isinstance(memory.base, nn.Parameter):
            continue
        owner = type(model.get_submodule(memory.name.rpartition(".")[0]))
        for axis, ids in memory.axes.items():
            numbers = ids.numpy()
            of = units.of[numbers]
            for unit in sorted(set(of.tolist()) - set(units.pinned)):
                at = np.flatnonzero(of == unit)
                role = _role(units.roles.get(int(numbers[at[0]]), set()))
                index = tuple(int(i) for i in at)
                members.setdefault(unit, []).append(Slice(known[memory.name], axis, index, role))
                modules.setdefault(unit, set()).add(owner)
    groups = []
    count: dict[str, int] = {}
    for unit, slices in members.items():
        kind = _kind(roles.get(unit, set()), modules[unit])
        first = next((s for s in slices if s.role == "produces"), slices[0])
        layer = first.parameter.rpartition(".")[0] or first.parameter
        number = count.get(f"{layer} {kind}", 0)
        count[f"{layer} {kind}"] = number + 1
        if not kinds or kind in kinds:
            groups.append(Group(kind, f"{layer} {kind}[{number}]", tuple(slices)))
    return groups


def _role(roles: set[str]) -> Role:
    if "produces" in roles:
        return "produces"
    return "consumes" if "consumes" in roles else "scales"


def _kind(roles: set[str], owners: set[type]) -> str:
    if any(r.endswith("state") for r in roles):
        return "unit"
    if "head" in roles:
        return "head"
    conv = any(issubclass(o, nn.modules.conv._ConvNd) for o in owners)
    return "channel" if conv else "feed-forward"
