"""What runs networks here: a table of engines, each preparing a call from a network and a batch.

Another package adds one by ``ENGINES.register``. Threads are stated for each call that is
prepared: onnxruntime and OpenVINO have pools of their own, torch's are set around the timing.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.core.tables import Table
from gossamer.core.timing import threads as set_threads
from gossamer.quantize.emulated import Emulated
from gossamer.quantize.network import FixedPoint
from gossamer.runtime import executorch, export, onnx, openvino, sessions
from gossamer.runtime.flat import Flat, flatten
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.quiet import quiet, reason

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["ENGINES", "Call", "Engine", "Subject", "installed"]

Tensors = Sequence[Tensor]


@dataclass
class Subject:
    """A network as engines take it: every form is made once, when an engine asks for it.

    Args:
        name: in tables.
        model: left as it is. A fixed-point network has its int8 form alone.
        example: one batch as the network takes it.
        calibration: batches like the example, for int8; none: the example itself, which says
            enough of speed and little of accuracy.
        file_bytes: of its file, where it came from one.
    """

    name: str
    model: nn.Module | FixedPoint
    example: Any
    calibration: Sequence[Any] = ()
    file_bytes: int | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def flat(self) -> Flat:
        """The plain float32 network."""
        if isinstance(self.model, (FixedPoint, Emulated)):
            raise ArgumentError(f"{self.name} computes in fixed point; only int8 engines have it")
        return self._flattened[0]

    @cached_property
    def _flattened(self) -> tuple[Flat, tuple[Tensor, ...], list[str]]:
        assert isinstance(self.model, nn.Module)  # a fixed-point network has no flat form
        return flatten(self.model, self.example)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The example's."""
        if isinstance(self.model, (FixedPoint, Emulated)):
            return (self.example.float().cpu(),)
        return self._flattened[1]

    @cached_property
    def onnx(self) -> ModelProto:
        """The float32 model, compared with torch."""
        sessions.needs("onnx", "onnxscript", "onnxruntime", extra="onnx", why="it runs exports")
        made, _, told = export.float32(self.flat, self.tensors)
        self.notes += [f"{self.name}: {t}" for t in told]
        return made

    @cached_property
    def int8(self) -> ModelProto:
        """The eight-bit model, compared with torch; a fixed-point network's own formats."""
        if isinstance(self.model, (FixedPoint, Emulated)):
            net = self.model.net() if isinstance(self.model, Emulated) else self.model
            return onnx.to_onnx(net)
        batches = list(
            export.batches_of(self.calibration or [self.example], self.example, self.tensors)
        )
        made, check, _ = export.eight_bits(self.flat, self.tensors, self.onnx, batches)
        self.notes.append(f"{self.name} in int8: {check}")
        return made

    def rows(self, count: int) -> tuple[Tensor, ...]:
        """The example as a batch of so many: its examples in turn."""
        picks = torch.arange(count)
        return tuple(t[picks % len(t)].contiguous() for t in self.tensors)


@dataclass(frozen=True)
class Call:
    """A prepared forward pass: ``run()`` is timed, ``read`` makes tensors of what it gives."""

    run: Callable[[], Any]
    read: Callable[[Any], Sequence[Tensor]]


@dataclass(frozen=True)
class Engine:
    """One way to run a network.

    Attributes:
        prepare: subject, the tensors of a batch, threads -> the call. Raises
            :class:`ArgumentError` saying why where it cannot.
        packages: that must be installed.
        size: bytes of the file that it runs; None: it runs the module.
        exact: float32, to be compared with torch to 1e-3; else eight bits.
        slow: takes minutes to prepare: left out where no engine is named.
        values: its time depends on the weights' values, zeros above all.
    """

    prepare: Callable[[Subject, Tensors, int], Call]
    packages: tuple[str, ...] = ()
    size: Callable[[Subject], int] | None = None
    exact: bool = True
    slow: bool = False
    values: bool = False


def installed(name: str) -> bool:
    """Whether the packages of an engine are there; raises for one that the table lacks."""

    def there(package: str) -> bool:
        try:
            return find_spec(package) is not None
        except (ImportError, ValueError):  # a parent that is missing, or none
            return False

    return all(there(package) for package in ENGINES[name].packages)


