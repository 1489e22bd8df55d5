"""Branches that only give constants: a dead residual block becomes its shortcut.

Wen et al. (2016), section 3.1.3, structured sparsity of the depth: a block whose branch is zero is
passed by its shortcut. The branch's last module gives the constant that is left of it (a
batch-norm's shift), and the modules before it pass on what they get.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from gossamer.structure.surgery.node import Given
from gossamer.structure.surgery.plan import Replaced
from gossamer.structure.surgery.solve import live_nodes
from gossamer.structure.surgery.trace import Trace

__all__ = ["Branch", "branches"]

Branch = tuple[str, Tensor, dict[str, Replaced]]
"""The module that gives the constant, its channels' values, and what is replaced."""


def branches(model: nn.Module, trace: Trace) -> Iterator[Branch]:
    """Every branch of modules that gives a constant a channel, whatever the inputs are."""
    modules = dict(model.named_modules())
    # pools and the like pass on what the module before them gives
    owning = {n for n, m in modules.items() if [*m.parameters(), *m.buffers()]}
    constant = {n: given for n, given in trace.constants.items() if given and n in owning}
    before = {id(n.module) for n in live_nodes(trace)}
    for name, given in constant.items():
        key = trace.ledger.key(given.out)
        readers = [n for n in trace.nodes[given.after :] if key in n.reads]
        inside = [trace.modules.get(id(n.module)) for n in readers]
        if not readers or all(m in constant for m in inside):
            continue  # a later module of the branch gives it on
        live = live_nodes(trace, given)
        if not any(n.reads & trace.fed for n in live):
            continue  # no branch: all of the network is behind it
        needed = {id(n.module) for n in live}
        idle = [
            n
            for n, m in modules.items()
            if n != name and id(m) in before - needed and not list(m.children())
        ]
        step = _step(trace, given, [name, *idle])
        owners = [n for n in idle if list(modules[n].parameters())]
        if step is not None:
            replaced = {n: Replaced("identity") for n in owners}
            sizes = (len(given.value), given.axis, step)
            yield name, given.value, {**replaced, name: Replaced("constant", sizes)}


def _step(trace: Trace, given: Given, names: list[str]) -> int | None:
    """How many times longer the branch's input is than its output; None where it is no number."""
    first = next((t for n, t in trace.inputs.items() if n in names), None)
    if first is None or first.ndim != given.out.ndim or len(first) != len(given.out):
        return None
    steps = {
        -(-a // b)
        for d, (a, b) in enumerate(zip(first.shape, given.out.shape, strict=True))
        if d not in (0, given.axis)
    }
    if len(steps) > 1:
        return None
    return steps.pop() if steps else 1
