"""ResNet-20 on CIFAR-10 with fewer channels, and with layers of low rank: accuracy and time.

From the published weights. **fewer**: multiply-adds at the 59.3 of 81.1 MFLOPs (two of them a
multiply-add) that ModelOpt's published notebook of FastNAS pruning reaches on a ResNet-20, with
.69 points lost. **half**: half the channels of every coupled group
(:func:`gossamer.structure.coupled_groups`). **low-rank**: every convolution behind the first by
factors whose ranks are multiples of 8, as vector kernels want them: of the candidates, which lose
less and less, the first that onnxruntime runs 1.7 times as fast. Each is trained for a few epochs
against the soft outputs of the network it was made of, on images that are cropped and mirrored.

What is chosen is chosen on validation images; the published weights were trained on them too, so
that they tell ways apart and no more. Test images are only evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.core import flops, names
from gossamer.core.group_budgets import GroupBudget, group_scores, select, weight_cost
from gossamer.core.groups import families
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.low_rank.network import briefly, calibration, first, looked
from gossamer.experiments.shared.layout import channels_last_
from gossamer.runtime.bench import bench
from gossamer.runtime.engines import Subject
from gossamer.structure import coupled_groups, shrink
from gossamer.structure.factors import build
from gossamer.structure.fit_network import approximate
from gossamer.structure.fit_network import replace as put
from gossamer.training import TrainConfig, evaluate, train
from gossamer.training.renorm import reestimate

__all__ = ["WAYS", "low_rank", "pruned", "resnet_channels"]

THEIRS, LOST = (81.1, 59.3), 0.69  # MFLOPs before and after, points
WAYS = {"norm": False, "norm over the mean of alike groups": True}  # whether to normalise
# kind, and the ranks of layers of 16, 32 and 64 filters; from what loses least
RANKS: tuple[tuple[Literal["spatial", "tucker"], tuple[int, int, int]], ...] = (
    ("spatial", (8, 16, 32)), ("spatial", (8, 8, 32)), ("tucker", (8, 8, 16)),
)  # fmt: skip
_FAST = 1.7  # of a candidate, measured; what is claimed is measured anew
_EPOCHS = {"fewer": 3, "half": 2, "low-rank": 2}
_RATES = {"fewer": 0.02, "half": 0.02, "low-rank": 0.005}  # a product of factors moves further
_CONFIG = TrainConfig(1, batch_size=128, nesterov=True, weight_decay=1e-4, schedule="cosine")
_EXAMPLE = (2, 3, 32, 32)


def _dense() -> nn.Module:
    return nets.build("resnet-20", pretrained=True).eval()


def _example() -> Tensor:
    return torch.randn(_EXAMPLE, generator=torch.Generator().manual_seed(0))


def _macs(net: nn.Module) -> dict[str, float]:
    return flops.count(net, _example()).totals()


def _each(net: nn.Module) -> dict[str, float]:
    """Multiply-adds of one weight of each parameter."""
    weights = names.parameters(net)
    rows = flops.count(net, _example()).rows
    return {row.name: row.macs / weights[row.name].numel() for row in rows}


def pruned(net: nn.Module, budget: GroupBudget, quick: bool) -> nn.Module:
    """The network without the channels whose weights have the smallest norms; batch-norm is
    measured anew.
    """
    weights = names.parameters(net)
    groups = families(coupled_groups(net, _example()), weights)
    ranks = group_scores(groups, {n: p.abs() for n, p in weights.items() if p.ndim > 1}, "l2")
    made = copy.deepcopy(net)
    cost = weight_cost(_each(net)) if budget.scope == "global" else None
    select(groups, ranks, budget, cost=cost).apply_(made)
    small = shrink(made, _example()).model
    images = calibration(64 if quick else 512, quick)
    reestimate(small, net, images[:-1], images[-1:])
    return small


def _ranks(net: nn.Module, ranks: tuple[int, int, int]) -> dict[str, tuple[int, int]]:
    by = dict(zip((16, 32, 64), ranks, strict=True))
    layers = {n: m for n, m in names.modules(net).items() if isinstance(m, nn.Conv2d)}
    return {n: (by[m.out_channels],) * 2 for n, m in layers.items() if n != "conv1"}


def low_rank(net: nn.Module, kind: Any, ranks: tuple[int, int, int], quick: bool) -> nn.Module:
    """The network with factors of all convolutions but the first, fitted to 320 images."""
    images = calibration(64 if quick else 320, quick)
    seen, generator = looked(net, images, 0), torch.Generator().manual_seed(100)
    done = approximate(net, images, seen, _ranks(net, ranks), kind=kind, generator=generator)
    made = copy.deepcopy(net)
    put(made, done.made)
    reestimate(made, net, images[:-1], images[-1:])
    return made


def _unfitted(kind: str, ranks: tuple[int, int, int]) -> nn.Module:
    """As long as the fitted one takes, with other values."""
    made = _dense()
    layers = dict(names.modules(made))
    put(made, {n: build(layers[n], kind, r, bias=True) for n, r in _ranks(made, ranks).items()})
    return made


def _way(name: str, way: str, work: Path, quick: bool) -> dict[str, Any]:
    """A network without channels, not trained yet: its size, and validation images' loss."""
    if name == "half":
        budget = GroupBudget(0.5)
    else:
        budget = GroupBudget(THEIRS[1] / THEIRS[0], scope="global", normalise=WAYS[way])
    made = pruned(_dense(), budget, quick)
    widths = {n: m.out_channels for n, m in made.named_modules() if isinstance(m, nn.Conv2d)}
    return _saved(name, way, made, work, quick) | {"widths": widths}


