"""ResNet-20, 32, 44 and 56 from 512 unlabelled training images, against NNCodec and plain ways.

The file is that of the recipe ``post-training``: the stage ``obs`` with a rate, batch-norm
statistics absorbed, biases of 8 bits, profile ``smallest``. Its rate is chosen among ``RATES`` on
validation images, the largest that loses at most ``_LOSS`` points there. The published networks
were trained on those images too, so the loss there is less than on test images. Test accuracy is
that of the file, decoded into a network built anew.

NNCodec's figures are those of ``benchmarks/nncodec.py``: its bytes at a file's accuracy are
interpolated, on the same test images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gossamer import nets
from gossamer.compression.stages.absorb_batchnorm import AbsorbBatchnorm
from gossamer.compression.stages.quantize_biases import QuantizeBiases
from gossamer.core.errors import ArgumentError
from gossamer.datasets import Split
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.post_training.stage import begun, calibrated, first, obs, plainly
from gossamer.pack import load_into, pack
from gossamer.training import evaluate

__all__ = ["bytes_at", "resnets"]

DEPTHS = (20, 32, 44, 56)
RATES = (0.0005, 0.001, 0.002, 0.003)
_LOSS = 0.3  # points of validation accuracy
_SAME = 2000  # test images that NNCodec's files were measured on
WAYS: dict[str, dict[str, Any]] = {
    "50 %": {"density": 0.5},
    "2:4": {"density": 0.5, "sparsity": "2:4"},
    **{f"{bits} bits": {"bits": bits} for bits in (4, 3, 2)},
}
"""What is compared with magnitude or rounding to nearest, on the same grids and densities."""


def _images(split: Split, count: int, quick: bool) -> Split:
    return first(split, 50 if quick else count)


def _file(work: Path, depth: int, rate: float) -> Path:
    return work / f"resnet-{depth}-{rate:g}.gsm"


def _rate(depth: int, rate: float, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """The recipe at one rate: a file, and what validation images say of it."""
    data = calibrated(quick)
    model = nets.build(f"resnet-{depth}", pretrained=True)
    some = _images(data.validation, 1000, quick)
    before = evaluate(model, some).accuracy
    state = begun(model, data, work / f"{depth}-{rate:g}", seed)
    row = obs(state, rate=rate, calibration=16 if quick else 512)
    AbsorbBatchnorm().run(state)
    QuantizeBiases(bits=8).run(state)
    archive = pack(state.model, _file(work, depth, rate))
    return {
        "depth": depth,
        "rate": rate,
        "bytes": archive.file_bytes,
        "validation_before": 100 * before,
        "validation": 100 * evaluate(state.model, some).accuracy,
        "processor_seconds": row["processor_seconds"],
        "seconds": row["seconds"],
        "images": row["examples"],
        "weight_bytes": sum(r["bits"] for r in row["layers"]) / 8,
    }


def _tested(depth: int, rate: float | None, work: Path, quick: bool) -> dict[str, Any]:
    """Test accuracy of a file, or of the network before; on all images and on the first."""
    model: nn.Module = nets.build(f"resnet-{depth}", pretrained=rate is None)
    if rate is not None:
        load_into(_file(work, depth, rate), model)
    test = calibrated(quick).test
    test = _images(test, len(test), quick)
    same = first(test, _SAME)
    rest = Split(test.stored[_SAME:], test.targets[_SAME:], mean=test.mean, std=test.std)
    found = [evaluate(model, part) for part in (same, rest) if len(part)]
    correct, total = (sum(getattr(f, key) for f in found) for key in ("correct", "total"))
    return {"accuracy": 100 * correct / total, "same": 100 * found[0].accuracy, "images": total}


def _compared(depth: int, way: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """One way of the stage and its plain counterpart, on 1,000 test images."""
    data = calibrated(quick)
    some = _images(data.test, 1000, quick)
    settings = WAYS[way]
    model = nets.build(f"resnet-{depth}", pretrained=True)
    before = evaluate(model, some)
    plain = plainly(model, settings)
    state = begun(model, data, work / f"{depth}-{way}".replace(":", "of"), seed)
    obs(state, **settings, calibration=16 if quick else 256)
    after = {"stage": evaluate(state.model, some), "plain": evaluate(plain, some)}
    return {
        "depth": depth,
        "way": way,
        "before": 100 * before.accuracy,
        **{name: 100 * found.accuracy for name, found in after.items()},
        **{f"{name}_loss": found.loss for name, found in after.items()},
    }


def bytes_at(rows: Sequence[Mapping[str, Any]], accuracy: float) -> float:
    """Bytes at which NNCodec reaches an accuracy, between the settings that were measured.

    NaN below what its smallest file has. Above what any has: its largest file, which is less than
    it would take.

    >>> rows = [{"bytes": 100, "accuracy": 80.0}, {"bytes": 200, "accuracy": 90.0}]
    >>> bytes_at(rows, 85.0), bytes_at(rows, 95.0), bytes_at(rows, 70.0)
    (150.0, 200.0, nan)
    """
    table = sorted((r["bytes"], r["accuracy"]) for r in rows if r["bytes"] is not None)
    low, reached = table[0]
    if accuracy < reached:
        return float("nan")
    for size, found in table[1:]:
        if found >= accuracy:
            return float(low + (size - low) * (accuracy - reached) / (found - reached))
        if found > reached:  # one that is larger and no better is never taken
            low, reached = size, found
    return float(low if accuracy <= reached else table[-1][0])


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    page, claims = "post-training", []
    for row in raw["files"]:
        name = f"ResNet-{row['depth']}"
        theirs = bytes_at(raw["nncodec"][str(row["depth"])]["rows"], row["same"])
        part = 100 * (1 - row["bytes"] / theirs)
        claims += [
            Claim(f"{page}.2", f"{name}: points of test accuracy lost", row["lost"], "<=", 0.5),
            Claim(f"{page}.2", f"{name}: smaller than NNCodec's file, %", part, ">=", 25.0),
            Claim(
                f"{page}.2",
                f"{name}: seconds of the stage, one thread's processor time",
                row["processor_seconds"],
                "<=",
                60.0,
            ),
            Claim(f"{page}.2", f"{name}: images looked at", row["calibration"], "<=", 1024),
        ]
    for row in raw["compared"]:
        against = "magnitude" if "density" in WAYS[row["way"]] else "rounding to nearest"
        what = f"ResNet-{row['depth']}, {row['way']}: points above {against}"
        claims.append(Claim(f"{page}.3", what, row["stage"] - row["plain"], ">", 0.0))
    return claims


def _nncodec() -> dict[str, Any]:
    path = Path(__file__).resolve().parents[4] / "results" / "benchmark-nncodec.json"
    if not path.is_file():
        raise ArgumentError(f"there is no {path}; benchmarks/nncodec.py measures it")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@experiment("post-training-resnets", seeds=(0,), judge=_judge)
def resnets(context: Context) -> dict[str, Any]:
    """Post-training 2, 3: four ResNets from 512 images without labels, NNCodec, the plain ways."""
    work, quick, seed = context.work, context.quick, context.seeds[0]
    depths = DEPTHS[:1] if quick else DEPTHS
    theirs = {} if quick else _nncodec()
    rates = RATES[-1:] if quick else RATES
    tried = context.map(_rate, [(d, r, seed, work, quick) for d in depths for r in rates])
    files = []
    for depth in depths:
        mine = [row for row in tried if row["depth"] == depth]
        good = [r for r in mine if r["validation"] >= r["validation_before"] - _LOSS] or mine[:1]
        row = max(good, key=lambda r: r["rate"])
        before, after = context.map(
            _tested, [(depth, None, work, quick), (depth, row["rate"], work, quick)]
        )
        files.append(
            {
                **row,
                "calibration": row["images"],
                "accuracy_before": before["accuracy"],
                **after,
                "lost": before["accuracy"] - after["accuracy"],
            }
        )
    ways = list(WAYS)[-1:] if quick else WAYS
    compared = context.map(_compared, [(d, w, seed, work, quick) for d in depths for w in ways])
    made = theirs.get("networks") or {
        str(d): {"rows": [{"bytes": 1, "accuracy": 0.0}]} for d in depths
    }
    return {"files": files, "tried": tried, "compared": compared, "nncodec": made}
