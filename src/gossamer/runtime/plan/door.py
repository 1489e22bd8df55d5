"""The door: a network becomes a plan, compared with torch before it is given out.

The layers' kernels are chosen one by one, and the whole that they make is one candidate beside the
engines that run the whole network (:mod:`gossamer.runtime.plan.wholes`); all are compared with
torch, those that agree timed in turn, in one run, and the fastest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core import machine, nest
from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.timing import threads as set_threads
from gossamer.datasets import Split
from gossamer.runtime.compare import Closeness, altered, closeness, compared, probes
from gossamer.runtime.export import PRECISIONS, Precision, batches_of
from gossamer.runtime.flat import Flat, flatten
from gossamer.runtime.plan.arrays import TOLERANCE
from gossamer.runtime.plan.capture import Captured, capture
from gossamer.runtime.plan.choose import Measured, timed
from gossamer.runtime.plan.explain import describe
from gossamer.runtime.plan.facts import Facts
from gossamer.runtime.plan.forms import form_of, leaves, values
from gossamer.runtime.plan.fuse import fused
from gossamer.runtime.plan.graph import Graph, Node, Value, batch_of
from gossamer.runtime.plan.plan import Plan, Run
from gossamer.runtime.plan.roofline import peaks, predicted
from gossamer.runtime.plan.wholes import Whole, Wholes, copies

__all__ = ["ENGINES", "FLOOR", "Engine", "compile_network", "recheck"]

FLOOR = 0.98
"""Of int8: the least cosine, as of an export."""

_MORE, _LONGER = 10, 5  # times a node's rounds and seconds: whole networks in turn
_FAR = 1.5  # times the fastest so far: a whole network that is no more looked at
Engine = Literal["auto", "plan", "own", "onnxruntime", "openvino", "numpy", "torch"]
ENGINES: tuple[Engine, ...] = ("auto", "plan", "own", "onnxruntime", "openvino", "numpy", "torch")


def compile_network(
    model: nn.Module,
    example_inputs: Any,
    *,
    engine: Engine = "auto",
    precision: Precision = "float32",
    calibration: Iterable[Any] | Split | None = None,
    floor: float = FLOOR,
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
        engine: ``auto``: whatever is fastest (:mod:`gossamer.runtime.plan.wholes`); ``plan``: a
            kernel for each layer; ``own``: one of this library's, so that its file needs numpy
            alone and is open soonest; ``onnxruntime``, ``openvino``, ``numpy``, ``torch``: that
            alone, wherever it can.
        precision: ``int8``: layers on eight-bit weights and activations of seven bits too, each
            where that is faster (:mod:`gossamer.runtime.plan.int8`), with engine ``auto``,
            ``plan``, ``own`` or ``numpy``; ``auto`` tries the dense engines' eight bits too.
            Answers change: what each layer and the whole lose on the calibration inputs is stated,
            and a layer that loses far more than the others stays float32
            (:mod:`gossamer.runtime.plan.calibration`).
        calibration: inputs for int8: a split, or an iterable of batches like the example, as for
            :func:`gossamer.runtime.export.export`.
        floor: of int8: the least mean cosine of the outputs with torch's on the calibration inputs.
        threads: of each kernel. What is left to torch takes torch's own.
        rounds, seconds: at most, for each layer, and each whole network alone; those within half as
            much again as the fastest are then timed in turn, for ten and five times as much. What
            lies within 5 % of the fastest is measured up to twice more.
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
        outputs = flat.whole(*copies(tensors))
        wanted = flat(*copies(tensors))
    form = _output_form(outputs, len(wanted))
    _check_values(flat, tensors, form)
    captured = _captured(flat, tensors, wanted, engine, notes)
    graph, inputs = captured.graph, [t.numpy() for t in tensors]
    batch = batch_of(graph, inputs)
    facts = Facts(engine, machine.cpu(), threads, batch, notes=notes)
    with set_threads(threads):
        maker = Wholes(flat, captured, inputs, engine, facts, rounds, seconds, say)
        wholes, checks = {}, {}
        for name, whole in maker.all(batches):
            say(f"trying {name}")
            try:
                if whole.integers:
                    checks[name] = _judged(flat, batches, whole, floor)
                else:
                    checks[name] = str(_checked(flat, whole.graph, tensors, whole.run, name))
                call = partial(whole.run, inputs, batch)
                (facts.whole[name],) = timed([call], threads, rounds, seconds)
            except ArgumentError as e:
                facts.notes.append(f"{name} was refused: {e}")
                continue
            except Exception as e:  # engines have errors of any kind, and another serves
                if engine != "auto":
                    raise
                facts.notes.append(f"{name} was refused: {type(e).__name__}: {str(e)[:200]}")
                continue
            wholes[name] = whole
            most = _FAR * min(facts.whole.values())  # what is slower gives its memory back
            wholes = {n: w for n, w in wholes.items() if facts.whole[n] <= most}
        if not wholes:
            raise ArgumentError(f"engine={engine!r} cannot be used: {'; '.join(facts.notes)}")
        say(f"timing {', '.join(wholes)}")
        calls = [partial(whole.run, inputs, batch) for whole in wholes.values()]
        taken = timed(calls, threads, _MORE * rounds, _LONGER * seconds)
        facts.whole |= dict(zip(wholes, taken, strict=True))
    facts.engine = min(wholes, key=lambda name: facts.whole[name])
    best = wholes[facts.engine]
    facts.check, facts.chosen = checks[facts.engine], best.chosen
    facts.precision = "int8" if best.integers else "float32"
    facts.kept = facts.kept if best.kept is None else best.kept
    facts.notes += [best.note] if best.note else []
    for node in best.graph.nodes:
        row = best.found.get(node.name, Measured())
        kernel = facts.chosen.get(node.name, facts.engine)
        facts.rows.append(
            {**describe(best.graph, node), "kernel": kernel, "ms": row.ms, "refused": row.refused,
             **predicted(best.graph, node, kernel, batch, peaks(threads))}
        )  # fmt: skip
    plan = Plan(
        best.graph, best.run, facts, form_of(_inputs(example_inputs)), form, flat.inputs,
        captured.islands,
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
    if engine not in ("auto", "plan", "own", "numpy"):
        raise ArgumentError(
            f"precision='int8' is for engine 'auto', 'plan', 'own' or 'numpy', not {engine!r}; "
            "gossamer.export writes int8 for onnxruntime"
        )
    if calibration is None:
        raise ArgumentError(
            "precision='int8' needs calibration inputs, which set the ranges of activations; give "
            "calibration= some hundred examples like those it will see (--data)"
        )
    if not 0 <= floor <= 1:
        raise ArgumentError(f"floor={floor} is a cosine between 0 and 1")


def recheck(plan: Plan, model: nn.Module, example_inputs: Any, floor: float = FLOOR) -> None:
    """Raise :class:`ArgumentError` where a plan from a file gives something else than the network.

    ``example_inputs``, ``floor``: as for :func:`compile_network`.
    """
    flat, tensors, _ = flatten(model, example_inputs)
    if plan.facts.precision == "int8":
        _judged(flat, [tensors], Whole(plan.arrays, plan.graph, integers=True), floor)
        return  # what is stated of the calibration inputs stays
    plan.facts.check = str(_checked(flat, plan.graph, tensors, plan.arrays, "the plan"))


def _inputs(example: Any) -> Any:
    return tuple(example) if isinstance(example, (tuple, list)) else example


def _output_form(outputs: Any, count: int) -> Any:
    """The form of what the network gives; of objects of its own, a tuple of their tensors."""
    if len(leaves(outputs)) == count:
        return form_of(outputs)
    return ["tuple", [None] * count]


def _check_values(flat: Flat, tensors: Sequence[Tensor], form: Any) -> None:
    """Raise :class:`ArgumentError` for what is given, is no tensor, and changes with the inputs."""
    held = [v for v in values(form) if v is not None]
    if not held or any(t.ndim == 0 or not len(t) for t in tensors):
        return
    for count in (len(tensors[0]), len(tensors[0]) + 1):
        try:
            with torch.no_grad():
                found = flat.whole(*altered(tensors, count))
        except Exception:  # the user's own forward, which may raise anything
            continue
        if _output_form(found, len(nest.leaves(found))) != form:
            raise ArgumentError(
                f"{type(flat.model).__name__} gives {held[0]!r}, which is no tensor and "
                "changes with its inputs, and a plan would give the example's for all; give it as "
                "a tensor, or leave it out"
            )


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


def _judged(flat: Flat, batches: Sequence[Sequence[Tensor]], whole: Whole, floor: float) -> str:
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


def _checked(flat: Flat, graph: Graph, tensors: Sequence[Tensor], run: Run, name: str) -> Closeness:
    """The run beside torch on the example, and on other batches where the batch is free.

    Raises :class:`ArgumentError` where they differ.
    """
    batches = probes(flat, tensors) if graph.free else [tuple(tensors)]
    worst: Closeness | None = None
    for rows in batches:
        arrays = [t.numpy() for t in rows]
        with torch.no_grad():
            wanted = flat(*copies(rows))
        got = [torch.from_numpy(a) for a in run(arrays, batch_of(graph, arrays))]
        one = closeness(wanted, got, name)
        if not one.relative <= TOLERANCE:
            raise ArgumentError(
                f"it gives something else than torch on a batch of {batch_of(graph, arrays)}: "
                f"{one}; {TOLERANCE:g} is allowed"
            )
        worst = one if worst is None or one.relative > worst.relative else worst
    assert worst is not None  # there is an example
    return worst
