"""Lottery tickets of LeNet-300-100 on MNIST, with every control.

Frankle, Carbin, ICLR 2019, figures 1, 3, 4 and appendix C: Adam 1.2e-3, batch 60, 55,000 / 5,000,
validation every 100 iterations, 20 % a round, the output layer at half. A round trains 54 epochs
of 917 iterations, 49,518 where the paper has 50,000. Random sparsity is each layer's mask
shuffled, on other initial weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import names, nets
from gossamer.datasets import Dataset
from gossamer.masks import Masks, shuffled
from gossamer.method import Masked
from gossamer.prune import lottery
from gossamer.prune.tickets import Tickets, load_tickets
from gossamer.reproduce import Claim, Context, Outcome, experiment
from gossamer.reproduce.curves import density_curves, plot_density_curves
from gossamer.reproduce.lenets import mnist
from gossamer.training import TrainConfig, load_checkpoint

__all__ = ["lenet", "published_ladder"]

PAGE = "lottery-ticket"
NET = "lenet-300-100"
CONFIG = TrainConfig(54, batch_size=60, lr=1.2e-3, optimizer="adam")
RATE = 0.2
EVERY = 100
# Percent kept after each round; the last of the published list, 2.9, is not needed for any point.
LADDER = (100, 80.0, 64.1, 51.3, 41.1, 32.9, 26.3, 21.1, 16.9, 13.5, 10.8, 8.7, 7.0, 5.6, 4.5, 3.6)
ROUNDS = len(LADDER) - 1
AT_21, AT_13, AT_7, AT_3 = 7, 9, 12, 15  # rounds of 21.1, 13.5, 7.0 and 3.6 %
# way -> the rounds whose masks it trains
CONTROLS = {"reinit": (AT_21, AT_7), "random sparsity": (AT_21, AT_7), "one-shot": (AT_7, AT_3)}
QUICK_ROUNDS = 2


def _rounds(quick: bool) -> int:
    return QUICK_ROUNDS if quick else ROUNDS


def _config(seed: int, quick: bool) -> TrainConfig:
    return replace(CONFIG, seed=seed, epochs=1 if quick else CONFIG.epochs)


def _every(quick: bool) -> int:
    return 10 if quick else EVERY


def _folder(work: Path, seed: int) -> Path:
    return work / f"seed-{seed}"


def tickets(seed: int, work: Path, quick: bool) -> list[dict[str, Any]]:
    """Every round of one seed's search."""
    model = nets.build(NET, seed=seed)
    found = lottery.search(
        model,
        lottery.trainer(mnist(quick), _config(seed, quick), evaluate_every_steps=_every(quick)),
        rounds=_rounds(quick),
        rates=RATE,
        output="ip3",
        folder=_folder(work, seed),
    )
    return [{"way": "ticket", "seed": seed, **row} for row in found.rows]


