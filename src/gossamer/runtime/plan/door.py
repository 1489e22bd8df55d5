"""The door: a network becomes a plan, compared with torch before it is given out.

The layers' kernels are chosen one by one, and the whole that they make is one candidate beside the
engines that run the whole network; all are timed in turn, in one run, and the fastest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core import machine
from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.timing import threads as set_threads
from gossamer.runtime.compare import Closeness, altered, closeness
from gossamer.runtime.flat import Flat, flatten
from gossamer.runtime.plan.arrays import TOLERANCE
from gossamer.runtime.plan.capture import Captured, capture
from gossamer.runtime.plan.choose import Measured, cheapest, measure, overhead, timed
from gossamer.runtime.plan.explain import describe
from gossamer.runtime.plan.facts import Facts
from gossamer.runtime.plan.forms import form_of, leaves
from gossamer.runtime.plan.fuse import fused
from gossamer.runtime.plan.graph import Graph, Node, Value
from gossamer.runtime.plan.kernels import KERNELS, candidates
from gossamer.runtime.plan.plan import Plan, Run
from gossamer.runtime.plan.program import Program, steps_of
from gossamer.runtime.plan.reference import batch_of

__all__ = ["ENGINES", "Engine", "compile_network", "recheck"]

Engine = Literal["auto", "plan", "onnxruntime", "numpy", "torch"]
ENGINES: tuple[Engine, ...] = ("auto", "plan", "onnxruntime", "numpy", "torch")


def compile_network(
    model: nn.Module,
    example_inputs: Any,
    *,
    engine: Engine = "auto",
    threads: int = 1,
    rounds: int = 30,
    seconds: float = 0.2,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """A network with the kernels that are fastest on this machine, called as the network is.

    Args:
        model: any network, which is left as it is; its plan computes in float32, in evaluation
            mode, without gradients.
        example_inputs: one batch as the network takes it; times are of its size.
        engine: ``auto``: whatever is fastest; ``plan``: a kernel for each layer; ``onnxruntime``,
            ``numpy``, ``torch``: that alone, wherever it can.
        threads: of each kernel. What is left to torch takes torch's own.
        rounds, seconds: at most, for each layer, and for the whole networks together.
        say: told what is being done.

    Raises :class:`ArgumentError` for a network that does not take the example, for an unknown
    engine or fewer than one thread, and where what was asked for differs from torch by more than
    1e-4 of the largest output.
    """
    one_of("engine", engine, ENGINES)
    if threads < 1 or rounds < 1:
        raise ArgumentError(f"threads={threads}, rounds={rounds} must be at least 1")
    flat, tensors, notes = flatten(model, example_inputs)
    with torch.no_grad():
        outputs = flat.whole(*_copies(tensors))
        wanted = flat(*_copies(tensors))
    captured = _captured(flat, tensors, wanted, engine, notes)
    graph, inputs = captured.graph, [t.numpy() for t in tensors]
    batch = batch_of(graph, inputs)
    facts = Facts(engine, machine.cpu(), threads, batch, notes=notes)
    with set_threads(threads):
        runs, choices, found = _runs(
            flat, captured, inputs, batch, engine, facts, rounds, seconds, say
        )
        checks = {}
        for name in list(runs):
            try:
                checks[name] = _checked(flat, graph, tensors, runs[name], name)
            except ArgumentError as e:
                del runs[name]
                facts.notes.append(f"{name} was refused: {e}")
        if not runs:
            raise ArgumentError(f"engine={engine!r} cannot be used: {'; '.join(facts.notes)}")
        say(f"timing {', '.join(runs)}")
        calls = [partial(run, inputs, batch) for run in runs.values()]
        facts.whole = dict(zip(runs, timed(calls, threads, rounds, 5 * seconds), strict=True))
    facts.engine = min(facts.whole, key=lambda name: facts.whole[name])
    facts.check = str(checks[facts.engine])
    facts.chosen = choices.get(facts.engine, {})
    for node in graph.nodes:
        row = found.get(node.name, Measured())
        kernel = facts.chosen.get(node.name, facts.engine)
        facts.rows.append(
            {**describe(graph, node), "kernel": kernel, "ms": row.ms, "refused": row.refused}
        )
    plan = Plan(
        graph, runs[facts.engine], facts, form_of(_inputs(example_inputs)),
        _output_form(outputs, len(wanted)), flat.inputs, captured.islands,
    )  # fmt: skip
    plan.probe = tuple(inputs), tuple(t.numpy() for t in wanted)
    return plan


def recheck(plan: Plan, model: nn.Module, example_inputs: Any) -> None:
    """Raise :class:`ArgumentError` where a plan from a file gives something else than the network.

    ``example_inputs``: as for :func:`compile_network`.
    """
    flat, tensors, _ = flatten(model, example_inputs)
    plan.facts.check = str(_checked(flat, plan.graph, tensors, plan.arrays, "the plan"))


def _inputs(example: Any) -> Any:
    return tuple(example) if isinstance(example, (tuple, list)) else example


def _output_form(outputs: Any, count: int) -> Any:
    """The form of what the network gives; of objects of its own, a tuple of their tensors."""
    if len(leaves(outputs)) == count:
        return form_of(outputs)
    return ["tuple", [None] * count]


def _captured(
    flat: Flat,
    tensors: Sequence[Tensor],
    wanted: Sequence[Tensor],
    engine: Engine,
    notes: list[str],
) -> Captured:
    """The network's graph; the whole network as one island where it cannot be captured."""
    try:
        made = capture(flat, tensors, free=_others(flat, tensors) is not None)
        return Captured(fused(made.graph), made.islands)
    except ArgumentError as e:
        if engine not in ("auto", "torch"):
            raise
        notes.append(f"the whole network runs in torch: {e}")
    names = [f"input{i}" for i in range(len(tensors))]
    outs = [f"output{i}" for i in range(len(wanted))]
    free = _batch_varies(flat, tensors, wanted)
    values = {
        name: Value(
            (-1, *t.shape[1:]) if free else tuple(t.shape), str(t.dtype).removeprefix("torch.")
        )
        for name, t in zip((*names, *outs), (*tensors, *wanted), strict=True)
    }
    attributes = {
        "island": 0,
        "names": [type(flat.model).__name__],
        "reason": notes[-1],
        "sizes": [],
    }
    node = Node("torch", tuple(names), tuple(outs), attributes)
    graph = Graph(tuple(names), tuple(outs), (node,), values, {})
    return Captured(graph.check(), (flat,))


