"""Rate-aware retraining: the price of a weight's code is part of what is minimised.

Entropy-constrained quantization (Chou, Lookabaugh, Gray 1989) chooses codes by distortion plus
lambda times rate, after training; here the rate term is inside training. The network runs on
weights snapped to a uniform grid with a dead zone,

    code(w) = sign(w) * max(0, floor(|w| / step + 1/2 - dead_zone)),

the gradient reaches the latent weight straight through, and before each optimizer step the slope
of the code's ideal length is added to it: ``lam * (bits(k) - bits(k - 1)) / step`` towards zero,
with the lengths from a running histogram of the tensor's codes. Cheap codes attract, zero most of
all, so the network sparsifies and its entropy falls while it learns to do without.

What is left after :meth:`RateAware.finish` lies exactly on the grid, ``float32(k) *
float32(step)``, which the pack stores as a step and entropy-coded integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.core import hooks, names
from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError
from gossamer.core.latent import check_norm, dense, own_class
from gossamer.core.masks import Masks
from gossamer.core.method import Method
from gossamer.quantize.set_point import SetPoint

__all__ = ["RateAware", "check_owners", "snap"]

_MOST = 256  # codes beyond share the last bin of the histogram
_WIDEST = 1 << 16  # codes beyond are counted as one
_STEEPEST = 8.0  # bits between neighbouring codes; a rare code must not throw its weight to zero


class _Snap(torch.autograd.Function):
    """Values on the grid forward, the identity backward (Bengio et al. 2013)."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, step: Tensor, dead_zone: float, border: float = 0.0
    ) -> Tensor:
        # + 0: a negative zero is a bit pattern of its own, and would cost a code in the file
        return weight.sign() * _magnitudes(weight, step, dead_zone, border) * step + 0.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return dense(grad), None, None, None


def _magnitudes(weight: Tensor, step: Tensor, dead_zone: float, border: float = 0.0) -> Tensor:
    sizes = weight.abs() / step
    codes = (sizes + (0.5 - dead_zone)).floor_().clamp_(min=0)
    return codes.masked_fill_(sizes < border, 0) if border else codes


def snap(weight: Tensor, step: float, dead_zone: float = 0.0) -> Tensor:
    """The nearest value of the grid, zero's cell wider by ``dead_zone`` steps on each side.

    Gradients pass straight through.

    >>> snap(torch.tensor([0.54, -0.8, 1.4]), 1.0, 0.1).tolist()
    [0.0, -1.0, 1.0]
    """
    result: Tensor = _Snap.apply(weight, torch.tensor(step, dtype=weight.dtype), dead_zone)
    return result