def control(way: str, number: int, seed: int, work: Path, quick: bool) -> list[dict[str, Any]]:
    """One control of one seed, at the density of round ``number``."""
    folder = _folder(work, seed)
    data: Dataset = mnist(quick)
    run = lottery.trainer(data, _config(seed, quick), evaluate_every_steps=_every(quick))
    model = nets.build(NET, seed=seed)
    if way == "one-shot":
        masks = one_shot_masks(model, folder, number)
    else:
        masks = load_tickets(folder / "tickets.gsm").masks[number]
        if way == "random sparsity":
            masks = shuffled(masks, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(1_000_003 + seed)
        lottery.reinit_(model, masks, lambda m: nets.glorot_(m, generator))
    checkpoint = folder / f"{way.replace(' ', '-')}-{number}.pt"
    figures = run(model, lottery.Round(number, masks, (Masked(masks),), checkpoint))
    return [{"way": way, "seed": seed, "round": number, "density": masks.density, **figures}]


def one_shot_masks(model: nn.Module, folder: Path, number: int) -> Masks:
    """The trained dense network pruned at once to the density of round ``number``."""
    theta = names.snapshot(model)
    dense = load_checkpoint(folder / "round-0.pt")["model"]
    chosen = names.weights(model)
    rates = lottery.layer_rates(chosen, RATE, output="ip3")
    whole = Masks({n: torch.ones_like(w) != 0 for n, w in chosen.items()})
    masks = lottery.next_masks(
        {n: dense[n] for n in chosen}, whole, lottery.ladder(rates, number)[-1], "layer"
    )
    lottery.rewind_(model, masks, theta)
    return masks


def _job(way: str, number: int, seed: int, work: Path, quick: bool) -> list[dict[str, Any]]:
    if way == "ticket":
        return tickets(seed, work, quick)
    return control(way, number, seed, work, quick)


def published_ladder(found: Tickets) -> float:
    """The largest difference of the rounds' densities from the published ones, in points."""
    return max(abs(100 * m.density - p) for m, p in zip(found.masks, LADDER, strict=False))


@experiment("lottery-lenet")
def lenet(context: Context) -> Outcome:
    """Lottery tickets 1-4: LeNet-300-100, its early stop and accuracy by density, and controls."""
    quick = context.quick
    controls = (
        [("reinit", 1), ("random sparsity", 1), ("one-shot", 2)]
        if quick
        else [(way, number) for way, numbers in CONTROLS.items() for number in numbers]
    )
    # A seed's controls need its masks: they run beside the next seeds' searches.
    waves = [
        context.seeds[i : i + context.workers]
        for i in range(0, len(context.seeds), context.workers)
    ]
    rows: list[dict[str, Any]] = []
    for number, wave in enumerate([*waves, ()]):
        jobs = [("ticket", 0, seed, context.work, quick) for seed in wave]
        before = waves[number - 1] if number else ()
        jobs += [(way, at, seed, context.work, quick) for seed in before for way, at in controls]
        rows += [row for found in context.map(_job, jobs) for row in found]
        context.say(f"searches and controls: {len(rows)} trainings done")
    curves = density_curves(rows)
    plot_density_curves(curves, context.work / "early-stop.svg", title="LeNet-300-100, MNIST")
    raw = {
        "iterations": CONFIG.epochs * 917,
        "curves": curves,
        "ticket_file_bytes": [
            (_folder(context.work, s) / "tickets.gsm").stat().st_size for s in context.seeds
        ],
        "runs": rows,
    }
    found = [load_tickets(_folder(context.work, s) / "tickets.gsm") for s in context.seeds]
    claims = [
        Claim(
            f"{PAGE}.1",
            "largest difference from the published ladder, points",
            max(map(published_ladder, found)),
            "<=",
            0.05,
        )
    ]
    return Outcome(claims if quick else claims + lenet_claims(curves), raw)


def lenet_claims(curves: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    """Points 2-4, on means over seeds; accuracies are test accuracies at early stop."""

    def mean(way: str, number: int, key: str) -> float:
        entry = next(e for e in curves[way] if e["round"] == number)
        return float(entry[key]["mean"])

    def gain(a: tuple[str, int], b: tuple[str, int]) -> float:
        return 100 * (mean(*a, "early_accuracy") - mean(*b, "early_accuracy"))

    def ratio(a: tuple[str, int], b: tuple[str, int]) -> float:
        return mean(*a, "early_stop") / mean(*b, "early_stop")

    dense = ("ticket", 0)

    def t(number: int) -> tuple[str, int]:
        return ("ticket", number)

    over = "accuracy at early stop over dense, points"
    claims = [
        Claim(f"{PAGE}.2", "21.1 %: early stop, of dense", ratio(t(AT_21), dense), "<=", 0.85),
        Claim(f"{PAGE}.2", f"21.1 %: {over}", gain(t(AT_21), dense), ">=", 0.0),
        Claim(f"{PAGE}.2", f"13.5 %: {over}", gain(t(AT_13), dense), ">=", 0.1),
        Claim(f"{PAGE}.2", f"3.6 %: {over}", gain(t(AT_3), dense), ">=", -0.3),
        Claim(
            f"{PAGE}.3",
            "21.1 %: early stop of reinit, of the ticket's",
            ratio(("reinit", AT_21), t(AT_21)),
            ">=",
            1.5,
        ),
        Claim(
            f"{PAGE}.3",
            "21.1 %: accuracy of the ticket over reinit, points",
            gain(t(AT_21), ("reinit", AT_21)),
            ">=",
            0.3,
        ),
    ]
    for number in CONTROLS["one-shot"]:
        what = f"{LADDER[number]} %: accuracy of iterative over one-shot, points"
        claims.append(Claim(f"{PAGE}.4", what, gain(t(number), ("one-shot", number)), ">", 0.0))
    for number in CONTROLS["random sparsity"]:
        what = f"{LADDER[number]} %: accuracy of random sparsity over reinit, points"
        worse = gain(("random sparsity", number), ("reinit", number))
        claims.append(Claim(f"{PAGE}.4", what, worse, "<", 0.0))
    return claims