def _others(flat: Flat, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """What torch gives for a batch of three; None where it does not take one."""
    if any(t.ndim == 0 or len(t) != len(tensors[0]) for t in tensors):
        return None
    try:
        with torch.no_grad():
            return flat(*altered(tensors, 3))
    except Exception:  # the user's own forward, which may raise anything
        return None


def _batch_varies(flat: Flat, tensors: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether a batch of three gives outputs for three."""
    if any(t.ndim == 0 or len(t) != len(tensors[0]) for t in wanted):
        return False
    found = _others(flat, tensors)
    return found is not None and [t.shape for t in found] == [(3, *t.shape[1:]) for t in wanted]


def _runs(
    flat: Flat,
    captured: Captured,
    inputs: Sequence[np.ndarray],
    batch: int,
    engine: Engine,
    facts: Facts,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> tuple[dict[str, Run], dict[str, dict[str, str]], dict[str, Measured]]:
    """The candidates for the whole, the kernels of each, and what was measured of nodes."""
    graph, islands = captured.graph, captured.islands
    choices: dict[str, dict[str, str]] = {}
    found: dict[str, Measured] = {}
    runs: dict[str, Run] = {}
    lowered = not all(n.op == "torch" for n in graph.nodes)
    if engine in ("auto", "plan") and lowered:
        say(f"timing the kernels of {len(graph.nodes)} operators")
        found = measure(
            graph, islands, inputs, batch, threads=facts.threads, rounds=rounds, seconds=seconds
        )
        choices["plan"] = cheapest(graph, found, overhead(facts.threads))
    for name in ("onnxruntime", "numpy"):
        if engine == name or (engine == "auto" and name == "onnxruntime" and lowered):
            choices[name] = {n.name: _served(graph, n, name) for n in graph.nodes}
    for name, chosen in list(choices.items()):
        try:
            runs[name] = Program(graph, steps_of(graph, chosen, facts.threads, islands))
        except ArgumentError as e:
            facts.notes.append(f"{name} was refused: {e}")
    if engine in ("auto", "torch"):
        runs["torch"] = partial(_eager, flat)
    return runs, choices, found


def _served(graph: Graph, node: Node, name: str) -> str:
    """The kernel where it serves the node, else what always does."""
    if node.op == "torch":
        return "torch"
    if node.op in KERNELS[name].serves and not candidates(graph, node)[name]:
        return name
    return "numpy"


def _eager(flat: Flat, arrays: Sequence[np.ndarray], batch: int) -> list[np.ndarray]:
    given = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    with torch.no_grad():
        return [t.numpy() for t in flat(*_copies(given))]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For a network that may write its inputs."""
    return [t.clone() for t in tensors]


def _checked(flat: Flat, graph: Graph, tensors: Sequence[Tensor], run: Run, name: str) -> Closeness:
    """The run beside torch on the example, and on another batch where the batch is free.

    Raises :class:`ArgumentError` where they differ.
    """
    batches = [tuple(tensors), *([altered(tensors, 3)] if graph.free else [])]
    worst: Closeness | None = None
    for rows in batches:
        arrays = [t.numpy() for t in rows]
        with torch.no_grad():
            wanted = flat(*_copies(rows))
        got = [torch.from_numpy(a) for a in run(arrays, batch_of(graph, arrays))]
        one = closeness(wanted, got, name)
        if not one.relative <= TOLERANCE:
            raise ArgumentError(
                f"it gives something else than torch: {one}; {TOLERANCE:g} is allowed"
            )
        worst = one if worst is None or one.relative > worst.relative else worst
    assert worst is not None  # there is an example
    return worst
