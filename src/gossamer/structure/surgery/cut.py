"""From units that go to the tensors that stay: shapes, values, and what modules must count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.structure.surgery.node import Grouped, Ids, Map
from gossamer.structure.surgery.plan import Plan, Replaced
from gossamer.structure.surgery.solve import Units

__all__ = ["Cut", "cut"]


@dataclass(frozen=True)
class Cut:
    """A smaller network.

    Attributes:
        plan: what its modules are.
        values: its tensors that differ.
        guesses: ways to set numbers that modules of the user's keep, the plainest first.
    """

    plan: Plan
    values: dict[str, Tensor]
    guesses: list[dict[str, dict[str, int]]]


def cut(units: Units, gone: Ids) -> Cut:
    """The network without these units (by number).

    Constants that they gave are in the biases behind.
    """
    trace = units.trace
    values: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, int]] = {}
    picked: dict[str, tuple[tuple[int, ...], ...]] = {}
    there = {m.name: m for m in trace.ledger.memories.values() if m.name}
    full = {name: m.base.detach() for name, m in there.items()}
    added: dict[str, Tensor] = {}
    for fold in units.folds():
        goes = gone[fold.inputs]
        if goes.any():
            total = fold.added[torch.from_numpy(np.flatnonzero(goes))].sum(0)
            added[fold.bias] = added[fold.bias] + total if fold.bias in added else total
    for name, total in added.items():
        old = full.get(name)
        weight = full[name.removesuffix("bias") + "weight"] if old is None else old
        both = total if old is None else old.double() + total
        full[name] = both.to(weight.dtype)
    grouped = {g.weight: g for n in units.nodes for g in n.grouped}
    for name, tensor in full.items():
        memory = there.get(name)
        if name in grouped:
            new, groups = _grouped(tensor, grouped[name], gone)
            if groups != grouped[name].groups:
                numbers.setdefault(name.rpartition(".")[0], {})["groups"] = groups
        else:
            axes = memory.axes if memory else there[_weight(name)].axes
            new = tensor
            left: list[tuple[int, ...]] = [()] * tensor.ndim
            for axis, ids in axes.items():
                if axis < new.ndim and gone[ids.numpy()].any():
                    keep = np.flatnonzero(~gone[ids.numpy()])
                    new = new.index_select(axis, torch.from_numpy(keep))
                    left[axis] = tuple(keep.tolist())
            if any(left) and _unstored(trace.model, name):
                picked[name] = tuple(left)
        if name in added or new.shape != tensor.shape:
            values[name] = new
    replaced = dict(_replaced(units, values, gone))
    for name in full:  # a module that stands in is made anew: all of it is filled in
        if any(name.startswith(f"{n}.") for n in replaced):
            values.setdefault(name, full[name])
    for node in units.nodes:
        kept = {a: int((~gone[ids]).sum()) for a, ids in node.sizes.items() if gone[ids].any()}
        at = trace.modules.get(id(node.module))
        if kept and at is not None and isinstance(node.module, _COUNTING):
            numbers.setdefault(at, {}).update(kept)
    numbers = {n: v for n, v in numbers.items() if _torchs(trace.model, n)}
    shapes = {n: tuple(v.shape) for n, v in values.items()}
    inside = tuple(f"{n}." for n in replaced)
    shapes = {n: s for n, s in shapes.items() if not (inside and n.startswith(inside))}
    picked = {n: p for n, p in picked.items() if n in shapes}
    return Cut(Plan(replaced, shapes, numbers, picked), values, _guesses(units, gone))


_COUNTING = (nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _weight(bias: str) -> str:
    return bias.removesuffix("bias") + "weight"


def _torchs(model: nn.Module, name: str) -> bool:
    return type(model.get_submodule(name)).__module__.startswith("torch.nn")


def _unstored(model: nn.Module, name: str) -> bool:
    """Whether a buffer is in no state of the network's, and so in no file of it."""
    parent, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(parent)._non_persistent_buffers_set


