"""Deconstructing lottery tickets on LeNet-300-100 and MNIST: criteria, kept and removed weights.

Zhou, Lan, Liu, Yosinski, NeurIPS 2019, figures 1-5: Adam 1.2e-3, batch 60, the dense network 55
epochs. Deviations: masks come from the trained dense network at once, not in rounds; masked
networks train 12 epochs (the paper's 55), and are tested at their minimum validation loss over
evaluations every 200 iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import nets
from gossamer.core import names
from gossamer.core.masks import Masks
from gossamer.core.names import Tensors
from gossamer.datasets import Dataset
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import mnist
from gossamer.prune import lottery
from gossamer.prune.deconstruct import CRITERIA, Start, apply_actions, criterion_masks
from gossamer.training import TrainConfig, evaluate

__all__ = ["NET", "PAGE", "lenet", "retrained"]

PAGE = "deconstructing"
NET = "lenet-300-100"
DENSE = TrainConfig(55, batch_size=60, lr=1.2e-3, optimizer="adam")
RETRAIN = replace(DENSE, epochs=12)
EVERY = 200
ROUNDS = 20  # densities .8^0 ... .8^20 a layer, the output layer .9^0 ...
RETRAINED = 9  # 13.5 %
ALPHA = 1.0
# Untrained networks: name -> (criterion, kept, signed)
UNTRAINED = {
    "large_final": ("large_final", "rewind", True),
    "large_final_same_sign": ("large_final_same_sign", "rewind", True),
    "large_final_same_sign, signed constant": ("large_final_same_sign", "constant", True),
    "large_final, signed constant": ("large_final", "constant", True),
    "large_final_diff_sign": ("large_final_diff_sign", "rewind", True),
    "magnitude_increase": ("magnitude_increase", "rewind", True),
    "random": ("random", "rewind", True),
}
# Trained networks: name -> (criterion, kept, signed, removed)
BASE = ("large_final", "rewind", True, "zero")
VARIANTS: dict[str, tuple[str, str, bool, str]] = {
    **{c: (c, "rewind", True, "zero") for c in (*CRITERIA, "random")},
    **{
        f"{kept}, {'signed' if signed else 'unsigned'}": ("large_final", kept, signed, "zero")
        for kept in ("reinit", "reshuffle", "constant")
        for signed in (True, False)
    },
    **{f"removed: {r}": ("large_final", "rewind", True, r) for r in
       ("freeze", "movement", "movement_both")},
}  # fmt: skip


def _every(quick: bool) -> int:
    return 10 if quick else EVERY


def _train(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    seed: int,
    start: Start | None,
    path: Path,
    quick: bool,
) -> Mapping[str, Any]:
    config = replace(config, seed=seed, epochs=1 if quick else config.epochs)
    run = lottery.trainer(data, config, evaluate_every_steps=_every(quick))
    methods = () if start is None else (start.method(),)
    masks = Masks() if start is None else start.masks
    return run(model, lottery.Round(0, masks, methods, path))


def dense(seed: int, work: Path, quick: bool) -> Mapping[str, Any]:
    """The dense network of one seed: its figures."""
    model, path = nets.build(NET, seed=seed), work / f"dense-{seed}.pt"
    return _train(model, mnist(quick), DENSE, seed, None, path, quick)


def _endpoints(
    seed: int, work: Path, data: Dataset, quick: bool
) -> tuple[nn.Module, Tensors, Tensors]:
    """The initial model, and the compressible weights before and after dense training."""
    model = nets.build(NET, seed=seed)
    theta = names.snapshot(model)
    _train(model, data, DENSE, seed, None, work / f"dense-{seed}.pt", quick)
    final = {n: w.detach().clone() for n, w in names.weights(model).items()}
    lottery.rewind_(model, Masks(), theta)
    return model, {n: theta[n] for n in final}, final


def _densities(weights: Mapping[str, Any]) -> list[dict[str, float]]:
    return lottery.ladder(lottery.layer_rates(weights, 0.2, output="ip3"), ROUNDS)


def untrained(seed: int, work: Path, quick: bool) -> dict[str, dict[str, Any]]:
    """Test accuracy of masked, untrained networks, each at its best density on validation."""
    data = mnist(quick)
    model, initial, final = _endpoints(seed, work, data, quick)
    found: dict[str, dict[str, Any]] = {}
    for name, (criterion, kept, signed) in UNTRAINED.items():
        best = (-1.0, 1.0, 0.0)
        for densities in _densities(initial)[1:]:
            g = torch.Generator().manual_seed(seed)
            masks = criterion_masks(criterion, initial, final, densities, alpha=ALPHA, generator=g)
            start = apply_actions(
                initial, final, masks, kept=kept, signed=signed, removed="zero", generator=g
            )
            start.apply_(model)
            validation = evaluate(model, data.validation).accuracy
            if validation > best[0]:
                best = (validation, masks.density, evaluate(model, data.test).accuracy)
        found[name] = {"validation": best[0], "density": best[1], "accuracy": best[2]}
    return found


def trained(name: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Test accuracy of one masked network after training."""
    data = mnist(quick)
    criterion, kept, signed, removed = VARIANTS[name]
    _, initial, final = _endpoints(seed, work, data, quick)
    g = torch.Generator().manual_seed(seed)
    masks = criterion_masks(
        criterion, initial, final, _densities(initial)[RETRAINED], alpha=ALPHA, generator=g
    )
    fresh = names.weights(nets.build(NET, seed=seed + 1_000_003))
    start = apply_actions(
        initial,
        final,
        masks,
        kept=kept,
        signed=signed,
        removed=removed,
        fresh={n: w.detach() for n, w in fresh.items()},
        generator=g,
    )
    return retrained(name, seed, start, work, quick)


