"""Dynamic sparse training: sparse from the first step to the last, while weights move about.

One method, four axes (:class:`Rule`), and the classics as combinations (:data:`FAMILY`):

- sparse momentum: Dettmers and Zettlemoyer 2019, arXiv 1907.04840;
- set: Mocanu et al., Nature Communications 2018;
- rigl: Evci et al., ICML 2020, arXiv 1911.11134;
- dsr: dynamic sparse reparameterization, Mostafa and Wang, ICML 2019 (a fixed fraction of all
  active weights goes by one ranking, where theirs adapts a threshold);
- gradual-magnitude: Zhu and Gupta 2017, arXiv 1710.01878, equation 1;
- static: random masks that never change.

Every step takes dense gradients and an ordinary optimizer step, then zeroes what is inactive;
momentum goes on accumulating there, so that growth can read it. Every ``every`` steps the masks
are reallocated (:mod:`gossamer.core.reallocation`); their total is exact all along.

Deviations: SET drops the smallest magnitudes instead of the smallest positive and largest
negative values; RigL grows by the gradient of the step just taken, not of a step it skips; masks
begin with an exact count instead of Bernoulli draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.core import budgets, hooks, names, optimizers, reallocation, schedules
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Eraser, Masks, keep_counts, warn_empty
from gossamer.core.method import Method
from gossamer.core.names import Tensors

__all__ = ["FAMILY", "GROWTH", "REDISTRIBUTION", "DynamicSparse", "Rule", "Signals"]


@dataclass(frozen=True)
class Signals:
    """What a criterion sees: clean name -> tensor of the weight's shape, in each mapping.

    ``gradients`` and ``momentum`` are of the step just taken, dense (inactive weights too).
    """

    weights: Tensors
    gradients: Tensors
    momentum: Tensors
    masks: Masks
    generator: torch.Generator


Criterion = Callable[[Signals], Tensors]
Division = Callable[[Signals], Mapping[str, float]]


def _random(signals: Signals) -> Tensors:
    return {
        n: torch.rand(w.shape, generator=signals.generator).to(w.device)
        for n, w in signals.weights.items()
    }


GROWTH: dict[str, Criterion] = {
    "momentum": lambda s: {n: m.abs() for n, m in s.momentum.items()},
    "gradient": lambda s: {n: g.abs() for n, g in s.gradients.items()},
    "random": _random,
}
"""Scores of inactive weights; the highest grow."""

REDISTRIBUTION: dict[str, Division] = {
    "momentum": lambda s: reallocation.importance(s.momentum, s.masks),
    "gradient": lambda s: reallocation.importance(s.gradients, s.masks),
    "nonzeros": lambda s: {n: m.sum().item() / max(1, s.masks.kept) for n, m in s.masks.items()},
}
"""Each layer's share of what grows."""


@dataclass(frozen=True)
class Rule:
    """A member of the family.

    Attributes:
        growth: a name of :data:`GROWTH`, a function of :class:`Signals` giving scores, or None:
            nothing grows.
        redistribution: a name of :data:`REDISTRIBUTION`, a function of :class:`Signals` giving
            shares, or None: each layer regrows what it lost.
        drop: scores of active weights, the lowest go; None: magnitude.
        drop_scope: each layer drops the same fraction, or one ranking over all layers.
        distribution: how the density is divided over layers at the start
            (:data:`gossamer.core.budgets.DISTRIBUTIONS`).
        rate, rate_end, rate_schedule: fraction of the active weights dropped at an update, from
            the start to ``until`` (a name of :data:`gossamer.core.schedules.SCHEDULES`).
        until: fraction of the training after which the masks stay.
        ramp: None: sparse from the start. A schedule's name: dense at the start, and the density
            falls along it until ``until``; needs ``growth=None``.
        mask_momentum: also zero the momentum of inactive weights (a new weight then starts
            without); growth by momentum cannot have it.

    Raises :class:`ArgumentError` for values outside what is allowed and axes that exclude each
    other.
    """

    growth: str | Criterion | None
    redistribution: str | Division | None
    rate: float
    rate_end: float
    rate_schedule: str = "cosine"
    distribution: str = "uniform"
    drop: Criterion | None = None
    drop_scope: Literal["layer", "global"] = "layer"
    until: float = 1.0
    ramp: str | None = None
    mask_momentum: bool = False

    def __post_init__(self) -> None:
        for axis, table in (("growth", GROWTH), ("redistribution", REDISTRIBUTION)):
            value = getattr(self, axis)
            if isinstance(value, str) and value not in table:
                raise ArgumentError(
                    f"{axis} {value!r} is not one of {', '.join(table)}, None, a function"
                )
        if self.distribution not in budgets.DISTRIBUTIONS:
            raise ArgumentError(
                f"distribution {self.distribution!r} is not one of "
                f"{', '.join(budgets.DISTRIBUTIONS)}"
            )
        if self.drop_scope not in ("layer", "global"):
            raise ArgumentError(f"drop_scope {self.drop_scope!r} is not one of 'layer', 'global'")
        for name in ("rate", "rate_end", "until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name}={getattr(self, name)} is outside [0, 1]")
        schedules.make(self.rate_schedule, 1.0)
        if self.ramp is not None:
            schedules.make(self.ramp, 1.0)
            if self.growth is not None:
                raise ArgumentError(f"ramp={self.ramp!r} only removes; it needs growth=None")
        if self.mask_momentum and "momentum" in (self.growth, self.redistribution):
            raise ArgumentError("mask_momentum=True hides the momentum that growth reads")

    @property
    def needs_momentum(self) -> bool:
        """Whether a named axis reads the optimizer's momentum."""
        return "momentum" in (self.growth, self.redistribution)


