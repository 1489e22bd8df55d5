"""The built-in recipes that end in a smaller network, as a user runs them: is it faster, too?

Conv-2 and Conv-4, trained on the digits, then compressed by each recipe in the run of
its own that ``gossamer compress`` makes. Size, operations and milliseconds are those of run.json:
of the network that is decoded from the file in a fresh process, in torch, one example, one thread,
in pairs with the dense network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer import datasets, nets
from gossamer.compression import compress
from gossamer.experiments import Claim, Context, experiment
from gossamer.training import TrainConfig, train

__all__ = ["RECIPES", "recipe", "smaller_and_faster"]

RECIPES = ("half-width", "structured-sparsity", "low-rank")
NETWORKS = ("conv-2", "conv-4")
_CONFIG = TrainConfig(20, lr=0.05, batch_size=64, schedule="cosine", weight_decay=5e-4)


def recipe(name: str, network: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """A network trained and compressed: figures of its run."""
    data = datasets.load("digits", subset=300 if quick else None)
    net = nets.build(network, in_shape=data.in_shape, seed=seed)
    train(net, data, _CONFIG, evaluate_every=20, checkpoint=work / f"{network}-{seed}.pt")
    out = work / f"{name}-{network}-{seed}"
    done = compress(net, data, recipe=name, out=out, overrides=[f"seed={seed}"])
    run = done.run
    found = run["latency"]
    return {
        "recipe": name,
        "network": network,
        "seed": seed,
        "bytes": [done.dense_bytes, done.bytes],
        "macs": [run["macs"][when]["macs"] for when in ("before", "after")],
        "ms": [found["dense_ms"], found["compressed_ms"]],
        "times_as_fast": found["ratio"],
        "interval": found["interval"],
        "floor": run["floor"],
        "accuracy": [100 * done.before.accuracy, 100 * done.after.accuracy],
        "trained_seconds": sum(row["seconds"] for row in run["stages"]),
        "rolled_back": next((r["rolled_back"] for r in run["stages"] if "rolled_back" in r), None),
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for row in raw["runs"]:
        low = (row["interval"] or [0.0])[0]
        where = f"recipe {row['recipe']}, {row['network']} on digits"
        page = "low-rank" if row["recipe"] == "low-rank" else "structured-sparsity"
        claims += [
            Claim(
                f"{page}.beyond",
                f"{where}: times as fast in torch, batch 1, lower end of 95 %",
                low,
                ">",
                1.0,
            ),
            Claim(
                f"{page}.beyond",
                f"{where}: validation points below what the run may lose",
                100 * (row["floor"]["drop"] - row["floor"]["max_drop"]),
                "<=",
                0.0,
            ),
        ]
    return claims


@experiment("smaller-and-faster", seeds=(0,), judge=_judge)
def smaller_and_faster(context: Context) -> dict[str, Any]:
    """The recipes half-width, structured-sparsity and low-rank on digits: size, time, accuracy."""
    seed, work, quick = context.seeds[0], context.work, context.quick
    networks = NETWORKS[:1] if quick else NETWORKS
    jobs = [(name, network, seed, work, quick) for network in networks for name in RECIPES]
    rows = context.alone(recipe, jobs)
    for row in rows:
        context.say(
            f"{row['recipe']}, {row['network']}: {row['bytes'][0] / row['bytes'][1]:.1f}x smaller, "
            f"{row['times_as_fast']}x as fast, {row['accuracy'][1]:.2f} of "
            f"{row['accuracy'][0]:.2f} %"
        )
    return {"runs": rows}
