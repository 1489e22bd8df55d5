"""Method: what attaches to a model and its optimizer and then works in anybody's training loop.

A method hooks :meth:`torch.optim.Optimizer.step`: ``before_step`` runs when the gradients are
there, ``after_step`` when the weights have moved. No trainer is needed::

    method = Pruned(masks).attach(model, optimizer)
    ...                       # any loop that calls optimizer.step()
    method.finish()           # plain tensors are left behind
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer.core import hooks, names
from gossamer.core.errors import ArgumentError
from gossamer.core.latent import check_norm
from gossamer.core.masks import Eraser, Masks

__all__ = ["Masked", "Method", "Snapshot"]


class Method(ABC):
    """Base of all training-time methods. Subclasses fill in the hooks they need.

    ``_setup`` is called by :meth:`attach` with everything checked, ``_state`` and ``_load`` make
    resume bit-identical in every order of attaching and loading, ``finish`` leaves plain tensors
    behind.

    Attributes:
        parametrizes: whether the model's ``state_dict`` has other names while it is attached: it
            is attached, to no optimizer if need be, before the model's state is loaded.
    """

    parametrizes: bool = False
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    _arguments: Mapping[str, Any] = {}

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Keep the arguments: they are what a state is compared with."""
        self = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **options)
        bound.apply_defaults()
        self._arguments = {n: v for n, v in bound.arguments.items() if v is not self}
        return self

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._attached = False
        self._pending: dict[str, Any] | None = None  # a state loaded before there was a model
        self._before: dict[str, tuple[tuple[float, ...], Tensor]] = {}

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self),), self.__dict__

    def settings(self) -> dict[str, Any]:
        """The arguments that the method was made with, as plain values, by name.

        Tensors, generators and functions are told by their type alone: what they hold is state.
        Written into :meth:`state_dict`, so that a state is not taken for another method's.
        """
        return {name: _plain(value) for name, value in self._arguments.items()}

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Self:
        """Attach to ``model`` and hook ``optimizer`` (none: call the hooks yourself).

        A wrapper that keeps the optimizer in ``.optimizer`` will do. Steps that a gradient scaler
        has a fused optimizer skip inside do not count. Of several optimizers give one: where
        another one's step moves what the method holds, it is held again; that step does not
        count. So it is where none is given: any optimizer is another one then, and steps count
        where you call the hooks.

        Raises :class:`ArgumentError` when already attached, when ``optimizer`` is none and wraps
        none, or when nothing can be done with this model; the model is left as it was.
        """
        if self._attached:
            raise ArgumentError(f"{type(self).__name__} is attached already; detach() it first")
        if optimizer is not None:
            optimizer = hooks.unwrap(optimizer)
            if (
                isinstance(optimizer, torch.optim.SparseAdam)
                and type(self)._guarded is not Method._guarded
            ):
                raise ArgumentError(
                    f"SparseAdam moves only rows with a sparse gradient, and {type(self).__name__} "
                    "makes the gradients of its weights dense; attach to Adam or SGD"
                )
        self.model, self.optimizer = model, optimizer
        self._setup()
        if self._pending is not None:  # loaded first: what attaching has drawn is not wanted
            state, self._pending = self._pending, None
            self._load(state)
        if optimizer is not None:
            self._handles = hooks.on_steps(self, optimizer)
        if any(True for _ in self._guarded()):
            if optimizer is not None:
                hooks.forget(optimizer)
            self._handles.append(hooks.watch(self))
        self._attached = True
        return self

    @abstractmethod
    def _setup(self) -> None:
        """Check the model and build the state; raise before anything is changed."""

    def before_step(self) -> None:  # noqa: B027 (optional hook)
        """Gradients are there, the weights have not moved."""

    def after_step(self) -> None:  # noqa: B027 (optional hook)
        """The optimizer has moved the weights."""

    def _guarded(self) -> Iterable[Tensor]:
        """Parameters that the method holds: after another optimizer's step they are held again."""
        return ()

    def _replaced(self) -> Iterable[Tensor]:
        """The weights' own parameters, where others stand in their place."""
        return ()

    def _hold_again(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 (optional hook)
        """``optimizer``, another one, has moved what is held; no step of this method's."""

    def _zeros(self) -> hooks.Zeros:
        """What :meth:`finish` leaves, and a further step of the same optimizer would move."""
        return []

    def _look_out(self) -> None:
        """Warn when the optimizers go on after :meth:`finish` and move what was held."""
        seen = [o for h in self._handles if hasattr(h, "seen") for o in h.seen]
        zeros = self._zeros()
        for optimizer in [*seen, *([] if self.optimizer is None else [self.optimizer])]:
            hooks.look_out(optimizer, type(self).__name__, zeros)

    def detach(self) -> None:
        """Remove the optimizer hooks; the model keeps its present form."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._attached = False

    def finish(self) -> None:
        """Detach and leave plain tensors behind.

        Nothing is held any more: an optimizer that goes on moves what was. The first step that
        does so warns with :class:`gossamer.core.hooks.OptimizerWarning`.
        """
        self._look_out()
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that resume needs, as tensors and plain values (``weights_only`` loads it)."""
        return {**self._state(), "settings": self.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, before or after :meth:`attach`.

        The model's and the optimizer's own states may be loaded before or after it, as long as
        the model has the form that it was saved in: a method that puts parameters of its own in
        the weights' place is attached first, or torch refuses the model's state.

        Raises :class:`ArgumentError` for the state of a method with other settings, naming the
        first that differs. A state of an older version names none, and is taken as it is.
        """
        found, mine = state.get("settings"), self.settings()
        if found is not None and found != mine:
            absent = object()
            name = next(n for n in [*mine, *found] if found.get(n, absent) != mine.get(n, absent))
            raise ArgumentError(
                f"the state is of {type(self).__name__} with {name}={found.get(name)!r}, this one "
                f"has {name}={mine.get(name)!r}; make the method as it was when the state was "
                "saved, or begin without the state"
            )
        self._load(state)
        if not self._attached:
            self._pending = copy.deepcopy(state)

    def _state(self) -> dict[str, Any]:
        """What :meth:`state_dict` returns, without the settings."""
        return {}

    def _load(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional hook)
        """Restore what :meth:`_state` returned."""

    def _overwriting(self, weights: Mapping[str, Tensor]) -> None:
        """Keep a copy of what attaching is about to overwrite, until the first step.

        A model's state may have been loaded before :meth:`attach`, and the method's own comes
        after it: :meth:`_restore` then puts back what attaching has overwritten.
        """
        self._before = {n: ((), w.detach().clone()) for n, w in weights.items()}

    def _overwritten(self, weights: Mapping[str, Tensor]) -> None:
        """Attaching has written what it writes."""
        self._before = {n: (_mark(weights[n]), kept) for n, (_, kept) in self._before.items()}

    @torch.no_grad()
    def _restore(self, weights: Mapping[str, Tensor]) -> None:
        """Put back what attaching overwrote, where nothing has written there since."""
        for name, (mark, kept) in self._before.items():
            if _mark(weights[name]) == mark:
                weights[name].copy_(kept)
        self._before = {}


def _blank(cls: type[Method]) -> Method:
    return object.__new__(cls)


def _mark(weight: Tensor) -> tuple[float, ...]:
    """Changes when the tensor is written to, through ``.data`` too, which torch does not count."""
    values = weight.detach().double()
    return weight._version, float(values.sum()), float(values.square().sum())


def _plain(value: Any) -> Any:
    """A setting as JSON and ``weights_only`` hold it; equal for equal settings."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        tensors = any(isinstance(v, Tensor) for v in fields.values())
        return type(value).__name__ if tensors else _plain(fields)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        held = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [_plain(v) for v in held]
    if isinstance(value, (torch.dtype, torch.device, PurePath)):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    return type(value).__name__


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

    def settings(self) -> dict[str, Any]:
        """How removed weights are held; which they are, and at what, is state."""
        return {"mask_gradients": self.mask_gradients, "mask_buffers": self.mask_buffers}

    def _setup(self) -> None:
        self._parameters = names.parameters(self.model)
        self.masks.check(self._parameters)
        for name, value in self.values.items():
            if name not in self.masks or value.shape != self.masks[name].shape:
                raise ArgumentError(
                    f"values[{name!r}] of shape {tuple(value.shape)} has no mask of its shape"
                )
            if value[~self.masks[name]].any():  # zeros stay zeros
                for module in self.model.modules():
                    if any(p is self._parameters[name] for p in module._parameters.values()):
                        check_norm(module, name)
        held = {name: self._parameters[name] for name in self.masks}
        self._overwriting(held)
        self._hold()
        self._overwritten(held)

    def _hold(self) -> None:
        self._eraser = Eraser(self.masks, self.values)
        for name in self.masks:
            self._eraser.hold_(name, self._parameters[name])

    @torch.no_grad()
    def before_step(self) -> None:
        """Zero the removed weights' gradients; sparse ones become dense."""
        self._before = {}
        hooks.dense_gradients(self._guarded())
        if self.mask_gradients:
            for name in self.masks:
                grad = self._parameters[name].grad
                if grad is not None:
                    self._eraser.erase_(name, grad)

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the removed weights back, and zero their optimizer buffers."""
        self._hold_again(self.optimizer)

    def _guarded(self) -> Iterable[Tensor]:
        return [self._parameters[name] for name in self.masks]

    def _hold_again(self, optimizer: torch.optim.Optimizer | None) -> None:
        for name in self.masks:
            p = self._parameters[name]
            self._eraser.hold_(name, p)
            if self.mask_buffers:
                for value in hooks.buffers(optimizer, p):
                    self._eraser.erase_(name, value)

    def _zeros(self) -> hooks.Zeros:
        if not hasattr(self, "_parameters"):
            return []
        return [(n, self._parameters[n], m, self.values.get(n)) for n, m in self.masks.items()]

    def _state(self) -> dict[str, Any]:
        """The masks, and the values where there are any."""
        held = {"values": dict(self.values)} if self.values else {}
        return {"masks": dict(self.masks), **held}

    def _load(self, state: dict[str, Any]) -> None:
        """Restore them and apply them."""
        self.masks = Masks(state["masks"])
        self.values = dict(state.get("values", {}))
        if hasattr(self, "_parameters"):
            self.masks.check(self._parameters)
            self._restore(self._parameters)
            self._hold()


class Snapshot(Method):
    """Keeps a copy of the model: after step ``at``, and whenever :meth:`take` is called.

    Its copy is part of the checkpoint, so that a resumed run has it too.

    Attributes:
        at: the step, counted from 1; None: only when told.
        steps: steps seen.
        taken: the copy (:func:`gossamer.core.names.snapshot`), empty before there is one.
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

    def _state(self) -> dict[str, Any]:
        """Steps seen and the copy."""
        return {"steps": self.steps, "taken": dict(self.taken)}

    def _load(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.steps, self.taken = int(state["steps"]), dict(state["taken"])