def retrained(name: str, seed: int, start: Start, work: Path, quick: bool) -> dict[str, Any]:
    """Train the network from ``start``: its figures."""
    model = nets.build(NET, seed=seed)
    start.apply_(model)
    path = work / f"{name.replace(': ', '-').replace(', ', '-')}-{seed}.pt"
    figures = _train(model, mnist(quick), RETRAIN, seed, start, path, quick)
    return {"name": name, "seed": seed, "density": start.masks.density, **figures}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    """Points 1, 3-5 on means over seeds, in percent and points."""
    at_start, after = raw["untrained"], raw["trained"]

    def over(a: str, b: str) -> float:
        return float(after[a]["mean"] - after[b]["mean"])

    least = {
        "large_final": 25.0,
        "large_final_same_sign": 70.0,
        "large_final_same_sign, signed constant": 80.0,
    }
    claims = [
        Claim(f"{PAGE}.1", f"untrained accuracy, {n}, percent", at_start[n]["mean"], ">=", bound)
        for n, bound in least.items()
    ]
    claims.append(
        Claim(
            f"{PAGE}.1",
            "untrained accuracy, random masks: distance from 10 percent",
            abs(at_start["random"]["mean"] - 10),
            "<=",
            5.0,
        )
    )
    at = "13.5 %: accuracy,"
    for better, worse in (
        ("large_final", "random"),
        ("magnitude_increase", "random"),
        ("random", "small_final"),
    ):
        what = f"{at} {better} over {worse}, points"
        claims.append(Claim(f"{PAGE}.3", what, over(better, worse), ">", 0.0))
    for kept in ("reinit", "reshuffle", "constant"):
        signed, unsigned = f"{kept}, signed", f"{kept}, unsigned"
        claims += [
            Claim(
                f"{PAGE}.4",
                f"{at} distance of {signed} from rewind, points",
                abs(over(signed, "large_final")),
                "<=",
                0.3,
            ),
            Claim(
                f"{PAGE}.4",
                f"{at} {signed} over {unsigned}, points",
                over(signed, unsigned),
                ">=",
                0.2,
            ),
        ]
    freeze, movement = "removed: freeze", "removed: movement"
    both = "removed: movement_both"
    claims += [
        Claim(f"{PAGE}.5", f"{at} freeze over zero, points", over(freeze, BASE[0]), "<", 0.0),
        Claim(f"{PAGE}.5", f"{at} movement over zero, points", over(movement, BASE[0]), ">=", 0.0),
        Claim(f"{PAGE}.5", f"{at} movement_both over zero, points", over(both, BASE[0]), ">=", 0.0),
    ]
    return claims


@experiment("deconstruct-lenet", judge=_judge)
def lenet(context: Context) -> dict[str, Any]:
    """Deconstructing 1, 3-5: untrained masks; criteria, kept and removed weights after training."""
    work, quick, seeds = context.work, context.quick, context.seeds
    whole = context.map(dense, [(seed, work, quick) for seed in seeds])
    context.say("dense networks done")
    masked = context.map(untrained, [(seed, work, quick) for seed in seeds])
    context.say("untrained networks done")
    jobs = [(name, seed, work, quick) for name in VARIANTS for seed in seeds]
    rows = context.map(trained, jobs)
    at_start = {name: spread([100 * m[name]["accuracy"] for m in masked]) for name in UNTRAINED}
    after = {
        name: spread([100 * r["early_accuracy"] for r in rows if r["name"] == name])
        for name in VARIANTS
    }
    return {
        "dense": spread([100 * d["early_accuracy"] for d in whole]),
        "untrained": at_start,
        "trained": after,
        "untrained_runs": masked,
        "runs": rows,
    }
