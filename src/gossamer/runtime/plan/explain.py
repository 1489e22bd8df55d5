"""A plan in words: a table of its layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from gossamer.core.columns import columns
from gossamer.runtime.plan.facts import Facts
from gossamer.runtime.plan.graph import LAYERS, Graph, Node
from gossamer.runtime.plan.kernels import KERNELS

__all__ = ["describe", "table"]


def describe(graph: Graph, node: Node) -> dict[str, Any]:
    """A node's row: layer, operator, shape of the result, density and number of its weights."""
    weight = graph.constants.get(node.inputs[1]) if node.op in LAYERS else None
    what = node.op if node.op != "torch" else f"torch: {', '.join(node.attributes['names'])}"
    if node.activation:
        what += f"+{node.activation[0]}"
    if node.op in LAYERS and node.inputs[LAYERS[node.op] :] not in ((), ("",)):
        what += "+added"
    return {
        "layer": node.name if weight is None else _layer(node.inputs[1]),
        "op": what,
        "shape": str(graph.values[node.name]).partition(" ")[2],
        "density": None if weight is None else np.count_nonzero(weight) / max(1, weight.size),
        "weights": None if weight is None else weight.size,
    }


def _layer(constant: str) -> str:
    """The module that a weight is of, folded or not."""
    return constant.partition("*")[0].removeprefix("@").removesuffix(".weight")


def table(graph: Graph, facts: Facts) -> str:
    """The whole plan."""
    rows = [["layer", "operator", "gives", "density", "kernel", "ms", "at least", "others"]]
    for row in facts.rows:
        ms = row["ms"].get(row["kernel"])
        others = [f"{k} {v:.4f}" for k, v in row["ms"].items() if k != row["kernel"]]
        others += [f"{k}: {why}" for k, why in row["refused"].items()]
        rows.append(
            [
                row["layer"], row["op"], row["shape"],
                "" if row["density"] is None else f"{row['density']:.3f}",
                row["kernel"], "" if ms is None else f"{ms:.4f}", _bound(row),
                "; ".join(others),
            ]
        )  # fmt: skip
    size = "any batch" if graph.free else "the example's batch alone"
    lines = [
        f"{facts.processor}, {facts.threads} thread{'s' * (facts.threads > 1)}, measured at batch "
        f"{facts.batch}; takes {size}",
        *columns(rows, (0, 1, 2, 6, 7)),
        "whole    " + ", ".join(f"{name} {ms:.4f} ms" for name, ms in facts.whole.items()),
        f"runs     {facts.engine}",
        *_needs(facts),
        f"checked  {facts.check}",
        *_integers(facts),
    ]
    for node in graph.islands:
        lines.append(
            f"torch    {', '.join(node.attributes['names'])} ({node.attributes['reason']})"
        )
    return "\n".join([*lines, *(f"note     {n}" for n in facts.notes)])


def _needs(facts: Facts) -> list[str]:
    """Packages of others that the plan runs in."""
    kernels = [KERNELS[name] for name in facts.chosen.values() if name in KERNELS]
    found = dict.fromkeys(k.package for k in kernels if k.package)
    told = f"needs    {', '.join(found)}; other kernels stand in where it is missing"
    return [told] if found else []


def _bound(row: dict[str, Any]) -> str:
    """The least milliseconds, and what bounds them; files of before do not say."""
    found = row.get("least")
    return "" if found is None else f"{found:.4f} {row['bound']}"


def _integers(facts: Facts) -> list[str]:
    """What int8 cost each layer, and which layers are float32."""
    if not facts.errors:
        return []
    taken = f"{len(facts.errors) - len(facts.kept)} of {len(facts.errors)} layers"
    lines = [f"int8     {taken if facts.precision == 'int8' else 'not taken: float32 runs'}"]
    for layer, error in facts.errors.items():
        why = f"; stays float32: {facts.kept[layer]}" if layer in facts.kept else ""
        lines.append(f"int8     {layer}: error {error:.2g} of its result{why}")
    return lines