def _saved(name: str, way: str, made: nn.Module, work: Path, quick: bool) -> dict[str, Any]:
    """Keep a network; what is known of it before its training."""
    torch.save(made, work / f"{name}-{way}.pt")
    seen = evaluate(made, first(briefly(quick).validation, 50 if quick else 1000))
    return {
        "name": name,
        "way": way,
        "macs": _macs(made)["macs"],
        "loss": seen.loss,
        "accuracy": 100 * seen.accuracy,
    }


def _speeds(quick: bool) -> list[float]:
    """How many times as fast as the dense network each candidate of low rank is."""
    rows = [_unfitted(kind, ranks) for kind, ranks in RANKS]
    return _measured([_dense(), *rows], quick)["onnxruntime"]["speed_up"]


def _measured(networks: list[nn.Module], quick: bool) -> dict[str, Any]:
    """Milliseconds and speed-ups, batch 1 on one thread, interleaved in one run.

    Of the least times: a slice of time that another process takes hits a longer call more often.
    """
    subjects = [Subject(str(i), net.eval(), _example()) for i, net in enumerate(networks)]
    engines = ["torch"] if quick else ["torch", "onnxruntime"]
    found: dict[str, Any] = {}
    for engine in engines:
        rows = bench(subjects, engines=[engine], rounds=5 if quick else 400, seconds=60.0).timings
        least = [row.least_ms for row in rows]
        found[engine] = {
            "least_ms": least, "median_ms": [row.ms for row in rows],
            "speed_up": [least[0] / ms for ms in least[1:]],
            "ratio": [[row.ratio, row.interval] for row in rows[1:]],
        }  # fmt: skip
    found.setdefault("onnxruntime", found["torch"])
    return found


def _factored(kind: str, ranks: tuple[int, int, int], work: Path, quick: bool) -> dict[str, Any]:
    """The network of low rank, not trained yet."""
    made = low_rank(_dense(), kind, ranks, quick)
    return _saved("low-rank", kind, made, work, quick) | {"ranks": list(ranks)}