def _eager(subject: Subject, batch: Tensors, threads: int) -> Call:
    return Call(partial(subject.flat, *batch), list)


def _compiled(subject: Subject, batch: Tensors, threads: int) -> Call:
    flat = subject.flat

    def run(*tensors: Tensor) -> Any:
        return flat(*tensors)

    # Compiled code is kept by code object, and a handful at most: each network has its own.
    own = types.FunctionType(
        run.__code__.replace(co_name=f"run_{id(subject)}_{len(batch[0])}_{threads}"),
        run.__globals__,
        closure=run.__closure__,
    )
    made = torch.compile(own, fullgraph=True, dynamic=False)
    with quiet(), torch.no_grad(), set_threads(threads):
        try:
            made(*batch)
        except Exception as e:  # the compiler's errors have no common base
            raise ArgumentError(f"torch.compile does not take it: {reason(e)}") from e
    return Call(partial(made, *batch), list)


def _onnxruntime(form: str) -> Callable[[Subject, Tensors, int], Call]:
    def prepare(subject: Subject, batch: Tensors, threads: int) -> Call:
        opened = sessions.session(getattr(subject, form), threads=threads)
        names = [given.name for given in opened.get_inputs()]
        feeds = {n: t.numpy() for n, t in zip(names, batch, strict=True)}
        sessions.run(opened, batch)  # says in words what does not fit
        return Call(
            partial(opened.run, None, feeds), lambda out: [torch.from_numpy(o) for o in out]
        )

    return prepare


def _openvino(form: str) -> Callable[[Subject, Tensors, int], Call]:
    def prepare(subject: Subject, batch: Tensors, threads: int) -> Call:
        opened = openvino.compiled(getattr(subject, form), threads=threads)
        given = [t.numpy() for t in batch]
        return Call(partial(opened, given), lambda out: openvino.tensors(opened, out))

    return prepare


def _executorch(subject: Subject, batch: Tensors, threads: int) -> Call:
    if threads != 1:
        raise ArgumentError("ExecuTorch's Python runtime takes no number of threads")
    method = executorch.opened(executorch.program(subject.flat, batch))
    return Call(partial(method.execute, list(batch)), list)


def _gossamer(precision: export.Precision) -> Callable[[Subject, Tensors, int], Call]:
    def prepare(subject: Subject, batch: Tensors, threads: int) -> Call:
        more: dict[str, Any] = {}
        if precision == "int8":
            given = subject.calibration or [subject.example]
            flat = export.batches_of(given, subject.example, subject.tensors)
            more = {"engine": "plan", "precision": "int8", "calibration": list(flat)}
        plan = compile_network(subject.flat, tuple(batch), threads=threads, **more)
        if more:
            subject.notes.append(f"{subject.name} in an int8 plan: {plan.facts.check}")
        return Call(plan.bind(*batch), list)

    return prepare


def _onnx_size(form: str) -> Callable[[Subject], int]:
    return lambda subject: len(getattr(subject, form).SerializeToString())


def _openvino_size(form: str) -> Callable[[Subject], int]:
    return lambda subject: sum(map(len, openvino.files(getattr(subject, form))))


_ORT = ("onnx", "onnxscript", "onnxruntime")

ENGINES: Table[Engine] = Table(
    "engine",
    {
        "torch": Engine(_eager),
        "torch.compile": Engine(_compiled, slow=True),
        "onnxruntime": Engine(_onnxruntime("onnx"), _ORT, _onnx_size("onnx")),
        "onnxruntime-int8": Engine(_onnxruntime("int8"), _ORT, _onnx_size("int8"), exact=False),
        "openvino": Engine(_openvino("onnx"), (*_ORT, "openvino"), _openvino_size("onnx")),
        "openvino-int8": Engine(
            _openvino("int8"), (*_ORT, "openvino"), _openvino_size("int8"), exact=False
        ),
        "gossamer": Engine(_gossamer("float32"), values=True),
        "gossamer-int8": Engine(_gossamer("int8"), exact=False, values=True),
        "executorch": Engine(_executorch, ("executorch", "ruamel")),
    },
)
"""Engine -> how it is prepared."""
