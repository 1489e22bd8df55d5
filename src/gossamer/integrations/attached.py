"""Methods attached in somebody's trainer, where their state travels in the optimizer's.

Every trainer saves ``optimizer.state_dict()`` in its checkpoints and gives it to
``load_state_dict`` on resume. What the methods need is put in there under a key of its own, and
taken out again: there is no second file to find, and none that a kill could leave behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import hooks
from gossamer.core.errors import ArgumentError
from gossamer.core.method import Method

__all__ = ["KEY", "Attached"]

KEY = "gossamer"
"""Where the methods' state is in the optimizer's."""


class Attached:
    """Methods attached to one model and optimizer, their state in the optimizer's ``state_dict``.

    Args:
        methods: attached here, in this order; finished in the reverse one.
        model: not yet wrapped for several processes, where a method parametrizes it.
        optimizer: or a wrapper that keeps it in ``.optimizer``; with no learning-rate scheduler
            yet, where a method gives parameters a group of their own.

    Attributes:
        methods, optimizer: as given, unwrapped.
        steps: optimizer steps seen, those before a resume included.

    Raises :class:`ArgumentError` for no method, an optimizer that has such methods already, a
    method that does not fit, or a scheduler that does not know a method's parameter group. Loading
    a state that has none of methods, or that of others, does too.
    """

    def __init__(
        self, methods: Sequence[Method], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.methods = tuple(methods)
        self.model, self.optimizer = model, hooks.unwrap(optimizer)
        self.steps = 0
        self._digest: str | None = None  # of the model that a state was loaded for
        self._waiting: Mapping[str, Any] = {}
        self._given: dict[str, Any] = {}  # the last state that was asked for
        if not self.methods or not all(isinstance(m, Method) for m in self.methods):
            raise ArgumentError(f"methods={methods!r}; give at least one gossamer Method")
        if KEY in self.optimizer.state_dict():
            raise ArgumentError(
                "the optimizer has methods of another adapter; give them all to one, or finish() "
                "that first"
            )
        groups = len(self.optimizer.param_groups)
        attached: list[Method] = []
        try:
            for method in self.methods:
                attached.append(method.attach(model, self.optimizer))
        except BaseException:
            for method in reversed(attached):
                method.detach()
            raise
        if len(self.optimizer.param_groups) > groups and hasattr(
            self.optimizer.step, "_wrapped_by_lr_sched"
        ):
            raise ArgumentError(
                "a method gave some parameters a group of their own, which the learning-rate "
                "scheduler, made before, does not know; build model, optimizer and methods anew, "
                "and attach before the scheduler is made"
            )
        self._handles = [
            self.optimizer.register_step_post_hook(self._count),
            self.optimizer.register_state_dict_post_hook(self._put),
            self.optimizer.register_load_state_dict_pre_hook(self._take),
            self.optimizer.register_load_state_dict_post_hook(self._loaded),
        ]

    def state_dict(self) -> dict[str, Any]:
        """What resume needs, and a digest of the model's tensors."""
        return {
            "methods": [{"kind": type(m).__name__, "state": m.state_dict()} for m in self.methods],
            "steps": self.steps,
            "model": digest(self.model),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, on whatever device it is by now."""
        self._check(state)
        for method, saved in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(_on_cpu(saved["state"]))
        self.steps, self._digest = int(state["steps"]), str(state["model"])

    def check_resumed(self, steps: int) -> None:
        """Raise :class:`ArgumentError` unless a run that goes on at ``steps`` has all its state.

        The model must have the very bits that it was saved with: trainers pass over tensors that a
        file lacks, or has under other names.
        """
        if not steps:
            return
        if not self.steps:
            raise ArgumentError(
                f"the run goes on at step {steps}, but its checkpoint held no state of the "
                "optimizer, and that of the methods is in there; save it whole (not the weights "
                "only), or begin anew"
            )
        if self._digest != digest(self.model):
            raise ArgumentError(
                f"the run goes on at step {steps}, but the model does not have the weights that "
                "the checkpoint was made of: some were not restored. Make the methods as they "
                "were, before the checkpoint is loaded"
            )

    def finish(self) -> None:
        """Finish the methods, last attached first; plain tensors are left behind."""
        for handle in self._handles:
            handle.remove()
        for method in reversed(self.methods):
            method.finish()

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def _put(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        self._given = self.state_dict()
        return {**state, KEY: self._given}

    def _take(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        if KEY not in state:
            raise ArgumentError(
                "the optimizer's state holds none of methods: its run had none attached. Begin "
                f"anew, or go on without {', '.join(type(m).__name__ for m in self.methods)}"
            )
        self._check(state[KEY])
        self._waiting = state[KEY]
        return {name: value for name, value in state.items() if name != KEY}

    def _loaded(self, _: Any) -> None:
        # After the optimizer's own, and after the model's in every trainer. Accelerate gives an
        # optimizer its own state back, on the device: nothing for the methods, whose masks of the
        # beginning would be applied to a model that is loaded by then.
        state, self._waiting = self._waiting, {}
        own = state["model"] is self._given.get("model") and state["steps"] == self.steps
        if not own:
            self.load_state_dict(state)

    def _check(self, state: Mapping[str, Any]) -> None:
        theirs = [m["kind"] for m in state["methods"]]
        mine = [type(m).__name__ for m in self.methods]
        if theirs != mine:
            raise ArgumentError(
                f"the state is of {', '.join(theirs)}, attached are {', '.join(mine)}; give the "
                "methods of the run that was saved, in its order"
            )


@torch.no_grad()
def digest(model: nn.Module) -> str:
    """SHA-256 over the bytes of the tensors of the model's ``state_dict``, tied ones once."""
    total = hashlib.sha256()
    seen: set[int] = set()
    for value in model.state_dict(keep_vars=True).values():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            total.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _on_cpu(value: Any) -> Any:
    # Trainers move all tensors of a state to the device; a generator's must stay here.
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {k: _on_cpu(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(v) for v in value)
    return value