def _trained(name: str, way: str, work: Path, quick: bool) -> dict[str, Any]:
    """A few epochs against the dense network's soft outputs; accuracy in percent."""
    data, teacher = briefly(quick), _dense()
    net = _loaded(work / f"{name}-{way}.pt")
    epochs = 1 if quick else _EPOCHS[name]
    before = evaluate(net, data.test)
    hooks = [channels_last_(each) for each in (net, teacher)]
    config = replace(_CONFIG, epochs=epochs, lr=_RATES[name])
    train(
        net, data, config, teacher=teacher, evaluate_every=epochs,
        checkpoint=work / f"{name}-train.pt",
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    torch.save(net, work / f"{name}.pt")
    after = evaluate(net, data.test)
    return {
        "name": name, "epochs": epochs, "untrained": 100 * before.accuracy,
        "validation": 100 * evaluate(net, data.validation).accuracy,
        "accuracy": 100 * after.accuracy, "parameters": sum(p.numel() for p in net.parameters()),
        **_macs(net),
    }  # fmt: skip


def _loaded(path: Path) -> nn.Module:
    net: nn.Module = torch.load(path, weights_only=False)  # written by this run
    return net


def _tested(quick: bool) -> dict[str, Any]:
    """The dense network."""
    data, net = briefly(quick), _dense()
    seen = evaluate(net, data.test)
    return {
        "accuracy": 100 * seen.accuracy,
        "parameters": sum(p.numel() for p in net.parameters()),
        **_macs(net),
    }


def _timed(work: Path, quick: bool) -> dict[str, Any]:
    """The trained networks against the dense one."""
    return _measured([_dense(), *(_loaded(work / f"{name}.pt") for name in _EPOCHS)], quick)


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    dense, rows = raw["dense"], {row["name"]: row for row in raw["trained"]}
    fewer, page = rows["fewer"], "structured-sparsity.beyond"
    speeds = dict(zip(_EPOCHS, raw["times"]["onnxruntime"]["speed_up"], strict=True))
    what = f"ResNet-20, fewer channels, {fewer['epochs']} epochs"
    return [
        Claim(page, f"{what}: MFLOPs, two a multiply-add", 2e-6 * fewer["macs"], "<=", THEIRS[1]),
        Claim(
            page,
            f"{what}: part of the dense network's live multiply-adds",
            fewer["live"] / dense["live"],
            "<=",
            round(THEIRS[1] / THEIRS[0], 4),
        ),
        Claim(page, f"{what}: points lost", dense["accuracy"] - fewer["accuracy"], "<=", LOST),
        *(
            Claim(
                id,
                f"ResNet-20, {text}, {rows[name]['accuracy']:.2f} % after {rows[name]['epochs']} "
                "epochs: onnxruntime, batch 1, times as fast as dense",
                speeds[name],
                ">=",
                1.6,
            )
            for id, name, text in (
                (page, "half", "half the channels"),
                ("low-rank.beyond", "low-rank", "low rank"),
            )
        ),
        Claim(
            "low-rank.beyond",
            "ResNet-20, low rank: times fewer multiply-adds",
            dense["macs"] / rows["low-rank"]["macs"],
            ">=",
            2.0,
        ),
    ]


@experiment("resnet-channels", seeds=(0,), judge=_judge)
def resnet_channels(context: Context) -> dict[str, Any]:
    """ResNet-20 at 27 % fewer operations, at half its channels, and at low rank, with its time."""
    work, quick = context.work, context.quick
    (dense,) = context.map(_tested, [(quick,)])
    ways = context.map(_way, [("fewer", way, work, quick) for way in WAYS])
    best = {"fewer": min(ways, key=lambda row: float(row["loss"]))["way"], "half": "norm"}
    ways += context.map(_way, [("half", best["half"], work, quick)])
    (speeds,) = context.alone(_speeds, [(quick,)])
    fast = [row for row, speed in zip(RANKS, speeds, strict=True) if speed >= _FAST]
    kind, ranks = (fast or [RANKS[speeds.index(max(speeds))]])[0]
    if quick:  # a smoke run takes the same way whatever its clock says
        kind, ranks = RANKS[0]
    factored = context.map(_factored, [(kind, ranks, work, quick)])
    best["low-rank"] = kind
    for row in (*ways, *factored):
        context.say(f"{row['name']}, {row['way']}: {row['macs']:,.0f}, {row['accuracy']:.1f} %")
    trained = context.map(_trained, [(name, best[name], work, quick) for name in _EPOCHS])
    for row in trained:
        context.say(f"{row['name']}: {row['accuracy']:.2f} % of {dense['accuracy']:.2f} %")
    (times,) = context.alone(_timed, [(work, quick)])
    return {
        "dense": dense, "ways": ways, "candidates": [[*row] for row in RANKS], "speeds": speeds,
        "factored": factored, "trained": trained, "times": times,
        "note": "the published weights were trained on the validation images too",
    }  # fmt: skip
