"""Method: what attaches to a model and its optimizer and then works in anybody's training loop.

A method hooks :meth:`torch.optim.Optimizer.step`: ``before_step`` runs when the gradients are
there, ``after_step`` when the weights have moved. No trainer is needed::

    method = Pruned(masks).attach(model, optimizer)
    ...                       # any loop that calls optimizer.step()
    method.finish()           # plain tensors are left behind
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer import names
from gossamer.errors import ArgumentError
from gossamer.masks import Eraser, Masks

__all__ = ["Masked", "Method", "Snapshot"]


class Method(ABC):
    """Base of all training-time methods. Subclasses fill in the hooks they need.

    ``_setup`` is called by :meth:`attach` with everything checked, ``state_dict`` /
    ``load_state_dict`` make resume bit-identical, ``finish`` leaves plain tensors behind.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._attached = False

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Self:
        """Attach to ``model`` and hook ``optimizer`` (none: call the hooks yourself).

        Raises :class:`ArgumentError` when already attached, or when nothing can be done with
        this model; the model is left as it was.
        """
        if self._attached:
            raise ArgumentError(f"{type(self).__name__} is attached already; detach() it first")
        self.model, self.optimizer = model, optimizer
        self._setup()
        if optimizer is not None:
            self._handles = [
                optimizer.register_step_pre_hook(lambda *_: self.before_step()),
                optimizer.register_step_post_hook(lambda *_: self.after_step()),
            ]
        self._attached = True
        return self

    @abstractmethod
    def _setup(self) -> None:
        """Check the model and build the state; raise before anything is changed."""

    def before_step(self) -> None:  # noqa: B027 (optional hook)
        """Gradients are there, the weights have not moved."""

    def after_step(self) -> None:  # noqa: B027 (optional hook)
        """The optimizer has moved the weights."""

    def detach(self) -> None:
        """Remove the optimizer hooks; the model keeps its present form."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._attached = False

    def finish(self) -> None:
        """Detach and leave plain tensors behind."""
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that resume needs, as tensors and plain values (``weights_only`` loads it)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional hook)
        """Restore what :meth:`state_dict` returned."""


class Masked(Method):
    """Hold weights where a mask removes them, at zero or at given values, whatever the optimizer.

    Weights are held in place after each step, which undoes momentum, Adam's moments and weight
    decay alike, to the bit.

    Args:
        masks: clean name -> bool tensor.
        mask_gradients: also zero the gradients of removed weights before the step.
        mask_buffers: also zero the optimizer's per-weight buffers (momentum, moments) after it.
        values: clean name -> what removed weights are held at; a name without one, at zero.
    """

    def __init__(
        self,
        masks: Masks,
        *,
        mask_gradients: bool = True,
        mask_buffers: bool = True,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.masks = masks
        self.mask_gradients = mask_gradients
        self.mask_buffers = mask_buffers
        self.values = dict(values or {})

    def _setup(self) -> None:
        self._parameters = names.parameters(self.model)
        self.masks.check(self._parameters)
        for name, value in self.values.items():
            if name not in self.masks or value.shape != self.masks[name].shape:
                raise ArgumentError(
                    f"values[{name!r}] of shape {tuple(value.shape)} has no mask of its shape"
                )
        self._hold()

    def _hold(self) -> None:
        self._eraser = Eraser(self.masks, self.values)
        for name in self.masks:
            self._eraser.hold_(name, self._parameters[name])

    @torch.no_grad()
    def before_step(self) -> None:
        """Zero the removed weights' gradients."""
        if self.mask_gradients:
            for name in self.masks:
                grad = self._parameters[name].grad
                if grad is not None:
                    self._eraser.erase_(name, grad)

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the removed weights back, and zero their optimizer buffers."""
        for name in self.masks:
            p = self._parameters[name]
            self._eraser.hold_(name, p)
            if self.mask_buffers and self.optimizer is not None:
                for value in self.optimizer.state.get(p, {}).values():
                    if isinstance(value, Tensor) and value.shape == p.shape:
                        self._eraser.erase_(name, value)

    def state_dict(self) -> dict[str, Any]:
        """The masks, and the values where there are any."""
        held = {"values": dict(self.values)} if self.values else {}
        return {"masks": dict(self.masks), **held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them and apply them."""
        self.masks = Masks(state["masks"])
        self.values = dict(state.get("values", {}))
        if self._attached:
            self._hold()


class Snapshot(Method):
    """Keeps a copy of the model: after step ``at``, and whenever :meth:`take` is called.

    Its copy is part of the checkpoint, so that a resumed run has it too.

    Attributes:
        at: the step, counted from 1; None: only when told.
        steps: steps seen.
        taken: the copy (:func:`gossamer.names.snapshot`), empty before there is one.
    """

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at = at
        self.steps = 0
        self.taken: names.Tensors = {}

    def _setup(self) -> None:
        if self.at is not None and self.at < 1:
            raise ArgumentError(f"at={self.at} must be at least 1, or None")

    def take(self) -> None:
        """Copy the model as it is now."""
        self.taken = names.snapshot(self.model)

    def after_step(self) -> None:
        """Count, and copy at the step asked for."""
        self.steps += 1
        if self.steps == self.at:
            self.take()

    def state_dict(self) -> dict[str, Any]:
        """Steps seen and the copy."""
        return {"steps": self.steps, "taken": dict(self.taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.steps, self.taken = int(state["steps"]), dict(state["taken"])
