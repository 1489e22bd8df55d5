"""What optimizers remember of the gradients: the moments that growth and curvature criteria use."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError

__all__ = ["momentum", "require_momentum", "require_second_moment", "second_moment"]

# where Adam's family and RMSprop keep the running mean of squared gradients
_SQUARES = ("exp_avg_sq", "square_avg")


def require_momentum(optimizer: torch.optim.Optimizer | None, why: str) -> None:
    """Raise :class:`ArgumentError` unless ``optimizer`` keeps a running mean of the gradients.

    ``why`` begins the message, such as ``growth 'momentum'``.
    """
    if optimizer is None:
        raise ArgumentError(f"{why} reads the optimizer's momentum; attach(model, optimizer)")
    for group in optimizer.param_groups:
        betas = group.get("betas")
        if not (group.get("momentum") or (betas and betas[0] > 0)):
            raise ArgumentError(
                f"{why} needs an optimizer with momentum, and this "
                f"{type(optimizer).__name__} has none; set momentum=0.9, use Adam, or choose "
                "'gradient' or 'random'"
            )


def momentum(optimizer: torch.optim.Optimizer, parameter: Tensor, *, eps: float = 1e-8) -> Tensor:
    """The smoothed gradient of a parameter, of its shape.

    SGD and RMSprop: the momentum buffer. Adam's family: m / (sqrt(v) + eps), the direction of its
    step (Dettmers and Zettlemoyer 2019, section 3). Zeros before the first step. Of 16-bit
    moments it is float32: there eps is 0, and a weight that never moved 0 / 0.

    Raises :class:`ArgumentError` when this optimizer keeps neither.
    """
    state = optimizer.state.get(parameter, {})
    if not state:
        return torch.zeros_like(parameter)
    buffer = state.get("momentum_buffer")
    if buffer is not None:
        return torch.as_tensor(buffer)
    mean, square = state.get("exp_avg"), state.get("exp_avg_sq")
    if mean is None:
        raise ArgumentError(
            f"{type(optimizer).__name__} keeps no momentum_buffer and no exp_avg; its state has "
            f"{', '.join(map(str, state))}"
        )
    if square is None:
        return mean
    wide = torch.promote_types(mean.dtype, torch.float32)
    return mean.to(wide) / (square.to(wide).sqrt() + eps)


def require_second_moment(optimizer: torch.optim.Optimizer | None, why: str) -> None:
    """Raise :class:`ArgumentError` unless ``optimizer`` keeps a mean of the squared gradients.

    ``why`` begins the message. Before its first step an optimizer of somebody else's is only known
    by its options; :func:`second_moment` says the rest.
    """
    if optimizer is None:
        raise ArgumentError(f"{why} reads the optimizer's second moment; attach(model, optimizer)")
    for group in optimizer.param_groups:
        kept = "betas" in group or {"alpha", "centered"} <= set(group)
        if not kept or isinstance(optimizer, torch.optim.Adamax):
            raise ArgumentError(
                f"{why} reads the optimizer's second moment, and {type(optimizer).__name__} keeps "
                "none; use Adam or RMSprop, or give beta= for a moving average of its own"
            )


def second_moment(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """The running mean of a parameter's squared gradients, of its shape; zeros before any step.

    Adam's family: v, without bias correction; RMSprop: square_avg.

    Raises :class:`ArgumentError` when this optimizer keeps neither.
    """
    state = optimizer.state.get(parameter, {})
    if not state:
        return torch.zeros_like(parameter)
    for key in _SQUARES:
        if key in state:
            return torch.as_tensor(state[key])
    raise ArgumentError(
        f"{type(optimizer).__name__} keeps no {' and no '.join(_SQUARES)}; its state has "
        f"{', '.join(map(str, state))}. Use Adam or RMSprop, or give beta="
    )
