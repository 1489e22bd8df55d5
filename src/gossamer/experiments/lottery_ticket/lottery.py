"""Lottery tickets with every control: LeNet-300-100 on MNIST, a reduced Conv-2 on CIFAR-10.

Frankle, Carbin, ICLR 2019, figures 1, 3-5 and appendix C. LeNet-300-100: Adam 1.2e-3, batch 60,
55,000 / 5,000, validation every 100 iterations, 20 % a round, the output layer at half. A round
trains 27 epochs of 917 iterations, 24,759, half of the paper's 50,000: the learning rate is
constant and the minimum of the validation loss lies well before. Random sparsity is each
layer's mask shuffled, on the initial weights of reinit.

The reduced Conv-2 has 8 channels and hidden layers of 64 (the paper's 64 and 256), 10,000
training and 3,000 validation images, 2,505 iterations a round at 1e-3 (20,000 at 2e-4), and goes
down in four rounds of 20 % for convolutions and 40 % for the rest (10 and 20 %). At 2e-3, with
1,000 validation images looked at every 100 iterations, the dense network's minimum lay between
iterations 500 and 1,000 and the ticket's early stop could not be told from it (.95 of dense).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import datasets, nets
from gossamer.core import names
from gossamer.core.errors import one_of
from gossamer.core.masks import Masks, shuffled
from gossamer.core.method import Masked
from gossamer.datasets import Dataset
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.shared.curves import density_curves, plot_density_curves
from gossamer.experiments.shared.lenets import mnist
from gossamer.prune import lottery
from gossamer.prune.tickets import load_tickets
from gossamer.training import TrainConfig, load_checkpoint

__all__ = ["PAGE", "conv", "lenet", "off_the_ladder"]

PAGE = "lottery-ticket"
# Percent kept after each round of LeNet's; the last published one, 2.9, is needed for no point.
LADDER = (100, 80.0, 64.1, 51.3, 41.1, 32.9, 26.3, 21.1, 16.9, 13.5, 10.8, 8.7, 7.0, 5.6, 4.5, 3.6)
AT_21, AT_13, AT_7, AT_3 = 7, 9, 12, 15  # rounds of 21.1, 13.5, 7.0 and 3.6 %
CONV = "conv-2-reduced"


@dataclass(frozen=True)
class Setting:
    """A network, its data and its search.

    Attributes:
        controls: way -> the rounds whose masks it trains.
        rounds: of pruning.
        every: iterations between two evaluations.
    """

    net: str
    data: Callable[[bool], Dataset]
    config: TrainConfig
    rates: float | Mapping[str, float]
    output: str
    rounds: int
    controls: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any]
    every: int = 100

    def build(self, seed: int) -> nn.Module:
        """The initial network."""
        return nets.build(self.net, seed=seed, **self.options)

    def short(self) -> Setting:
        """For a smoke run."""
        controls = {"reinit": (1,), "random sparsity": (1,), "one-shot": (2,)}
        config = replace(self.config, epochs=1)
        return replace(self, config=config, rounds=2, controls=controls, every=10)


def cifar(quick: bool) -> Dataset:
    """10,000 training and 3,000 validation images of CIFAR-10, not augmented as in the paper."""
    size = (1000, 1000) if quick else (10_000, 3000)
    data = datasets.load("cifar10", subset=size[0], validation=size[1])
    return replace(data, augment=None)


SETTINGS = {
    "lenet-300-100": Setting(
        net="lenet-300-100",
        data=mnist,
        config=TrainConfig(27, batch_size=60, lr=1.2e-3, optimizer="adam"),
        rates=0.2,
        output="ip3",
        rounds=len(LADDER) - 1,
        controls={
            "reinit": (AT_21, AT_7),
            "random sparsity": (AT_21, AT_7),
            "one-shot": (AT_7, AT_3),
        },
        options={},
    ),
    CONV: Setting(
        net="conv-2",
        data=cifar,
        config=TrainConfig(15, batch_size=60, lr=1e-3, optimizer="adam"),
        rates={"conv*": 0.2, "fc*": 0.4},
        output="fc3",
        rounds=4,
        controls={"reinit": (3,), "random sparsity": (3,), "one-shot": (4,)},
        options={"filters": 8, "hidden": 64},
        every=50,
    ),
}


def _setting(name: str, quick: bool) -> Setting:
    return SETTINGS[name].short() if quick else SETTINGS[name]


def _folder(work: Path, seed: int) -> Path:
    return work / f"seed-{seed}"


def _train(setting: Setting, seed: int, quick: bool) -> lottery.Train:
    return lottery.trainer(
        setting.data(quick),
        replace(setting.config, seed=seed),
        evaluate_every_steps=setting.every,
    )


def tickets(name: str, seed: int, work: Path, quick: bool) -> list[dict[str, Any]]:
    """Every round of one seed's search."""
    setting = _setting(name, quick)
    found = lottery.search(
        setting.build(seed),
        _train(setting, seed, quick),
        rounds=setting.rounds,
        rates=setting.rates,
        output=setting.output,
        folder=_folder(work, seed),
    )
    return [{"way": "ticket", "seed": seed, **row} for row in found.rows]


