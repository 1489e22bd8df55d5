"""Learned supermasks on MNIST: accuracy by chosen initial weights alone, and their file.

Zhou, Lan, Liu, Yosinski, *Deconstructing Lottery Tickets*, NeurIPS 2019, section 5.2 and table 2.
Learning rates and epochs were chosen on validation data: rescaling doubles the gradients, and half
the paper's rate does better with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gossamer import nets
from gossamer.compression import fresh
from gossamer.core.errors import GossamerError
from gossamer.core.seeds import Scheme, init_
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import error, mnist
from gossamer.pack import describe, load_into, pack
from gossamer.prune import Supermask
from gossamer.training import TrainConfig, evaluate, train

__all__ = ["VARIANTS", "learned", "lenet"]

PAGE = "deconstructing"
NET = "lenet-300-100"
DRAWS = 10
VARIANTS: dict[str, tuple[Scheme, bool, TrainConfig]] = {
    "learned": ("normal", False, TrainConfig(30, batch_size=250, lr=100.0)),
    "rescaled, signed constant": (
        "signed_constant",
        True,
        TrainConfig(100, batch_size=250, lr=50.0),
    ),
}
"""Scheme of the initial weights, whether layers are rescaled, and the training."""
BOUNDS = {"learned": 94.0, "rescaled, signed constant": 97.0}


def learned(variant: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """One supermask: test accuracy (percent) of several draws, and the file of one."""
    scheme, rescale, training = VARIANTS[variant]
    data = mnist(quick)
    model = nets.build(NET, seed=seed)
    seeds = init_(model, seed, scheme=scheme)
    untrained = 100 - error(evaluate(model, data.test))
    method = Supermask(generator=torch.Generator().manual_seed(seed), rescale=rescale)
    folder = work / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(training, seed=seed, epochs=2 if quick else training.epochs)
    history = train(
        model, data, config, methods=[method], checkpoint=folder / "mask.pt", evaluate_every=5
    )
    method.threshold()
    likelier = 100 - error(evaluate(model, data.test))
    draws = []
    for _ in range(DRAWS):
        method.sample()
        draws.append(100 - error(evaluate(model, data.test)))
    method.finish()
    path = folder / "mask.gsm"
    with pack(model, path, seeds=method.seeds(seeds)) as archive:
        rows, dense = describe(archive), archive.dense_bytes
    if not all(r["codec"].startswith("seeded") for r in rows if r["name"] in seeds):
        raise GossamerError(f"{path} holds values beside its seeds")
    other = fresh.check(path, NET, data.test)
    again = load_into(path, nets.build(NET, seed=seed + 1))
    return {
        "variant": variant,
        "seed": seed,
        "untrained": untrained,
        "draws": spread(draws),
        "threshold": likelier,
        "validation": [r["validation_accuracy"] for r in history.epochs],
        "density": method.masks.density,
        "density_by_layer": method.masks.densities(),
        "bytes": path.stat().st_size,
        "dense_bytes": dense,
        "layers": {r["name"]: {"codec": r["codec"], "bytes": r["bytes"]} for r in rows},
        "same_bits_in_a_fresh_process": other["digest"] == fresh.digest(model.state_dict()),
        "same_bits_loaded": fresh.digest(again.state_dict()) == fresh.digest(model.state_dict()),
        "accuracy_in_a_fresh_process": 100 * other["test"]["accuracy"],
        "accuracy_of_the_last_draw": draws[-1],
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    rows = raw["runs"]
    what = "accuracy, mean over draws and seeds, percent"
    claims = [
        Claim(f"{PAGE}.2", f"{v}: {what}", raw["summary"][v]["accuracy"]["mean"], ">=", bound)
        for v, bound in BOUNDS.items()
    ]
    whole = [r for r in rows if r["same_bits_in_a_fresh_process"] and r["same_bits_loaded"]]
    claims += [
        Claim(
            f"{PAGE}.6",
            "files of mask and seed that give every weight bit for bit, fraction",
            len(whole) / len(rows),
            "==",
            1.0,
        ),
        Claim(
            f"{PAGE}.6",
            f"largest file against {rows[0]['dense_bytes']} bytes of float32, fraction",
            max(r["bytes"] / r["dense_bytes"] for r in rows),
            "<=",
            1 / 30,
        ),
    ]
    return claims


@experiment("supermask-lenet", judge=_judge)
def lenet(context: Context) -> dict[str, Any]:
    """Deconstructing 2, 6: learned supermasks of LeNet-300-100, and their files."""
    jobs = [(v, s, context.work, context.quick) for v in VARIANTS for s in context.seeds]
    rows = context.map(learned, jobs)
    summary = {}
    for variant in VARIANTS:
        mine = [r for r in rows if r["variant"] == variant]
        accuracy = spread([r["draws"]["mean"] for r in mine])
        summary[variant] = {
            "accuracy": accuracy,
            "spread_of_draws": spread([r["draws"]["std"] for r in mine]),
            "threshold": spread([r["threshold"] for r in mine]),
            "bytes": spread([r["bytes"] for r in mine]),
            "dense_over_file": spread([r["dense_bytes"] / r["bytes"] for r in mine]),
        }
    return {"summary": summary, "runs": rows}