def _grouped(weight: Tensor, group: Grouped, gone: Ids) -> tuple[Tensor, int]:
    """A grouped convolution's weight, and the groups that are left."""
    ins, outs = (gone[i].reshape(group.groups, -1) for i in (group.inputs, group.outputs))
    rows, columns = (ins, outs) if group.transposed else (outs, ins)
    parts = []
    for g, part in enumerate(weight.split(rows.shape[1])):
        at = torch.from_numpy(np.flatnonzero(~rows[g]))
        of = torch.from_numpy(np.flatnonzero(~columns[g]))
        if len(at):
            parts.append(part.index_select(0, at).index_select(1, of))
    return torch.cat(parts), len(parts)


def _replaced(units: Units, values: dict[str, Tensor], gone: Ids) -> Iterator[tuple[str, Replaced]]:
    for node in units.nodes:
        ids = node.sizes.get("normalized_shape")
        at = units.trace.modules.get(id(node.module))
        if ids is not None and at is not None and gone[ids].any():
            yield at, Replaced("layer-norm", (int((~gone[ids]).sum()),))
    for name, module in units.trace.model.named_modules():
        if isinstance(module, nn.RNNBase) and not module.proj_size:
            weights = [f"{name}.weight_hh_l{i}" for i in range(module.num_layers)]
            sizes = [
                int((values[w] if w in values else getattr(module, w.rpartition(".")[2])).shape[1])
                for w in weights
            ]
            if len(set(sizes)) > 1:
                first = f"{name}.weight_ih_l0"
                inputs = values[first].shape[1] if first in values else module.input_size
                yield name, Replaced("recurrent", (*sizes, int(inputs)))
        elif isinstance(module, nn.MultiheadAttention):
            rows = values.get(f"{name}.in_proj_weight")
            heads = None if rows is None else len(rows) // 3
            if rows is None and f"{name}.q_proj_weight" in values:
                heads = len(values[f"{name}.q_proj_weight"])
            if heads is not None and heads != module.embed_dim:
                yield name, Replaced("heads", (heads // module.head_dim, module.head_dim))


def _guesses(units: Units, gone: Ids) -> list[dict[str, dict[str, int]]]:
    """Numbers of the user's own modules that count what goes: none, heads, all that fit."""
    changes: dict[str, dict[int, set[int]]] = {}
    for node in units.nodes:
        name = units.trace.modules.get(id(node.owner))
        if node.owner is None or name is None or type(node.owner).__module__.startswith("torch."):
            continue
        for old, new in _sizes(node, gone):
            changes.setdefault(name, {}).setdefault(old, set()).add(new)
    found: list[dict[str, dict[str, int]]] = [{}]
    modules = dict(units.trace.model.named_modules())

    def named(*words: str) -> dict[str, dict[str, int]]:
        guess: dict[str, dict[str, int]] = {}
        for name, sizes in changes.items():
            for attribute, value in vars(modules[name]).items():
                news = sizes.get(value, set()) if type(value) is int else set()
                fits = not words or any(w in attribute.lower() for w in words)
                if len(news) == 1 and fits and not attribute.startswith("_"):
                    guess.setdefault(name, {})[attribute] = next(iter(news))
        return guess

    for words in (("num_heads", "n_head", "heads", "groups"), ("head", "group", "all"), ()):
        guess = named(*words)
        if guess and guess not in found:
            found.append(guess)
    return found


def _sizes(node: Any, gone: Ids) -> Iterator[tuple[int, int]]:
    """Old and new lengths of what an operation handles."""
    for limit in node.maps:
        if not isinstance(limit, Map):
            continue
        kept = ~gone[limit.ids]
        for axis in range(kept.ndim):
            line = kept.any(tuple(d for d in range(kept.ndim) if d != axis))
            if not np.all(line):
                yield kept.shape[axis], int(np.sum(line))
        if not kept.all():
            yield kept.size, int(kept.sum())
    for group in node.grouped:
        ins = gone[group.inputs].reshape(group.groups, -1)
        if ins.all(1).any():
            yield group.groups, int((~ins.all(1)).sum())