def control(
    name: str, way: str, number: int, seed: int, work: Path, quick: bool
) -> list[dict[str, Any]]:
    """One control of one seed, at the density of round ``number``."""
    one_of("way", way, ("one-shot", "random sparsity", "reinit"))
    setting, folder = _setting(name, quick), _folder(work, seed)
    model = setting.build(seed)
    if way == "one-shot":
        masks = _one_shot(model, setting, folder, number)
    else:
        masks = load_tickets(folder / "tickets.gsm").masks[number]
        if way == "random sparsity":
            masks = shuffled(masks, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(1_000_003 + seed)
        lottery.reinit_(model, masks, lambda m: nets.glorot_(m, generator))
    method = Masked(masks, mask_buffers=False)
    checkpoint = folder / f"{way.replace(' ', '-')}-{number}.pt"
    figures = _train(setting, seed, quick)(
        model, lottery.Round(number, masks, (method,), checkpoint)
    )
    return [{"way": way, "seed": seed, "round": number, "density": masks.density, **figures}]


def _one_shot(model: nn.Module, setting: Setting, folder: Path, number: int) -> Masks:
    """The trained dense network pruned at once to the density of round ``number``, rewound."""
    theta = names.snapshot(model)
    dense = load_checkpoint(folder / "round-0.pt")["model"]
    chosen = names.weights(model)
    rates = lottery.layer_rates(chosen, setting.rates, output=setting.output)
    whole = Masks({n: torch.ones_like(w) != 0 for n, w in chosen.items()})
    masks = lottery.next_masks(dense, whole, lottery.ladder(rates, number)[-1], "layer")
    lottery.rewind_(model, masks, theta)
    return masks


def _job(
    name: str, way: str, number: int, seed: int, work: Path, quick: bool
) -> list[dict[str, Any]]:
    if way == "ticket":
        return tickets(name, seed, work, quick)
    return control(name, way, number, seed, work, quick)


def _all(name: str, context: Context) -> dict[str, Any]:
    """Searches and controls of every seed: the raw figures."""
    work, quick = context.work, context.quick
    setting = _setting(name, quick)
    controls = [(way, number) for way, at in setting.controls.items() for number in at]
    # A seed's controls need its masks: they run beside the next seeds' searches.
    waves = [
        context.seeds[i : i + context.workers]
        for i in range(0, len(context.seeds), context.workers)
    ]
    rows: list[dict[str, Any]] = []
    for number, wave in enumerate([*waves, ()]):
        jobs = [(name, "ticket", 0, seed, work, quick) for seed in wave]
        before = waves[number - 1] if number else ()
        jobs += [(name, way, at, seed, work, quick) for seed in before for way, at in controls]
        rows += [row for found in context.map(_job, jobs) for row in found]
        context.say(f"{name}: {len(rows)} trainings done")
    curves = density_curves(rows)
    plot_density_curves(curves, work / "early-stop.svg", title=name)
    files = [_folder(work, seed) / "tickets.gsm" for seed in context.seeds]
    return {
        "curves": curves,
        "tickets_file_bytes": [path.stat().st_size for path in files],
        "runs": rows,
    }


def off_the_ladder(density: float, number: int) -> float:
    """The difference of LeNet's density after a round from the published one, in points."""
    return abs(100 * density - LADDER[number])


@dataclass(frozen=True)
class _Means:
    """Means over seeds, by (way, round); accuracies are test accuracies at early stop."""

    curves: Mapping[str, list[dict[str, Any]]]

    def of(self, way: str, number: int, key: str) -> float:
        entry = next(e for e in self.curves[way] if e["round"] == number)
        return float(entry[key]["mean"])

    def gain(self, a: tuple[str, int], b: tuple[str, int]) -> float:
        """Points of accuracy of a over b."""
        return 100 * (self.of(*a, "early_accuracy") - self.of(*b, "early_accuracy"))

    def ratio(self, a: tuple[str, int], b: tuple[str, int]) -> float:
        """Early-stop iteration of a over that of b."""
        return self.of(*a, "early_stop") / self.of(*b, "early_stop")


DENSE = ("ticket", 0)


def _judge_lenet(raw: Mapping[str, Any]) -> list[Claim]:
    tickets = [row for row in raw["runs"] if row["way"] == "ticket"]
    off = max(off_the_ladder(row["density"], row["round"]) for row in tickets)
    what = "largest difference from the published ladder, points"
    ladder = Claim(f"{PAGE}.1", what, off, "<=", 0.05)
    if tickets[-1]["round"] < AT_3:  # a smoke run ends before
        return [ladder]
    m = _Means(raw["curves"])
    at_21, over = ("ticket", AT_21), "accuracy at early stop over dense, points"
    two, three, four = (f"{PAGE}.{n}" for n in (2, 3, 4))
    claims = [
        ladder,
        Claim(two, "21.1 %: early stop, of dense", m.ratio(at_21, DENSE), "<=", 0.85),
        Claim(two, f"21.1 %: {over}", m.gain(at_21, DENSE), ">=", 0.0),
        Claim(two, f"13.5 %: {over}", m.gain(("ticket", AT_13), DENSE), ">=", 0.1),
        Claim(two, f"3.6 %: {over}", m.gain(("ticket", AT_3), DENSE), ">=", -0.3),
        Claim(
            three,
            "21.1 %: early stop of reinit, of the ticket's",
            m.ratio(("reinit", AT_21), at_21),
            ">=",
            1.5,
        ),
        Claim(
            three,
            "21.1 %: accuracy of the ticket over reinit, points",
            m.gain(at_21, ("reinit", AT_21)),
            ">=",
            0.3,
        ),
    ]
    for number in (AT_7, AT_3):
        what = f"{LADDER[number]} %: accuracy of iterative over one-shot, points"
        gain = m.gain(("ticket", number), ("one-shot", number))
        claims.append(Claim(four, what, gain, ">", 0.0))
    for number in (AT_21, AT_7):
        what = f"{LADDER[number]} %: accuracy of random sparsity over reinit, points"
        gain = m.gain(("random sparsity", number), ("reinit", number))
        claims.append(Claim(four, what, gain, "<", 0.0))
    return claims


@experiment("lottery-lenet", judge=_judge_lenet)
def lenet(context: Context) -> dict[str, Any]:
    """Lottery tickets 1-4: LeNet-300-100, its early stop and accuracy by density, and controls."""
    return _all("lenet-300-100", context)


def _judge_conv(raw: Mapping[str, Any]) -> list[Claim]:
    if len(raw["curves"]["ticket"]) < 5:  # a smoke run ends before
        return []
    m, ticket, reinit = _Means(raw["curves"]), ("ticket", 3), ("reinit", 3)
    at = f"reduced Conv-2, {100 * raw['curves']['ticket'][3]['density']:.1f} %:"
    end = f"reduced Conv-2, {100 * raw['curves']['ticket'][4]['density']:.1f} %:"
    random = ("random sparsity", 3)
    last = m.gain(("ticket", 4), ("one-shot", 4))
    return [
        Claim(f"{PAGE}.2", f"{at} early stop, of dense", m.ratio(ticket, DENSE), "<=", 0.85),
        Claim(f"{PAGE}.2", f"{at} accuracy over dense, points", m.gain(ticket, DENSE), ">=", 0),
        Claim(f"{PAGE}.3", f"{at} early stop of reinit, of the ticket's", m.ratio(reinit, ticket),
              ">", 1.0),
        Claim(f"{PAGE}.3", f"{at} accuracy of the ticket over reinit, points",
              m.gain(ticket, reinit), ">", 0.0),
        Claim(f"{PAGE}.4", f"{end} accuracy of iterative over one-shot, points", last, ">", 0),
        Claim(f"{PAGE}.4", f"{at} accuracy of random sparsity over reinit, points",
              m.gain(random, reinit), "<", 0.0),
    ]  # fmt: skip


@experiment("lottery-conv-reduced", judge=_judge_conv)
def conv(context: Context) -> dict[str, Any]:
    """Lottery tickets 2-4, reduced: the orderings on a small Conv-2 and a part of CIFAR-10."""
    return _all(CONV, context)