FAMILY: dict[str, Rule] = {
    "sparse-momentum": Rule("momentum", "momentum", 0.5, 0.005),
    "set": Rule("random", None, 0.3, 0.3, "constant", "erdos-renyi"),
    "rigl": Rule("gradient", None, 0.3, 0.0, "cosine", "er-kernel", until=0.75, mask_momentum=True),
    "dsr": Rule("random", "nonzeros", 0.2, 0.0, "cosine", drop_scope="global"),
    "gradual-magnitude": Rule(None, None, 0.0, 0.0, ramp="cubic", until=0.75),
    "static": Rule(None, None, 0.0, 0.0, until=0.0),
}
"""Name -> the combination that the classic is."""


class DynamicSparse(Method):
    """Train a sparse network whose masks move, inside any training loop.

    Args:
        rule: a :class:`Rule`, such as one of :data:`FAMILY`.
        density: of all chosen weights together, in (0, 1]; or by clean name.
        steps: optimizer steps of the whole training, for the schedules.
        every: steps between two reallocations; the last is before the end of the training, so
            that what grew is trained.
        generator: of the first masks and of random growth.
        include, exclude: layer patterns; biases, batch-norm and embeddings are dense unless named.
        masks: start from these instead of random ones (``rule.distribution`` is not asked).

    Attributes:
        masks: the present ones.
        history: a row for each reallocation: step, rate, removed, grown, and density by name.
    """

    def __init__(
        self,
        rule: Rule,
        density: float | Mapping[str, float],
        *,
        steps: int,
        every: int,
        generator: torch.Generator,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        masks: Masks | None = None,
    ) -> None:
        super().__init__()
        if steps < 1 or every < 1:
            raise ArgumentError(f"steps={steps}, every={every}: both must be at least 1")
        self.rule, self.density, self.steps, self.every = rule, density, steps, every
        self.generator, self._given = generator, masks
        self._include, self._exclude = include, exclude
        self.masks = Masks()
        self.step = 0
        self.history: list[dict[str, Any]] = []

    def _setup(self) -> None:
        if self.optimizer is not None:
            self._require_momentum()
        weights = names.weights(self.model, include=self._include, exclude=self._exclude)
        shapes = {n: w.shape for n, w in weights.items()}
        self._target = budgets.layer_counts(shapes, self.density, self.rule.distribution)
        if self._given is not None:
            self._given.check(weights)
            masks = Masks({n: self._given[n].clone() for n in weights if n in self._given})
            weights = {n: weights[n] for n in masks}
            self._target = {n: int(m.sum()) for n, m in masks.items()}
        elif self.rule.ramp is not None:
            masks = Masks({n: torch.ones(s, dtype=torch.bool) for n, s in shapes.items()})
        else:
            masks = budgets.random_masks(shapes, self._target, self.generator)
        warn_empty(masks)
        self._weights = weights
        self._overwriting(weights)
        self._set(Masks({n: m.to(weights[n].device) for n, m in masks.items()}))
        self._overwritten(weights)

    def _require_momentum(self) -> None:
        if self.rule.needs_momentum:
            axis = "growth" if self.rule.growth == "momentum" else "redistribution"
            optimizers.require_momentum(self.optimizer, f"{axis} 'momentum'")

    def _set(self, masks: Masks) -> None:
        self.masks, self._eraser = masks, Eraser(masks)
        for name, p in self._weights.items():
            self._eraser.erase_(name, p)

    def before_step(self) -> None:
        """Sparse gradients become dense: growth reads those of inactive weights."""
        hooks.dense_gradients(self._guarded())

    @torch.no_grad()
    def after_step(self) -> None:
        """Zero the inactive weights; reallocate when it is time."""
        self._before = {}
        self.step += 1
        self._hold_again(self.optimizer)
        last = min(self.rule.until * self.steps, self.steps - 1)
        if self.step % self.every == 0 and self.step <= last:
            self.reallocate()

    def _guarded(self) -> Iterable[Tensor]:
        return self._weights.values()

    def _hold_again(self, optimizer: torch.optim.Optimizer | None) -> None:
        for name, p in self._weights.items():
            self._eraser.erase_(name, p)
            if self.rule.mask_momentum:
                for value in hooks.buffers(optimizer, p):
                    self._eraser.erase_(name, value)

    def _zeros(self) -> hooks.Zeros:
        weights = getattr(self, "_weights", {})
        return [(n, p, self.masks[n], None) for n, p in weights.items() if n in self.masks]

    @torch.no_grad()
    def reallocate(self) -> None:
        """Drop, redistribute and grow once, now; the optimizer's hooks do it on schedule.

        Raises :class:`ArgumentError` when a score is NaN; the masks are then as they were.
        """
        rule, before = self.rule, self.masks
        progress = min(1.0, self.step / (rule.until * self.steps)) if rule.until else 1.0
        rate = schedules.make(rule.rate_schedule, rule.rate, rule.rate_end)(progress)
        signals = self._signals()
        scores = (
            {n: w.detach().abs() for n, w in self._weights.items()}
            if rule.drop is None
            else rule.drop(signals)
        )
        if rule.ramp is not None:
            masks = keep_counts(scores, self._ramped(rule.ramp), within=before)
        elif rule.growth is None:
            masks = before
        else:
            masks = self._moved(signals, scores, rate)
        self._set(masks)
        self.history.append(
            {
                "step": self.step,
                "rate": rate,
                "removed": sum(int((before[n] & ~m).sum()) for n, m in masks.items()),
                "grown": sum(int((m & ~before[n]).sum()) for n, m in masks.items()),
                "density": masks.densities(),
            }
        )

    def _signals(self) -> Signals:
        self._require_momentum()
        gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self._weights.items()
        }
        momentum: Tensors = {}
        custom = callable(self.rule.growth) or callable(self.rule.redistribution)
        if self.rule.needs_momentum or custom or self.rule.drop is not None:
            try:
                for n, p in self._weights.items():
                    if self.optimizer is not None:
                        momentum[n] = optimizers.momentum(self.optimizer, p)
            except ArgumentError:  # a function of the user's may not need it
                if self.rule.needs_momentum:
                    raise
        weights: Tensors = {n: p.detach() for n, p in self._weights.items()}
        return Signals(weights, gradients, momentum, self.masks, self.generator)

    def _moved(self, signals: Signals, scores: Tensors, rate: float) -> Masks:
        rule = self.rule
        growth = GROWTH[rule.growth] if isinstance(rule.growth, str) else rule.growth
        divide = (
            REDISTRIBUTION[rule.redistribution]
            if isinstance(rule.redistribution, str)
            else rule.redistribution
        )
        if growth is None:
            raise ArgumentError("growth=None moves nothing")
        shares = None if divide is None else divide(signals)
        if rule.drop_scope == "global":
            left = reallocation.drop_global(scores, self.masks, rate)
        else:
            left = reallocation.drop(
                scores, self.masks, reallocation.removals(self.masks, rate, shares)
            )
        removed = {n: int(m.sum()) - int(left[n].sum()) for n, m in self.masks.items()}
        counts = removed if shares is None else reallocation.regrowth(removed, left, shares)
        return reallocation.grow(growth(signals), left, counts)

    def _ramped(self, ramp: str) -> dict[str, int]:
        # The last update before the ramp's end completes it, wherever it falls.
        end = self.rule.until * self.steps
        done = 1.0 if self.step + self.every > min(end, self.steps - 1) else self.step / end
        counts = {}
        for name, mask in self.masks.items():
            final = self._target[name] / mask.numel()
            density = schedules.make(ramp, 1.0, final)(done)
            wanted = self._target[name] if done == 1 else int(density * mask.numel() + 0.5)
            counts[name] = min(wanted, int(mask.sum()))
        return counts

    def _state(self) -> dict[str, Any]:
        """Masks, step, the generator's state and the history."""
        return {
            "masks": dict(self.masks),
            "step": self.step,
            "generator": self.generator.get_state(),
            "history": list(self.history),
        }

    def _load(self, state: dict[str, Any]) -> None:
        """Restore them; attached, the masks are applied."""
        masks = Masks(state["masks"])
        self.step, self.history = int(state["step"]), list(state["history"])
        self.generator.set_state(state["generator"])
        if hasattr(self, "_weights"):
            masks.check(self._weights)
            if len(masks) != len(self._weights):
                odd = next(n for n in self._weights if n not in masks)
                raise ArgumentError(f"the state has no mask of {odd!r}, which is chosen here")
            self._restore(self._weights)
            self._set(Masks({n: m.to(self._weights[n].device) for n, m in masks.items()}))
        else:
            self.masks = masks
