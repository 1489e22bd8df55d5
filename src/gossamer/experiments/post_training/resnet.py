"""ResNet-20 from 256 unlabelled training images: bytes, accuracy, against the plain ways.

Everything is a recipe of one stage, run as a user would run it; test accuracy is that of the file,
decoded in a fresh process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.compression import run
from gossamer.compression.recipe import load
from gossamer.experiments import Claim, Context, experiment, spread

__all__ = ["resnet"]

_IMAGES = 256
WAYS: dict[str, dict[str, Any]] = {
    "rate": {"obs": {"rate": 0.001}},
    "half": {"obs": {"density": 0.5}},
    "2:4": {"obs": {"density": 0.5, "sparsity": "2:4"}},
    "half, magnitude": {"prune": {"density": 0.5}},
    **{f"{bits} bits": {"obs": {"bits": bits, "group": "tensor"}} for bits in (4, 3, 2)},
    **{
        f"{bits} bits, nearest": {"quantize": {"method": "uniform", "bits": bits, "ends": True}}
        for bits in (4, 3, 2)
    },
}
"""Name -> its one stage; the plain ways read no inputs."""


def _figures(way: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """One way with one draw of images."""
    ((name, settings),) = WAYS[way].items()
    if name == "obs":
        settings = {**settings, "calibration": 32 if quick else _IMAGES}
    recipe = {
        "name": "post-training",
        "model": "resnet-20",
        "pretrained": True,
        "dataset": "cifar10",
        "subset": 2000 if quick else None,
        "seed": seed,
        "max_drop": 1,
        "stages": [{name: settings}, "pack", {"evaluate": {"latency": False}}],
    }
    found = run(load(recipe), None, None, work / f"{way.replace(':', 'of')}-{seed}")
    stage = found.run["stages"][0]
    return {
        "way": way,
        "seed": seed,
        "bytes": found.bytes,
        "accuracy_before": 100 * found.accuracy_before,
        "accuracy": 100 * found.accuracy_after,
        "density": stage["density"],
        "seconds": stage["seconds"],
        "unseen": [r["name"] for r in stage.get("obs", {}).get("layers", []) if not r["seen"]],
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    table = raw["table"]
    whole = raw["accuracy_before"]
    page = "post-training"
    lost = whole - table["rate"]["accuracy"]["min"]
    claims = [
        Claim(f"{page}.2", "ResNet-20, rate .001: points lost, most", lost, "<=", 0.5),
        Claim(
            f"{page}.2",
            "ResNet-20, rate .001: seconds of the stage on one core, most",
            table["rate"]["seconds"]["max"],
            "<=",
            60.0,
        ),
    ]
    for way, plain in (
        ("half", "half, magnitude"),
        ("2:4", "half, magnitude"),
        *((f"{bits} bits", f"{bits} bits, nearest") for bits in (4, 3, 2)),
    ):
        gain = table[way]["accuracy"]["min"] - table[plain]["accuracy"]["max"]
        what = f"ResNet-20, {way}: points above {plain}, worst seed against best"
        claims.append(Claim(f"{page}.3", what, gain, ">", 0.0))
    return claims


@experiment("post-training-resnet-20", judge=_judge)
def resnet(context: Context) -> dict[str, Any]:
    """Post-training 2, 3: ResNet-20 from 256 images without labels, against the plain ways."""
    jobs = [(way, seed, context.work, context.quick) for way in WAYS for seed in context.seeds]
    rows = context.map(_figures, jobs)
    table = {
        way: {
            key: spread([r[key] for r in rows if r["way"] == way])
            for key in ("bytes", "accuracy", "density", "seconds")
        }
        for way in WAYS
    }
    return {"accuracy_before": rows[0]["accuracy_before"], "table": table, "runs": rows}
