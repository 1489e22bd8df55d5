"""Lottery tickets: sparse networks that train as well from their first weights.

Frankle, Carbin, *The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks*,
ICLR 2019, arXiv 1803.03635; late rewinding: Frankle, Dziugaite, Roy, Carbin, *Stabilizing the
Lottery Ticket Hypothesis*, 2019, arXiv 1903.01611.

- Section 1, steps 1-4, repeated (strategy 1 of appendix B): train from theta_0, remove the
  smallest p % of the surviving weights, reset the survivors to theta_0 (:func:`search`).
- Section 2: the rate is by layer, the output layer's is half (:func:`layer_rates`); section 4:
  one rate over the whole network (``scope="global"``).
- Controls: one-shot (``one_shot=True``), other initial weights under the same mask
  (:func:`reinit_`), random masks (:func:`gossamer.core.budgets.random_masks`,
  :func:`gossamer.core.masks.shuffled`).

Deviations: a round's count comes from (1 - p)^round of the layer's size, rounded to nearest, so
that rounding never adds up and one-shot keeps the same counts; ties go to the earlier weight.
Biases and batch-norm are rewound, never pruned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.core.masks import Masks, keep_top, warn_empty, zero_outside_
from gossamer.core.method import Masked, Method, Snapshot
from gossamer.core.names import Tensors
from gossamer.datasets import Dataset
from gossamer.prune.tickets import Tickets, load_tickets, save_tickets
from gossamer.training import Progress, TrainConfig, evaluate, load_checkpoint, save_atomic, train

__all__ = [
    "Round",
    "ladder",
    "layer_rates",
    "next_masks",
    "reinit_",
    "rewind_",
    "search",
    "trainer",
]

Scope = Literal["layer", "global"]
Patterns = str | Iterable[str] | None


def layer_rates(
    weights: Iterable[str], rate: float | Mapping[str, float], *, output: str | None
) -> dict[str, float]:
    """The fraction removed in each round, by layer.

    Args:
        weights: clean names.
        rate: one for all, or by pattern, the last match winning; unnamed layers are not pruned
            and are left out.
        output: name or pattern of the output layer, pruned at half its rate; None: no such layer.

    >>> layer_rates(["conv1.weight", "fc1.weight", "fc2.weight"],
    ...     {"conv*": 0.1, "fc*": 0.2}, output="fc2")
    {'conv1.weight': 0.1, 'fc1.weight': 0.2, 'fc2.weight': 0.1}

    Raises :class:`ArgumentError` for a rate outside (0, 1) or a pattern that matches nothing.
    """
    pool = list(weights)
    found: dict[str, float] = {}
    for pattern, value in (rate if isinstance(rate, Mapping) else {"*": rate}).items():
        if not 0 < value < 1:
            raise ArgumentError(
                f"rate {pattern}={value} is outside (0, 1): the fraction of the surviving weights "
                "that a round removes"
            )
        found.update(dict.fromkeys(names.select(pool, pattern), value))
    if output is not None:
        for name in names.select(pool, output):
            if name in found:
                found[name] /= 2
    return {name: found[name] for name in pool if name in found}


def ladder(rates: Mapping[str, float], rounds: int) -> list[dict[str, float]]:
    """Each layer's density before the first pruning, after the first, ... after ``rounds``.

    >>> ladder({"w": 0.5}, 2)
    [{'w': 1.0}, {'w': 0.5}, {'w': 0.25}]

    Raises :class:`ArgumentError` for a rate outside (0, 1) or fewer than 0 rounds.
    """
    if rounds < 0:
        raise ArgumentError(f"rounds={rounds} must be at least 0")
    for name, rate in rates.items():
        if not 0 < rate < 1:
            raise ArgumentError(f"rate {name}={rate} is outside (0, 1)")
    return [{n: (1 - p) ** r for n, p in rates.items()} for r in range(rounds + 1)]


def next_masks(
    weights: Mapping[str, Tensor], masks: Masks, densities: Mapping[str, float], scope: Scope
) -> Masks:
    """The largest of the survivors, down to the densities (of all weights, not of survivors).

    Args:
        weights: trained weights by clean name.
        masks: the survivors; must have a mask for each weight named by ``densities``.
        densities: fraction kept by layer; ``scope="global"`` keeps that fraction of all of them
            together, so they must be equal.

    Raises :class:`ArgumentError` for a density outside (0, 1], weights or masks that are missing
    or of another shape, unequal densities with ``scope="global"``. Warns with
    :class:`gossamer.core.masks.EmptyLayerWarning` when a layer keeps nothing.
    """
    for name, density in densities.items():
        if not 0 < density <= 1:
            raise ArgumentError(f"density {name}={density} is outside (0, 1] (the fraction kept)")
        if name not in weights or name not in masks:
            raise ArgumentError(
                f"densities name {name!r}; weights are: {', '.join(weights)}; "
                f"masks are: {', '.join(masks)}"
            )
    budget: float | Mapping[str, float] = densities
    if scope == "global":
        if len(set(densities.values())) != 1:
            raise ArgumentError(
                "scope='global' has one rate over all layers; give one number and output=None"
            )
        budget = next(iter(densities.values()))
    scores = {name: weights[name].detach().abs() for name in densities}
    found = keep_top(scores, budget, scope=scope, within=masks)
    warn_empty(found)
    return found


@torch.no_grad()
def rewind_(model: nn.Module, masks: Masks, theta: Mapping[str, Tensor]) -> None:
    """Set the model to ``theta``, pruned weights to 0: survivors, biases, buffers bit for bit.

    Raises :class:`ArgumentError` when theta or a mask does not fit the model; nothing is changed.
    """
    own = names.tensors(model)
    odd = sorted(set(own) ^ set(theta))
    odd += sorted(n for n in set(own) & set(theta) if own[n].shape != theta[n].shape)
    if odd:
        raise ArgumentError(
            f"theta does not fit the model: {', '.join(odd[:8])}; take it from "
            "names.snapshot() of the same network"
        )
    masks.check(own)
    for name, tensor in own.items():
        tensor.copy_(theta[name])
        if name in masks:
            zero_outside_(masks[name], tensor)


def reinit_(model: nn.Module, masks: Masks, init: Callable[[nn.Module], object]) -> None:
    """The reinit control: ``init`` draws the model anew in place, then the masks are applied.

    What ``init`` leaves alone (batch-norm, for :func:`gossamer.nets.glorot_`) stays as it is; a
    network built anew needs no ``init``: ``rewind_(model, masks, names.snapshot(another))``.

    Raises :class:`ArgumentError` when a mask does not fit the model; nothing is changed.
    """
    masks.check(names.parameters(model))
    init(model)
    masks.apply_(model)


@dataclass(frozen=True)
class Round:
    """What a training function is given besides the model, which is rewound and masked.

    Attributes:
        number: rounds of pruning so far; 0 is the dense network.
        masks: the survivors.
        methods: attach them to the optimizer, in this order, and keep their state in the
            checkpoint; without that masks do not hold and a resumed round differs.
        checkpoint: where the training keeps its own state, to resume after a kill; a completed
            one loads the trained model and returns the same figures.
    """

    number: int
    masks: Masks
    methods: tuple[Method, ...]
    checkpoint: Path


Train = Callable[[nn.Module, Round], Mapping[str, Any]]


def search(
    model: nn.Module,
    train: Train,
    *,
    rounds: int,
    rates: float | Mapping[str, float],
    output: str | None,
    folder: str | Path,
    scope: Scope = "layer",
    one_shot: bool = False,
    rewind_step: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
    progress: Callable[[int, int, Mapping[str, Any] | None], None] | None = None,
) -> Tickets:
    """Find tickets: train, prune, rewind, ``rounds`` times; then train the last ticket.

    The model must hold its initial weights; it ends as the last ticket, trained. Killed at any
    moment, the same call resumes at the round, and through ``train`` at the iteration, it had
    reached, to the same bits. A finished search can be given more rounds.

    Args:
        train: ``train(model, round)`` trains the model in place, optimizer and schedule new, and
            returns figures that JSON can hold; see :class:`Round`, and :func:`trainer` for a
            ready one.
        rounds: of pruning; rounds + 1 trainings (with ``one_shot`` two).
        rates, output: as in :func:`layer_rates`.
        folder: gets ``tickets.gsm`` (masks and rows of all rounds), ``theta-0.pt``,
            ``theta.pt`` (late rewinding) and each round's checkpoint ``round-N.pt``.
        scope: the rate holds in each layer, or over the whole network.
        one_shot: remove all at once, as many as ``rounds`` rounds would.
        rewind_step: survivors are reset to the dense run's weights after so many steps.
        include, exclude: which weights, as in :func:`gossamer.core.names.weights`.
        progress: called with (trainings done, trainings in all, last row or None).

    Raises :class:`ArgumentError` for bad rates, or a folder that holds another search; nothing is
    changed. :class:`GossamerError` when training ends before ``rewind_step``.
    """
    if rounds < 1 or rewind_step < 0:
        raise ArgumentError(
            f"rounds={rounds} must be at least 1, rewind_step={rewind_step} at least 0"
        )
    if scope not in ("layer", "global"):
        raise ArgumentError(f"scope {scope!r} is not one of 'layer', 'global'")
    chosen = names.weights(model, include=include, exclude=exclude)
    by_layer = layer_rates(chosen, rates, output=output)
    if scope == "global" and len(set(by_layer.values())) != 1:
        raise ArgumentError("scope='global' takes one rate for all layers, and output=None")
    steps = ladder(by_layer, rounds)
    if one_shot:
        steps = [steps[0], steps[-1]]
    home = Path(folder)
    settings = {
        "rates": by_layer,
        "scope": scope,
        "rewind_step": rewind_step,
        "one_shot": rounds if one_shot else 0,
    }
    theta = _begin(home, names.snapshot(model))
    masks, rows = _resume(home, settings, {n: chosen[n] for n in by_layer}, len(steps))
    for number in range(len(masks) - 1, len(steps)):
        if progress is not None:
            progress(number, len(steps), rows[-1] if rows else None)
        late = Snapshot(rewind_step) if number == 0 and rewind_step else None
        if number and rewind_step:
            theta = load_checkpoint(home / "theta.pt")
        rewind_(model, masks[-1], theta)
        # A new optimizer's buffers stay 0 where gradients and weights are: no need to mask them.
        methods: list[Method] = [Masked(masks[-1], mask_buffers=False)] if number else []
        if late is not None:
            methods.append(late)
        checkpoint = home / f"round-{number}.pt"
        figures = train(model, Round(number, masks[-1], tuple(methods), checkpoint))
        rows = rows[:number]
        rows.append(
            {
                "round": number,
                "density": masks[-1].density,
                "densities": masks[-1].densities(),
                **figures,
            }
        )
        if late is not None:
            if not late.taken:
                raise GossamerError(
                    f"rewind_step={rewind_step} was never reached: {late.steps} steps were seen; "
                    "lower it, and attach round.methods to the optimizer"
                )
            save_atomic(late.taken, home / "theta.pt")
        if number + 1 < len(steps):
            masks.append(next_masks(names.parameters(model), masks[-1], steps[number + 1], scope))
        save_tickets(home / "tickets.gsm", Tickets(masks, rows, settings))
    if progress is not None:
        progress(len(steps), len(steps), rows[-1])
    return Tickets(masks, rows, settings)


def _begin(home: Path, initial: Tensors) -> Tensors:
    """theta_0, kept in the folder so that a resume by a model of other weights is noticed."""
    path = home / "theta-0.pt"
    if not path.exists():
        save_atomic(initial, path)
        return initial
    kept: Tensors = load_checkpoint(path)
    if set(kept) != set(initial) or not all(torch.equal(kept[n], initial[n]) for n in initial):
        raise ArgumentError(
            f"folder {home} holds a search from other initial weights; build the model anew with "
            "the same seed, or give another folder"
        )
    return kept


def _resume(
    home: Path, settings: dict[str, Any], weights: Mapping[str, Tensor], most: int
) -> tuple[list[Masks], list[dict[str, Any]]]:
    path = home / "tickets.gsm"
    if not path.exists():
        return [Masks({n: torch.ones_like(w) != 0 for n, w in weights.items()})], []
    kept = load_tickets(path)
    if kept.settings != json.loads(json.dumps(settings)):
        raise ArgumentError(
            f"folder {home} holds another search, with {kept.settings}, now {settings}; give "
            "another folder"
        )
    kept.masks[0].check(weights)
    return kept.masks[:most], kept.rows[: len(kept.masks[:most])]


def trainer(
    dataset: Dataset,
    config: TrainConfig,
    *,
    evaluate_every_steps: int,
    checkpoint_every: float = 20.0,
    progress: Callable[[Progress], None] | None = None,
) -> Train:
    """A training function for :func:`search` around :func:`gossamer.training.train`.

    Each round trains by ``config``, its data order included. Figures: ``early_stop`` (iteration
    of minimum validation loss, found afterwards), ``early_accuracy`` (test, of the weights then),
    ``accuracy`` (test, at the end), ``validation_loss`` (at early_stop); fractions and nats.
    ``checkpoint_every`` is in seconds.

    Raises :class:`ArgumentError` for a dataset without a validation split.
    """
    if not len(dataset.validation):
        raise ArgumentError(f"dataset {dataset.name!r} has no validation split to stop by")

    def run(model: nn.Module, round: Round) -> dict[str, Any]:
        best = _Best(None)

        def told(p: Progress) -> None:
            if p.row is not None and p.row["event"] == "step":
                best.tell(p.row["validation_loss"])
            if progress is not None:
                progress(p)

        history = train(
            model,
            dataset,
            config,
            methods=[*round.methods, best],
            checkpoint=round.checkpoint,
            checkpoint_every=checkpoint_every,
            evaluate_every=max(1, config.epochs),
            evaluate_every_steps=evaluate_every_steps,
            progress=told,
        )
        stopped = history.early_stop
        final = names.snapshot(model)
        accuracy = evaluate(model, dataset.test).accuracy
        early = accuracy
        if best.taken:
            rewind_(model, Masks(), best.taken)
            early = evaluate(model, dataset.test).accuracy
            rewind_(model, Masks(), final)
        return {
            "early_stop": stopped["step"],
            "validation_loss": stopped["validation_loss"],
            "early_accuracy": early,
            "accuracy": accuracy,
        }

    return run


class _Best(Snapshot):
    """The weights of minimum validation loss."""

    def __init__(self, at: int | None) -> None:
        super().__init__(at)
        self.lowest = float("inf")

    def tell(self, loss: float) -> None:
        if loss < self.lowest:
            self.lowest = loss
            self.take()

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "lowest": self.lowest}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.lowest = float(state["lowest"])
