"""What a method hangs on optimizers: its own, and any other over the same parameters.

torch calls the hooks of :meth:`torch.optim.Optimizer.step` even where a gradient scaler has the
optimizer skip the step inside, and only those of the optimizer that they were put on. Here is
what makes a method's hooks run at steps that are taken, and see every optimizer that moves what
the method holds.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from gossamer.core.errors import ArgumentError

__all__ = [
    "OptimizerWarning",
    "Zeros",
    "buffers",
    "dense_gradients",
    "forget",
    "look_out",
    "on_steps",
    "skipped",
    "unwrap",
    "watch",
]

_dead: list[Any] = []  # hooks, which do nothing any more, of methods that nobody held
_DEEP = 16  # wrappers around wrappers
# name, parameter, where it stays, and what is held elsewhere (None: zeros)
Zeros = list[tuple[str, Tensor, Tensor, Tensor | None]]
_lookouts: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = weakref.WeakKeyDictionary()


class OptimizerWarning(UserWarning):
    """An optimizer moves what a method has held, or moves nothing where it seems to train."""


class _Hooked(Protocol):
    def before_step(self) -> None: ...
    def after_step(self) -> None: ...


class _Holding(Protocol):
    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...
    def _guarded(self) -> Iterable[Tensor]: ...
    def _replaced(self) -> Iterable[Tensor]: ...
    def _hold_again(self, optimizer: torch.optim.Optimizer) -> None: ...


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose ``step`` is hooked, out of wrappers that keep it in ``.optimizer``.

    Accelerate's ``AcceleratedOptimizer`` is such a wrapper; it is a subclass of torch's optimizer
    which was never initialised as one.

    Raises :class:`ArgumentError` for what is no optimizer and wraps none.
    """
    found = optimizer
    for _ in range(_DEEP):
        # set by Optimizer.__init__: without it there is nothing to hook
        if isinstance(found, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" in vars(found):
            return found
        found = getattr(found, "optimizer", None)
    raise ArgumentError(
        f"optimizer is {type(optimizer).__module__}.{type(optimizer).__qualname__}, neither a "
        "torch.optim.Optimizer nor a wrapper with one in .optimizer; pass the optimizer whose "
        "step() moves the weights (of several, one: steps of the others are seen too), or None "
        "and call before_step() and after_step() yourself"
    )


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that is being taken moves nothing.

    A gradient scaler lets fused optimizers skip by themselves: it sets ``found_inf`` for the time
    of the step.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(torch.as_tensor(found).sum() != 0)


def _unscale(optimizer: torch.optim.Optimizer) -> None:
    # A fused optimizer divides by the scale inside its step; methods read gradients before it.
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.div_(scale.to(p.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def on_steps(method: _Hooked, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Call the method's hooks at each step that ``optimizer`` takes; handles, to remove them.

    Gradients are unscaled when ``before_step`` reads them, whatever the scaler. A step that is
    given a closure has its gradients only when that has run: ``before_step`` is called after each
    evaluation.
    """

    def ready() -> None:
        if not skipped(optimizer):
            with torch.no_grad():
                _unscale(optimizer)
            method.before_step()

    def before(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        closure = options.get("closure", args[1] if len(args) > 1 else None)  # args[0]: optimizer
        if not callable(closure):
            return ready()

        def evaluated() -> Any:
            loss = closure()
            ready()
            return loss

        if "closure" in options:
            return args, {**options, "closure": evaluated}
        return (args[0], evaluated, *args[2:]), options

    def after(*_: Any) -> None:
        if not skipped(optimizer):
            method.after_step()

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


class _Watch:
    """Sees the steps of other optimizers, as long as its method lives and is attached."""

    def __init__(self, method: _Holding) -> None:
        self.seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._warned = False
        _bury()
        handle = register_optimizer_step_post_hook(self._stepped)
        self._handle: Any = handle
        # Not removed there and then: a method may die while torch goes through its hooks.
        self._method = weakref.ref(method, lambda _: _dead.append(handle))

    def remove(self) -> None:
        _bury()
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def __reduce__(self) -> Any:
        return _Nothing, ()  # a copy's method is attached to nothing

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        method = self._method()
        if method is None or method.optimizer is optimizer or skipped(optimizer):
            return
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in moved for p in method._guarded()):
            self.seen.add(optimizer)
            with torch.no_grad():
                method._hold_again(optimizer)
        if not self._warned and any(id(p) in moved for p in method._replaced()):
            self._warned = True
            name = type(method).__name__
            warnings.warn(
                f"{type(optimizer).__name__}, which {name} was not attached to, holds weights in "
                f"whose place {name} has put parameters of its own, and does not train them; make "
                f"the optimizer after {name} is attached",
                OptimizerWarning,
                stacklevel=3,
            )


def _bury() -> None:
    while _dead:
        _dead.pop().remove()


class _Nothing:
    def remove(self) -> None:
        pass


def watch(method: _Holding) -> _Watch:
    """See the steps of optimizers besides the method's own, until removed."""
    return _Watch(method)


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Take back :func:`look_out`: another method holds the weights now."""
    for handle in _lookouts.pop(optimizer, []):
        handle.remove()


def look_out(optimizer: torch.optim.Optimizer, name: str, zeros: Zeros) -> None:
    """Warn when the next step of ``optimizer`` moves what ``name`` has held and holds no longer.

    Only the next step is looked at, once; steps of optimizers made anew are not.
    """
    forget(optimizer)
    if not zeros:
        return
    held, intact = list(zeros), Zeros()
    waiting = [True]  # hooks are not removed while torch goes through them

    def before(*_: Any) -> None:
        if waiting and not skipped(optimizer):
            intact[:] = [zero for zero in held if not _moved(zero)]

    def after(*_: Any) -> None:
        if not waiting or skipped(optimizer):
            return
        waiting.clear()
        moved = [(zero[0], count) for zero in intact if (count := _moved(zero))]
        held.clear()
        intact.clear()
        if moved:
            warnings.warn(
                f"a step after {name}.finish() has moved {sum(c for _, c in moved)} weights that "
                f"it held, first of {moved[0][0]}; call finish() after the last step, or, to "
                "train them again on purpose, make a new optimizer",
                OptimizerWarning,
                stacklevel=3,
            )

    _lookouts[optimizer] = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]


@torch.no_grad()
def _moved(zero: tuple[str, Tensor, Tensor, Tensor | None]) -> int:
    _, tensor, kept, value = zero
    if tensor.shape != kept.shape:
        return 0
    off = tensor != (0 if value is None else value.to(tensor.device))
    return int((off & ~kept.to(tensor.device)).sum())


def dense_gradients(parameters: Iterable[Tensor]) -> None:
    """Make sparse gradients dense, in place of the old ones: masks and projections cover all."""
    for p in parameters:
        if p.grad is not None and p.grad.layout is not torch.strided:
            p.grad = p.grad.to_dense()


def buffers(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> list[Tensor]:
    """What the optimizer keeps for each weight of a parameter, in its shape; sparse ones become
    dense.
    """
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    found = []
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            if value.layout is not torch.strided:
                value = state[key] = value.to_dense()
            found.append(value)
    return found