class _Grid(nn.Module):
    """The parametrization: reads of the weight give its snapped values."""

    def __init__(self, step: float, dead_zone: float, like: Tensor) -> None:
        super().__init__()
        self.dead_zone, self.border = dead_zone, 0.0
        # not persistent: the weight's own values tell the grid, state_dict stays the user's
        self.register_buffer("step", torch.tensor(step, dtype=like.dtype), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        assert isinstance(self.step, Tensor)
        result: Tensor = _Snap.apply(weight, self.step, self.dead_zone, self.border)
        return result


def check_owners(
    model: nn.Module, chosen: Mapping[str, nn.Parameter]
) -> list[tuple[nn.Module, str, str]]:
    """Where the chosen weights stand: module, attribute, clean name.

    Raises :class:`ArgumentError` for a weight that cannot be put on a grid while it trains.
    """
    by_id = {id(p): n for n, p in chosen.items()}
    owners = [
        (module, attribute, by_id[id(p)])
        for module in model.modules()
        for attribute, p in module.named_parameters(recurse=False)
        if id(p) in by_id
    ]
    for module, _, name in owners:
        if isinstance(module, parametrize.ParametrizationList):
            raise ArgumentError(
                f"{name} is parametrized already; finish() the method that did so first"
            )
        check_norm(module, name)
        if isinstance(module, nn.RNNBase):
            raise ArgumentError(
                f"{name} belongs to {type(module).__name__}, whose kernels read the weight "
                "past its parametrization; exclude it"
            )
    return owners


class RateAware(Method):
    """Train on a uniform grid under a price for every bit of the codes.

    Args:
        steps: clean weight name -> grid step, in the weight's units.
        lam: price of a bit, in units of the loss; 0 trains on the grid alone.
        ramp: optimizer steps over which the price rises linearly from 0 to ``lam``.
        dead_zone: fraction of a step, in [0, 0.5), by which zero's cell is wider on each side.
        masks: weights that stay zero.
        every: optimizer steps between two looks at the histograms.
        control: sets the price so that a file has a size; ``ramp`` is 0 with it.

    Raises :class:`ArgumentError` for values outside what is allowed, on construction; for unknown
    or already parametrized weights, on attach, with the model left as it was.
    """

    parametrizes = True

    def __init__(
        self,
        steps: Mapping[str, float],
        *,
        lam: float,
        ramp: int = 0,
        dead_zone: float = 0.1,
        masks: Masks | None = None,
        every: int = 50,
        control: SetPoint | None = None,
    ) -> None:
        super().__init__()
        if not steps:
            raise ArgumentError("steps is empty: no weight to train on a grid")
        for name, step in steps.items():
            if not (step > 0 and step < float("inf")):
                raise ArgumentError(f"step of {name!r} is {step}; it must be positive and finite")
        if not (lam >= 0 and lam < float("inf")):
            raise ArgumentError(f"lam={lam} must be at least 0 and finite")
        if not 0 <= dead_zone < 0.5:
            raise ArgumentError(f"dead_zone={dead_zone} is outside [0, 0.5)")
        if ramp < 0 or every < 1:
            raise ArgumentError(f"ramp={ramp} must be at least 0 and every={every} at least 1")
        if control is not None and ramp:
            raise ArgumentError(f"ramp={ramp}: the control sets the price; leave ramp out")
        # the grid is a float32 one: round once, here, so that code and file agree
        self.steps = {n: float(torch.tensor(s, dtype=torch.float32)) for n, s in steps.items()}
        self.lam, self.ramp, self.dead_zone, self.every = lam, ramp, dead_zone, every
        self.masks = Masks(masks or {})
        self.border, self.control = 0.0, control
        self._count = 0
        self._slopes: dict[str, Tensor] = {}
        self._latent: dict[str, nn.Parameter] = {}
        # module, attribute, and the order its parameters stood in
        self._owners: list[tuple[nn.Module, str, list[str]]] = []

    @classmethod
    def relative(
        cls,
        model: nn.Module,
        *,
        step: float | Mapping[str, float],
        lam: float,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        **options: Any,
    ) -> Self:
        """Steps in units of each weight's standard deviation (of its non-zero values).

        ``step``: one number, or one for each weight's clean name. Raises :class:`ArgumentError`
        for a weight that is all zeros or not finite.
        """
        steps = {}
        masks = options.get("masks") or {}
        for name, p in names.weights(model, include=include, exclude=exclude).items():
            alive = p.detach()[p.detach() != 0].double()
            spread = float(alive.std(correction=0)) if alive.numel() else 0.0
            if not 0 < spread < float("inf"):
                raise ArgumentError(
                    f"{name} has no spread ({alive.numel()} non-zero weights); exclude it"
                )
            steps[name] = spread * (step[name] if isinstance(step, Mapping) else step)
        options["masks"] = Masks({n: m for n, m in masks.items() if n in steps})
        return cls(steps, lam=lam, **options)

    def _setup(self) -> None:
        if self._latent:  # detached and attached again
            return
        parameters = names.parameters(self.model)
        unknown = [n for n in self.steps if n not in parameters]
        if unknown:
            raise ArgumentError(
                f"weight {unknown[0]!r} is no parameter; there are: {', '.join(parameters)}"
            )
        self.masks.check({n: parameters[n] for n in self.steps})
        owners = check_owners(self.model, {n: parameters[n] for n in self.steps})
        self._latent = {n: parameters[n] for n in self.steps}
        self._zero()
        for module, attribute, name in owners:
            grid = _Grid(self.steps[name], self.dead_zone, parameters[name])
            self._owners.append((module, attribute, list(module._parameters)))
            if parametrize.is_parametrized(module):
                own_class(module)
            parametrize.register_parametrization(module, attribute, grid, unsafe=True)
        self.cut(self.border)
        self._measure()

    @torch.no_grad()
    def _codes(self, name: str, border: float | None = None) -> Tensor:
        weight = self._latent[name]
        step = torch.tensor(self.steps[name], dtype=weight.dtype, device=weight.device)
        border = self.border if border is None else border
        return _magnitudes(weight, step, self.dead_zone, border)

    @torch.no_grad()
    def _measure(self) -> None:
        """Bits between neighbouring codes, from the present histograms."""
        for name, weight in self._latent.items():
            codes = self._codes(name).clamp_(max=_MOST - 1).long()
            counts = torch.bincount(codes.reshape(-1), minlength=_MOST).double()
            # one sign bit beyond zero; half a count everywhere, so that no code is impossible
            bits = -torch.log2((counts + 0.5) / (counts.sum() + 0.5 * _MOST))
            bits[1:] += 1
            slopes = torch.empty_like(bits)
            slopes[1:] = bits[1:] - bits[:-1]
            slopes[0] = slopes[1]  # inside the dead zone the weight is still drawn to its middle
            self._slopes[name] = slopes.clamp_(0, _STEEPEST).to(weight.device, weight.dtype)

    @torch.no_grad()
    def _zero(self) -> None:
        for name, mask in self.masks.items():
            self._latent[name].masked_fill_(~mask, 0)

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the slope of each code's length to its latent weight's gradient."""
        hooks.dense_gradients(self._guarded())
        if self._count % self.every == 0:
            self._measure()
        if self.control is not None:
            self.control.step(self)
        price = self.lam * (min(1.0, self._count / self.ramp) if self.ramp else 1.0)
        if price:
            for name, weight in self._latent.items():
                if weight.grad is not None:
                    codes = self._codes(name).clamp_(max=_MOST - 1).long()
                    push = self._slopes[name][codes].mul_(weight.sign())
                    weight.grad.add_(push, alpha=price / self.steps[name])

    @torch.no_grad()
    def level(self) -> float:
        """The price that would pull at weights as hard, in the mean, as the loss's gradients do.

        Both means are over all weights, those held at zero among them. Before
        :meth:`before_step`, while gradients are the loss's own.
        """
        pulls = forces = 0.0
        for name, weight in self._latent.items():
            if weight.grad is not None and name in self._slopes:
                codes = self._codes(name).clamp_(max=_MOST - 1).long()
                pulls += float(self._slopes[name][codes].sum()) / self.steps[name]
                forces += float(weight.grad.abs().sum())
        return forces / pulls if pulls else 0.0

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep masked weights at zero."""
        self._count += 1
        self._zero()

    def _guarded(self) -> Iterable[Tensor]:
        return self._latent.values()

    def _hold_again(self, optimizer: torch.optim.Optimizer) -> None:
        self._zero()

    def _zeros(self) -> hooks.Zeros:
        return [(n, self._latent[n], m, None) for n, m in self.masks.items() if n in self._latent]

    @torch.no_grad()
    def bits(self, border: float | None = None) -> float:
        """Ideal size of all codes now, in bits: their order-0 entropy, signs included.

        ``border``: as they would be, were they cut there (:meth:`cut`).
        """
        total = 0.0
        for name, weight in self._latent.items():
            codes = (self._codes(name, border) * weight.sign()).reshape(-1)
            codes = codes.clamp_(-_WIDEST, _WIDEST)
            counts = torch.bincount((codes - codes.min()).long()).double()
            counts = counts[counts > 0]
            total += float((counts * torch.log2(counts.sum() / counts)).sum())
        return total

    def cut(self, border: float) -> None:
        """Weights of a magnitude below ``border`` steps are zero from here on.

        Raises :class:`ArgumentError` for a border below 0, or not finite.
        """
        if not 0 <= border < float("inf"):
            raise ArgumentError(f"border={border} must be at least 0 and finite")
        self.border = border
        for module, attribute, _ in self._owners:
            for step in module.get_submodule(f"parametrizations.{attribute}").children():
                if isinstance(step, _Grid):
                    step.border = border

    def quantized(self) -> dict[str, Quantized]:
        """Codes and code book of each weight as they are now."""
        return {
            name: Quantized.of(p.detach().sign() * self._codes(name) * self.steps[name] + 0.0)
            for name, p in self._latent.items()
        }

    def finish(self) -> None:
        """Leave plain weights, exactly on their grids."""
        self._look_out()
        self.detach()
        for module, attribute, order in reversed(self._owners):
            own_class(module)
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
            # torch puts the weight back last; state_dict must keep the user's order
            for name in order:
                if name in module._parameters:
                    module._parameters[name] = module._parameters.pop(name)
        self._owners, self._latent = [], {}

    def _state(self) -> dict[str, Any]:
        """The count of steps, the histograms' slopes and the masks."""
        return {
            "count": self._count, "slopes": dict(self._slopes), "masks": dict(self.masks),
            "border": self.border, "lam": self.lam,
            "control": self.control and self.control.state(),
        }  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`_state` returned."""
        self._count = int(state["count"])
        self._slopes = dict(state["slopes"])
        self.cut(float(state.get("border", 0.0)))
        if self.control is not None and state.get("control"):
            self.lam = float(state["lam"])
            self.control.load(state["control"])
        self.masks = Masks(state["masks"])
