"""A transformer on characters, compressed from 256 windows: bits per byte and file bytes.

A grid of 2 bits has three values: ternary. Ways of equal names differ only in how the weights are
chosen: the stage carries errors on, the plain way (magnitude, rounding to nearest) does not; steps
are of least squared error in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.datasets import Dataset
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.post_training.language_model import BITS, language_model, shakespeare
from gossamer.experiments.post_training.stage import begun, first, obs, plainly
from gossamer.pack import pack_bytes
from gossamer.training import evaluate

__all__ = ["language"]

WAYS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3},
    "2 bits (ternary)": {"bits": 2},
    "ternary, a step for 32": {"bits": 2, "group": 32},
    "50 %": {"density": 0.5},
    "2:4": {"density": 0.5, "sparsity": "2:4"},
    "rate .001": {"rate": 0.001},
    "rate .004": {"rate": 0.004},
}
_WINDOWS = 500  # of the test split's 1,742, the first


def _bits(model: nn.Module, data: Dataset, quick: bool) -> float:
    """Per byte, on test windows."""
    return evaluate(model, first(data.test, 8 if quick else _WINDOWS)).loss * BITS


def _way(way: str, seed: int, folder: Path, work: Path, quick: bool) -> dict[str, Any]:
    """One way and its plain counterpart, where there is one."""
    data, model = shakespeare(quick), language_model(folder, quick)
    settings = WAYS[way]
    plain = None if "rate" in settings else plainly(model, settings)
    state = begun(model, data, work / way.replace(":", "of"), seed)
    row = obs(state, **settings, calibration=8 if quick else 256)
    found = {
        "way": way,
        "bits_per_byte": _bits(state.model, data, quick),
        "bytes": len(pack_bytes(state.model)),
        "processor_seconds": row["processor_seconds"],
    }
    if plain is not None:
        found |= {
            "plain_bits_per_byte": _bits(plain, data, quick),
            "plain_bytes": len(pack_bytes(plain)),
        }
    return found


def _before(folder: Path, quick: bool) -> dict[str, Any]:
    """The network as it was trained."""
    model = language_model(folder, quick)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_byte": _bits(model, shakespeare(quick), quick),
        "bytes": len(pack_bytes(model)),
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    page, before = "post-training", raw["before"]
    size = before["parameters"]
    claims = [
        Claim(f"{page}.4", "parameters of the language model, least", size, ">=", 1e6),
        Claim(f"{page}.4", "parameters of the language model, most", size, "<=", 5e6),
    ]
    for row in raw["ways"]:
        if "plain_bits_per_byte" not in row:
            continue
        against = "magnitude" if "density" in WAYS[row["way"]] else "rounding to nearest"
        more = row["bits_per_byte"] - row["plain_bits_per_byte"]
        what = f"language model, {row['way']}: bits per byte above {against}"
        claims += [Claim(f"{page}.{point}", what, more, "<", 0.0) for point in (3, 4)]
    return claims


@experiment("post-training-language", seeds=(0,), judge=_judge)
def language(context: Context) -> dict[str, Any]:
    """Post-training 3, 4: a transformer of 1.27 M parameters, bits per byte and file bytes."""
    module = "gossamer.experiments.post_training.language_model"
    folder = context.beside("post-training-language-model", module)
    quick = context.quick
    (before,) = context.map(_before, [(folder, quick)])  # trains where there is no network yet
    ways = list(WAYS)[2:5] if quick else WAYS
    jobs = [(way, context.seeds[0], folder, context.work, quick) for way in ways]
    return {"before": before, "ways": context.map(_way, jobs)}
