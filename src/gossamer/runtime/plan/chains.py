"""Compiled calls that follow each other, as one: one from Python costs as much as a small layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel

__all__ = ["Refusing", "chained"]

Call = Callable[[], object]


def chained(calls: Iterable[Call]) -> list[Call]:
    """The calls, those that are compiled (they have a ``step``) and follow each other as one."""
    made: list[Call] = []
    for compiled, run in itertools.groupby(calls, lambda call: hasattr(call, "step")):
        some = list(run)
        made += [_Chain(some)] if compiled and len(some) > 1 else some
    return made


class Refusing:
    """A compiled call that may refuse its input, and what says why.

    Args:
        run: the call; False where it refuses.
        why: raises the error where the input is one that is refused.
    """

    def __init__(self, run: Any, why: Call) -> None:
        self.step, self.why = run.step, why  # for chains
        self._run = run

    def __call__(self) -> None:
        """Compute; raises what ``why`` raises."""
        if not self._run():
            self.why()


class _Chain:
    def __init__(self, calls: list[Call]) -> None:
        module: Any = kernel("small")
        self._calls, self._run = calls, module.Chain(calls)
        self.step = self._run.step  # a chain may be part of another

    def __call__(self) -> None:
        if not self._run():
            self.why()

    def why(self) -> None:
        """Raise the error of the call that refused its input.

        Nothing runs again: calls share memory, and what the first ones read may be overwritten.
        """
        for call in self._calls:
            if hasattr(call, "why"):
                call.why()
        raise ArgumentError("a call of the plan refused its input")
