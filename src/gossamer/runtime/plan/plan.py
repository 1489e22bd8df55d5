"""A network with its kernels chosen: called as the network is, and says what it does.

Nothing here needs torch: a plan that was read from a file takes and gives numpy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.plan import planfile
from gossamer.runtime.plan.facts import Contents, Facts, Probe
from gossamer.runtime.plan.forms import built, holds, taken
from gossamer.runtime.plan.graph import Graph
from gossamer.runtime.plan.program import Program, steps_of

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Plan"]

_ONES = np.ones(1 << 13, np.float32)

Run = Callable[[Sequence[np.ndarray], int], list[np.ndarray]]
_KINDS = 64  # of inputs that were checked: calls of the same shapes are not checked again


class Plan:
    """A compiled network.

    Calls from several threads may run at once. Inputs that are not finite take the portable
    kernels, which pass NaN and infinity on as torch does.

    Args:
        graph: what is computed.
        run: the chosen way: arrays and the size of the batch -> arrays.
        facts: what was measured.
        inputs, outputs: the forms of what it takes and gives (:mod:`~gossamer.runtime.plan.forms`).
        names: of the inputs, for messages.
        islands: modules of what was left to torch.
    """

    def __init__(
        self,
        graph: Graph,
        run: Run,
        facts: Facts,
        inputs: Any,
        outputs: Any,
        names: Sequence[str],
        islands: Sequence[Any] = (),
    ) -> None:
        self.graph, self.facts = graph, facts
        self._run, self._islands = run, islands
        self.forms, self.names = (inputs, outputs), tuple(names)
        self._kinds: dict[Any, int] = {}
        self.probe: Probe = ((), ())
        """An example: inputs, and what torch gave for them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives: arrays for arrays, tensors of torch for tensors.

        Raises :class:`ArgumentError` for other inputs than the plan was made for.
        """
        given = self._given(args, kwargs)
        arrays = [_array(value) for value in given]
        found: list[Any] = self.arrays(arrays, self.batch(arrays))
        for value, array in zip(given, arrays, strict=True):
            if value is not array:
                import torch

                found = [torch.from_numpy(a) for a in found]
                break
        return built(self.forms[1], found)

    def arrays(self, given: Sequence[np.ndarray], batch: int) -> list[np.ndarray]:
        """Arrays that fit in, arrays out, in order; ``batch``: of how many examples."""
        run = self._run if all(_finite(given[i]) for i in self._floats) else self.portable
        return list(run(given, batch))

    def bind(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """The plan on these very inputs, to be called again whenever they were written anew.

        Nothing is checked or copied at a call but that floats are finite: for contexts that a
        network reads at every step, frames from a camera. What a call gives is overwritten by the
        next one. Bound plans share no memory: each may have a thread of its own.

        Args:
            args, kwargs: as the plan is called, arrays or tensors in the processor's memory. They
                are read where they lie if they are contiguous and begin at a multiple of 64 bytes,
                as torch's tensors do; else copied at each call.

        Raises :class:`ArgumentError` for other inputs than the plan was made for, and for an empty
        batch.

        >>> import torch, gossamer
        >>> plan = gossamer.compile(torch.nn.Linear(2, 1), torch.zeros(1, 2), engine="numpy")
        >>> x = torch.zeros(1, 2)
        >>> call = plan.bind(x)
        >>> _ = x.fill_(1.0)
        >>> bool(torch.equal(call(), plan(x)))
        True
        """
        given = self._given(args, kwargs)
        arrays = [value if isinstance(value, np.ndarray) else _shared(value) for value in given]
        batch = self.batch(arrays)
        if not batch:
            raise ArgumentError("an empty batch cannot be bound; call the plan with it")
        tensors = any(value is not array for value, array in zip(given, arrays, strict=True))
        run = self._run.bound(arrays, batch) if isinstance(self._run, Program) else None
        watched = [arrays[i] for i in self._floats]

        def call() -> Any:
            if run is not None and all(map(_finite, watched)):
                found: Sequence[Any] = run()
            else:
                found = self.arrays(arrays, batch)
            if tensors:
                import torch

                found = [torch.from_numpy(a) for a in found]
            return built(self.forms[1], found)

        return call

    @cached_property
    def _floats(self) -> tuple[int, ...]:
        """Inputs that something else reads than ``quantize``, which looks for NaN itself."""
        if not isinstance(self._run, Program):
            return tuple(range(len(self.graph.inputs)))
        read = {n for node in self.graph.nodes if node.op != "quantize" for n in node.inputs}
        read |= set(self.graph.outputs)
        return tuple(i for i, name in enumerate(self.graph.inputs) if name in read)

    @cached_property
    def portable(self) -> Program:
        """The network by the portable kernels alone."""
        chosen = {n.name: "torch" if n.op == "torch" else "numpy" for n in self.graph.nodes}
        return Program(self.graph, steps_of(self.graph, chosen, 1, self._islands))

    def save(
        self, path: str | Path, key: Mapping[str, Any] | None = None, *, small: bool = False
    ) -> Path:
        """Write the plan to a file that :func:`gossamer.runtime.load` runs without torch.

        ``key``: what the plan was made of, kept in the file. ``small``: entropy-coded and without
        what no answer needs (:func:`gossamer.runtime.plan.packed.small`), for transport.

        Raises :class:`ArgumentError` where parts of it run in torch.
        """
        what = Contents(self.graph, self.facts, self.forms, self.names, self.probe)
        return planfile.write(what, path, key, small=small)

    @classmethod
    def load(
        cls, path: str | Path, key: Mapping[str, Any] | None = None, *, cache: bool = True
    ) -> Plan:
        """The plan of a file, ready to run; torch is not needed.

        ``key``, ``cache``: as for :func:`gossamer.runtime.plan.planfile.read`.

        Raises :class:`~gossamer.core.errors.FormatError` as
        :func:`gossamer.runtime.plan.planfile.read` does.
        """
        what, program = planfile.read(path, key, cache=cache)
        plan = cls(what.graph, program, what.facts, *what.forms, what.names)
        plan.probe = what.probe
        return plan

    def explain(self) -> str:
        """Layer by layer: shape, density, kernel, every candidate's time, and what torch runs."""
        from gossamer.runtime.plan.explain import table  # answers do without

        return table(self.graph, self.facts)

    def __str__(self) -> str:
        return self.explain()

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The tensors and arrays of a call, in order."""
        form = self.forms[0]
        if isinstance(form, list) and form[0] == "dict":
            keys = [key for key, _ in form[1]]
            if args or set(kwargs) - set(keys):
                raise ArgumentError(f"the network takes its inputs by name: {', '.join(keys)}")
            return taken(form, kwargs)
        if kwargs:
            raise ArgumentError(f"argument {next(iter(kwargs))!r}: the plan takes inputs in order")
        parts = form[1] if isinstance(form, list) and form[0] == "tuple" else [form]
        if len(args) > len(parts) or any(map(holds, parts[len(args) :])):
            names = ", ".join(self.names)
            raise ArgumentError(f"{len(args)} inputs where the network takes {len(parts)}: {names}")
        return taken(["tuple", parts], args)

    def batch(self, arrays: Sequence[np.ndarray]) -> int:
        """How many examples arrays hold; :class:`ArgumentError` where they do not fit."""
        kind = tuple([(a.shape, a.dtype) for a in arrays])
        found = self._kinds.get(kind)
        if found is None:
            if len(self._kinds) >= _KINDS:
                self._kinds.clear()
            found = self._kinds[kind] = self._checked(arrays)
        return found

    def _checked(self, arrays: Sequence[np.ndarray]) -> int:
        if len(arrays) != len(self.graph.inputs):
            raise ArgumentError(
                f"{len(arrays)} inputs where the network takes {len(self.graph.inputs)}: "
                f"{', '.join(self.names)}"
            )
        batch = -1
        for name, key, array in zip(self.names, self.graph.inputs, arrays, strict=True):
            want = self.graph.values[key]
            if str(array.dtype) != want.dtype:
                raise ArgumentError(f"{name} is {array.dtype}; the plan is for {want.dtype}")
            fits = len(array.shape) == len(want.shape)
            for have, size in zip(array.shape, want.shape, strict=False):
                if size < 0:
                    each, rest = divmod(have, -size)
                    fits = fits and not rest and batch in (-1, each)
                    batch = each
                else:
                    fits = fits and have == size
            if not fits:
                free = "N is any batch, the same for all" if self.graph.free else (
                    "its shapes are the example's: compile it for others with an example of theirs"
                )  # fmt: skip
                raise ArgumentError(f"{name} is {array.shape}; the plan is for {want} ({free})")
        return max(batch, 0) if self.graph.free else 1


def _array(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    try:
        found: np.ndarray = (value.detach() if value.requires_grad else value).numpy(force=True)
    except (TypeError, RuntimeError) as e:  # what numpy has no like of: bfloat16, sparse tensors
        raise _no_array(value, e) from e
    return found


def _no_array(value: Any, error: Exception) -> ArgumentError:
    kind = str(value.dtype).removeprefix("torch.")
    return ArgumentError(
        f"an input is a tensor of {kind} that numpy cannot read ({error}); give it as a plain "
        "tensor of the plan's type, such as x.float()"
    )


def _shared(value: Any) -> np.ndarray:
    """A tensor's own memory."""
    if value.device.type != "cpu":
        raise ArgumentError(f"a tensor on {value.device} cannot be bound; move it with .cpu()")
    try:
        found: np.ndarray = value.detach().numpy()
    except (TypeError, RuntimeError) as e:
        raise _no_array(value, e) from e
    return found


def _finite(array: np.ndarray) -> bool:
    """Whether all is finite.

    Without the compiled kernels by a sum, where one that is not may be of finite numbers, which
    costs only time; a short array is summed by one call of BLAS, on one thread.
    """
    if array.dtype.kind != "f":
        return True
    module = kernel("small")
    if module is not None and array.dtype == np.float32 and array.flags.c_contiguous:
        return bool(module.finite(array))
    if array.size > len(_ONES) or array.dtype != np.float32:
        return math.isfinite(np.add.reduce(array, None))
    return math.isfinite(array.ravel().dot(_ONES[: array.size]))
