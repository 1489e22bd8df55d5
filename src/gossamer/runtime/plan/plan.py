"""A network with its kernels chosen: called as the network is, and says what it does.

Nothing here needs torch: a plan that was read from a file takes and gives numpy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.runtime.plan import planfile
from gossamer.runtime.plan.explain import table
from gossamer.runtime.plan.facts import Contents, Facts, Probe
from gossamer.runtime.plan.forms import built, leaves
from gossamer.runtime.plan.graph import Graph
from gossamer.runtime.plan.program import Program, steps_of

__all__ = ["Plan"]

Run = Callable[[Sequence[np.ndarray], int], list[np.ndarray]]


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
        self.probe: Probe = ((), ())
        """An example: inputs, and what torch gave for them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives: arrays for arrays, tensors of torch for tensors.

        Raises :class:`ArgumentError` for other inputs than the plan was made for.
        """
        given = leaves(self._nest(args, kwargs))
        arrays = [_array(value) for value in given]
        found: list[Any] = self.arrays(arrays, self.batch(arrays))
        if any(not isinstance(value, np.ndarray) for value in given):
            import torch

            found = [torch.from_numpy(a) for a in found]
        return built(self.forms[1], found)

    def arrays(self, given: Sequence[np.ndarray], batch: int) -> list[np.ndarray]:
        """Arrays that fit in, arrays out, in order; ``batch``: of how many examples."""
        run = self._run if all(map(_finite, given)) else self.portable
        return list(run(given, batch))

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
    def load(cls, path: str | Path, key: Mapping[str, Any] | None = None) -> Plan:
        """The plan of a file, ready to run; torch is not needed.

        ``key``: what it must have been made of; None: anything.

        Raises :class:`~gossamer.core.errors.FormatError` as
        :func:`gossamer.runtime.plan.planfile.read` does.
        """
        what, program = planfile.read(path, key)
        plan = cls(what.graph, program, what.facts, *what.forms, what.names)
        plan.probe = what.probe
        return plan

    def explain(self) -> str:
        """Layer by layer: shape, density, kernel, every candidate's time, and what torch runs."""
        return table(self.graph, self.facts)

    def __str__(self) -> str:
        return self.explain()

    def _nest(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        form = self.forms[0]
        if isinstance(form, list) and form[0] == "dict":
            keys = [key for key, _ in form[1]]
            if args or set(kwargs) - set(keys):
                raise ArgumentError(f"the network takes its inputs by name: {', '.join(keys)}")
            return [kwargs[key] for key in keys if key in kwargs]
        if kwargs:
            raise ArgumentError(f"argument {next(iter(kwargs))!r}: the plan takes inputs in order")
        return args

    def batch(self, arrays: Sequence[np.ndarray]) -> int:
        """How many examples arrays hold; :class:`ArgumentError` where they do not fit."""
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
    found: np.ndarray = value.detach().cpu().numpy()
    return found


def _finite(array: np.ndarray) -> bool:
    """Whether all is finite: a sum that is not may be of finite numbers, which costs only time."""
    return array.dtype.kind != "f" or bool(np.isfinite(np.add.reduce(array, None)))
