"""The door: a network becomes a plan, compared with torch before it is given out.

The layers' kernels are chosen one by one, and the whole that they make is one candidate beside the
engines that run the whole network; all are timed in turn, in one run, and the fastest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core import machine
from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.timing import threads as set_threads
from gossamer.datasets import Split
from gossamer.runtime.compare import Closeness, altered, closeness, compared
from gossamer.runtime.export import PRECISIONS, Precision, batches_of
from gossamer.runtime.flat import Flat, flatten
from gossamer.runtime.plan.arrays import TOLERANCE
from gossamer.runtime.plan.capture import Captured, capture
from gossamer.runtime.plan.choose import Measured, cheapest, measure, overhead, timed
from gossamer.runtime.plan.explain import describe
from gossamer.runtime.plan.facts import Facts
from gossamer.runtime.plan.forms import form_of, leaves
from gossamer.runtime.plan.fuse import fused
from gossamer.runtime.plan.graph import Graph, Node, Value
from gossamer.runtime.plan.integers import integer_choice
from gossamer.runtime.plan.kernels import KERNELS, candidates
from gossamer.runtime.plan.plan import Plan, Run
from gossamer.runtime.plan.program import Program, steps_of
from gossamer.runtime.plan.reference import batch_of
from gossamer.runtime.plan.roofline import peaks, predicted

__all__ = ["ENGINES", "Engine", "compile_network", "recheck"]

_FLOOR = 0.98  # cosine, as of an export
Engine = Literal["auto", "plan", "onnxruntime", "numpy", "torch"]
ENGINES: tuple[Engine, ...] = ("auto", "plan", "onnxruntime", "numpy", "torch")


def compile_network(
    model: nn.Module,
    example_inputs: Any,
    *,
    engine: Engine = "auto",
    precision: Precision = "float32",
    calibration: Iterable[Any] | Split | None = None,
    floor: float = _FLOOR,
    threads: int = 1,
    rounds: int = 30,
    seconds: float = 0.2,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """A network with the kernels that are fastest on this machine, called as the network is.

    Args:
        model: any network, which is left as it is; its plan computes in evaluation mode, without
            gradients.
        example_inputs: one batch as the network takes it; times are of its size.
        engine: ``auto``: whatever is fastest; ``plan``: a kernel for each layer; ``onnxruntime``,
            ``numpy``, ``torch``: that alone, wherever it can.
        precision: ``int8``: layers on eight-bit weights and activations of seven bits too, each
            where that is faster (:mod:`gossamer.runtime.plan.int8`), with engine ``auto``,
            ``plan`` or ``numpy``. Answers change: what each layer and the whole lose on the
            calibration inputs is stated, and a layer that loses far more than the others stays
            float32 (:mod:`gossamer.runtime.plan.calibration`).
        calibration: inputs for int8: a split, or an iterable of batches like the example, as for
            :func:`gossamer.runtime.export.export`.
        floor: of int8: the least mean cosine of the outputs with torch's on the calibration inputs.
        threads: of each kernel. What is left to torch takes torch's own.
        rounds, seconds: at most, for each layer, and for the whole networks together.
        say: told what is being done.

    Raises :class:`ArgumentError` for a network that does not take the example, for an unknown
    engine or fewer than one thread, and where what was asked for differs from torch by more than
    1e-4 of the largest output. For int8 also without calibration inputs, without a layer that has
    an integer form, and where what was asked for is below the floor.
    """
    one_of("engine", engine, ENGINES)
    if threads < 1 or rounds < 1:
        raise ArgumentError(f"threads={threads}, rounds={rounds} must be at least 1")
    _asked(engine, precision, calibration, floor)
    flat, tensors, notes = flatten(model, example_inputs)
    batches = []
    if calibration is not None:
        batches = list(batches_of(calibration, example_inputs, tensors))
    with torch.no_grad():
        outputs = flat.whole(*_copies(tensors))
        wanted = flat(*_copies(tensors))
    captured = _captured(flat, tensors, wanted, engine, notes)
    graph, inputs = captured.graph, [t.numpy() for t in tensors]
    batch = batch_of(graph, inputs)
    facts = Facts(engine, machine.cpu(), threads, batch, notes=notes)
    with set_threads(threads):
        wholes = _wholes(flat, captured, inputs, batches, engine, facts, rounds, seconds, say)
        checks = {}
        for name, whole in list(wholes.items()):
            try:
                if whole.integers:
                    checks[name] = _judged(flat, batches, whole, floor)
                else:
                    checks[name] = str(_checked(flat, whole.graph, tensors, whole.run, name))
            except ArgumentError as e:
                del wholes[name]
                facts.notes.append(f"{name} was refused: {e}")
        if not wholes:
            raise ArgumentError(f"engine={engine!r} cannot be used: {'; '.join(facts.notes)}")
        say(f"timing {', '.join(wholes)}")
        calls = [partial(whole.run, inputs, batch) for whole in wholes.values()]
        facts.whole = dict(zip(wholes, timed(calls, threads, rounds, 5 * seconds), strict=True))
    facts.engine = min(facts.whole, key=lambda name: facts.whole[name])
    best = wholes[facts.engine]
    facts.check, facts.chosen = checks[facts.engine], best.chosen
    facts.precision = "int8" if best.integers else "float32"
    for node in best.graph.nodes:
        row = best.found.get(node.name, Measured())
        kernel = facts.chosen.get(node.name, facts.engine)
        facts.rows.append(
            {**describe(best.graph, node), "kernel": kernel, "ms": row.ms, "refused": row.refused,
             **predicted(best.graph, node, kernel, batch, peaks(threads))}
        )  # fmt: skip
    plan = Plan(
        best.graph, best.run, facts, form_of(_inputs(example_inputs)),
        _output_form(outputs, len(wanted)), flat.inputs, captured.islands,
    )  # fmt: skip
    gives = best.run(inputs, batch) if best.integers else [t.numpy() for t in wanted]
    plan.probe = tuple(inputs), tuple(gives)
    return plan


def _asked(engine: str, precision: str, calibration: Any, floor: float) -> None:
    """Refuse settings that do not go together."""
    one_of("precision", precision, PRECISIONS)
    if precision == "float32":
        if calibration is not None:
            raise ArgumentError("calibration is for precision='int8'; leave it out for float32")
        return
    if engine not in ("auto", "plan", "numpy"):
        raise ArgumentError(
            f"precision='int8' is for engine 'auto', 'plan' or 'numpy', not {engine!r}; "
            "gossamer.export writes int8 for onnxruntime"
        )
    if calibration is None:
        raise ArgumentError(
            "precision='int8' needs calibration inputs, which set the ranges of activations; give "
            "calibration= some hundred examples like those it will see (--data)"
        )
    if not 0 <= floor <= 1:
        raise ArgumentError(f"floor={floor} is a cosine between 0 and 1")


def recheck(plan: Plan, model: nn.Module, example_inputs: Any, floor: float = _FLOOR) -> None:
    """Raise :class:`ArgumentError` where a plan from a file gives something else than the network.

    ``example_inputs``, ``floor``: as for :func:`compile_network`.
    """
    flat, tensors, _ = flatten(model, example_inputs)
    if plan.facts.precision == "int8":
        _judged(flat, [tensors], _Whole(plan.arrays, plan.graph, integers=True), floor)
        return  # what is stated of the calibration inputs stays
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


@dataclass(frozen=True)
class _Whole:
    """A candidate for the whole network: its run, its graph, kernels and what was measured."""

    run: Run
    graph: Graph
    chosen: dict[str, str] = field(default_factory=dict)
    found: dict[str, Measured] = field(default_factory=dict)
    integers: bool = False


def _wholes(
    flat: Flat,
    captured: Captured,
    inputs: Sequence[np.ndarray],
    batches: Sequence[Sequence[Tensor]],
    engine: Engine,
    facts: Facts,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, _Whole]:
    """The candidates for the whole; ``batches``: calibration inputs, of float32 none."""
    graph, islands, threads = captured.graph, captured.islands, facts.threads
    made: dict[str, _Whole] = {}
    lowered = not all(n.op == "torch" for n in graph.nodes)

    def program(
        name: str, graph: Graph, chosen: dict[str, str], found: dict[str, Measured], **more: Any
    ) -> None:
        try:
            run = Program(graph, steps_of(graph, chosen, threads, islands))
        except ArgumentError as e:
            facts.notes.append(f"{name} was refused: {e}")
        else:
            made[name] = _Whole(run, graph, chosen, found, **more)

    if batches:
        rows = [[t.numpy() for t in batch] for batch in batches]
        best = integer_choice(
            captured, rows, inputs, facts, measured=engine != "numpy", rounds=rounds,
            seconds=seconds, say=say,
        )  # fmt: skip
        name = "numpy" if engine == "numpy" else "plan"
        program(name, best.graph, best.chosen, best.found, integers=bool(best.layers))
    elif engine in ("auto", "plan") and lowered:
        say(f"timing the kernels of {len(graph.nodes)} operators")
        found = measure(
            graph, islands, inputs, facts.batch, threads=threads, rounds=rounds, seconds=seconds
        )
        program("plan", graph, cheapest(graph, found, overhead(threads))[0], found)
    for name in ("onnxruntime", "numpy"):
        asked = engine == name or (engine == "auto" and name == "onnxruntime" and lowered)
        if asked and name not in made:
            program(name, graph, {n.name: _served(graph, n, name) for n in graph.nodes}, {})
    if engine in ("auto", "torch"):
        made["torch"] = _Whole(partial(_eager, flat), graph)
    return made


def _judged(flat: Flat, batches: Sequence[Sequence[Tensor]], whole: _Whole, floor: float) -> str:
    """Integers beside torch, in words; raises :class:`ArgumentError` below the floor."""

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        arrays = [t.numpy() for t in tensors]
        return [torch.from_numpy(a) for a in whole.run(arrays, batch_of(whole.graph, arrays))]

    found = compared(flat, batches, run, "the int8 plan")
    if not found.cosine >= floor:
        raise ArgumentError(
            f"int8 is too far from torch: {found}; the floor is a cosine of {floor}. Calibrate "
            "with inputs of the kind it will see, compile with precision='float32', or lower floor="
        )
    return f"{found}, on the calibration inputs in int8"


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
