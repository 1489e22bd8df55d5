"""Dynamic-precision fixed point: a trained ResNet-20 on CIFAR-10, the search, and the SVD.

Qiu et al., FPGA 2016, tables 2 and 3 and section 4. Weights, biases and data have the same bits
unless a row says otherwise. Batch-norm is folded, the formats are chosen on training images (a
seed draws them), and accuracy is that of the whole test set.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import datasets, nets
from gossamer.analysis import canvas
from gossamer.datasets import Dataset, Split, batches
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import after, lenets_folder, mnist
from gossamer.pack import pack
from gossamer.quantize import FixedPoint, IntegerNetwork, Precision, calibrate
from gossamer.quantize.fixed_point import error, no_overflow, search
from gossamer.quantize.steps import ARITHMETIC, read, wide
from gossamer.structure import factorize, fold_batchnorm, svd_size, sweep
from gossamer.training import evaluate

__all__ = ["fixed_point_svd", "resnet20", "search_is_brute_force", "static_dynamic"]

PAGE = "fixed-point"
NET = "resnet-20"
BITS = (16, 8, 6, 4)
CALIBRATION = 256  # training images
BATCH = 250
RANKS = (5, 10, 20, 30, 50, 100, 200, 300)
# most points lost: the page's bounds
LOST = {16: 0.1, 8: 1.0}


def _data(quick: bool) -> tuple[Dataset, Split]:
    data = datasets.load("cifar10")
    return data, data.test.take(slice(0, 20)) if quick else data.test


def _some(split: Split, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.batch(order[:count])[0]


def fixed(
    model: nn.Module, data: Dataset, precision: Precision, seed: int, quick: bool
) -> FixedPoint:
    """The folded network in fixed point."""
    images = _some(data.train, 8 if quick else CALIBRATION, seed)
    return calibrate(fold_batchnorm(model, images[:8]), [images], precision)


def _compare(net: FixedPoint, test: Split, *, both: bool) -> tuple[int, int | None]:
    """Right answers of the integer network, and images whose simulated logits differ in a bit."""
    whole = IntegerNetwork(net)
    right = differ = 0
    with torch.no_grad():
        for inputs, targets in batches(test, BATCH, generator=None):
            integers = whole(inputs)
            right += int((integers.argmax(1) == targets).sum())
            if both:
                # the same bits: float32 looked at as int32
                same = net(inputs).view(torch.int32) == integers.view(torch.int32)
                differ += int((~same.all(1)).sum())
    return right, differ if both else None


def accuracy(bits: int, dynamic: bool, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Test accuracy (percent) of one configuration on integers.

    At the precisions of the page's bounds the simulated network is compared on every image.
    """
    name = f"{bits}-{'dynamic' if dynamic else 'static'}-{seed}"
    data, test = _data(quick)
    model = nets.build(NET, pretrained=True)
    net = fixed(model, data, Precision(bits, bits, bits, dynamic), seed, quick)
    right, differ = _compare(net, test, both=dynamic and bits in LOST)
    work.mkdir(parents=True, exist_ok=True)
    values = net.values()
    with pack(values, work / f"{name}.gsm") as archive:
        size = archive.file_bytes
    inputs = _some(data.validation, 2 if quick else 16, 0)
    slow = IntegerNetwork(net, oracle=True)
    return {
        "bits": bits,
        "dynamic": dynamic,
        "seed": seed,
        "images": len(test),
        "accuracy": 100 * right / len(test),
        "images_that_differ": differ,
        "oracle_agrees": torch.equal(slow(inputs), net(inputs)),
        "file_bytes": size,
        "bits_a_weight": 8 * size / sum(v.numel() for v in values.values()),
        "lengths": {
            "data": {name: form.frac for name, form in net.formats.items()},
            "weights": {name: net.layers[i].form.frac for i, name in enumerate(net.program.layers)},
        },
    }


def float_accuracy(quick: bool) -> float:
    """Test accuracy (percent) of the float network."""
    _, test = _data(quick)
    return 100 * evaluate(nets.build(NET, pretrained=True), test).accuracy


def _judge_resnet20(raw: Mapping[str, Any]) -> list[Claim]:
    rows = raw["runs"]
    claims = [
        Claim(
            f"{PAGE}.1",
            f"{bits} bits: test images whose integer logits differ in any bit, of all seeds",
            sum(r["images_that_differ"] for r in rows if r["bits"] == bits),
            "==",
            0,
        )
        for bits in LOST
    ]
    agree = sum(not r["oracle_agrees"] for r in rows)
    claims.append(Claim(f"{PAGE}.1", "networks that int64 products disagree with", agree, "==", 0))
    for bits, most in LOST.items():
        what = f"ResNet-20, {bits} bits, dynamic: points lost, mean over calibration draws"
        lost = raw["points_lost"][str(bits)]["mean"]
        claims.append(Claim(f"{PAGE}.3", what, lost, "<=", most))
    return claims


@experiment("fixed-point-resnet20", judge=_judge_resnet20)
def resnet20(context: Context) -> dict[str, Any]:
    """Fixed point 1, 3: ResNet-20 at 16 and 8 bits; integers against the simulation."""
    work = context.work
    (exact,) = context.map(float_accuracy, [(context.quick,)])
    jobs = [(b, True, seed, work, context.quick) for b in LOST for seed in context.seeds]
    rows = context.map(accuracy, jobs)
    lost = {
        str(bits): spread([exact - r["accuracy"] for r in rows if r["bits"] == bits])
        for bits in LOST
    }
    return {"float_accuracy": exact, "points_lost": lost, "runs": rows}


def _judge_static_dynamic(raw: Mapping[str, Any]) -> list[Claim]:
    table = raw["accuracy"]
    return [
        Claim(
            f"{PAGE}.4",
            f"{bits} bits: accuracy of dynamic over static, points",
            table["dynamic"][bits]["mean"] - table["static"][bits]["mean"],
            # 16 bits lose nothing either way
            ">=" if bits != "16" else ">",
            0.0 if bits != "16" else -0.1,
        )
        for bits in table["static"]
    ]


@experiment("fixed-point-static-dynamic", seeds=(0,), judge=_judge_static_dynamic)
def static_dynamic(context: Context) -> dict[str, Any]:
    """Fixed point 4: static against dynamic lengths at 16, 8, 6 and 4 bits."""
    work = context.work
    (exact,) = context.map(float_accuracy, [(context.quick,)])
    chosen = BITS[1:2] if context.quick else BITS
    jobs = [
        (bits, dynamic, seed, work, context.quick)
        for bits in chosen
        for dynamic in (False, True)
        for seed in context.seeds
    ]
    rows = context.map(accuracy, jobs)
    table = {
        way: {
            str(bits): spread(
                [r["accuracy"] for r in rows if (r["bits"], r["dynamic"]) == (bits, dynamic)]
            )
            for bits in chosen
        }
        for way, dynamic in (("static", False), ("dynamic", True))
    }
    plot_static_dynamic(table, exact, context.work / "static-dynamic.svg")
    return {"float_accuracy": exact, "accuracy": table, "runs": rows}


def plot_static_dynamic(
    table: Mapping[str, Mapping[str, Mapping[str, Any]]], exact: float, path: Path
) -> Path:
    """Accuracy against bits, a line each for static and dynamic; the float network dashed."""
    figure = canvas(6, 4)
    axes = figure.subplots()
    for way, by_bits in table.items():
        bits = [int(b) for b in by_bits]
        axes.plot(bits, [by_bits[str(b)]["mean"] for b in bits], marker="o", label=way)
    axes.axhline(exact, linestyle="--", color="grey", label="float")
    axes.set(xlabel="bits of weights and data", ylabel="test accuracy, %", xticks=bits)
    axes.invert_xaxis()
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def brute_force(tensor: Tensor, bits: int) -> tuple[int, float]:
    """The least error over every length that can matter, and where it is."""
    start = no_overflow(float(tensor.min()), float(tensor.max()), bits)
    # from all values rounded to zero, to all values cut off below a hundredth of the largest
    lengths = range(start - bits - 1, start + bits + 8)
    errors = {frac: error(tensor, bits, frac) for frac in lengths}
    best = min(errors, key=lambda frac: errors[frac])
    return best, errors[best]


def _judge_search(raw: Mapping[str, Any]) -> list[Claim]:
    worse = sum(bool(r["worse"]) for r in raw["rows"])
    what = "tensors and bits where brute force finds less error"
    return [Claim(f"{PAGE}.2", what, worse, "==", 0)]


@experiment("fixed-point-search", seeds=(0,), judge=_judge_search)
def search_is_brute_force(context: Context) -> dict[str, Any]:
    """Fixed point 2: the search against brute force, every weight, bias and output of ResNet-20."""
    data, _ = _data(context.quick)
    images = _some(data.train, 2 if context.quick else 16, context.seeds[0])
    program = read(fold_batchnorm(nets.build(NET, pretrained=True), images))
    held: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for step in program.steps:
            weight, bias = program.weights.get(step.name, (None, None))
            inputs = [held[n] for n in step.inputs]
            held[step.name] = images if step.kind == "input" else wide(step, inputs, weight, bias)
            if step.kind == "input" or step.kind in ARITHMETIC:
                tensors[f"{step.name}, output"] = held[step.name]
            if weight is not None and bias is not None:
                tensors[f"{step.name}.weight"], tensors[f"{step.name}.bias"] = weight, bias
    rows = []
    for name, tensor in tensors.items():
        for bits in BITS:
            found = search(tensor, bits)
            best, least = brute_force(tensor, bits)
            rows.append(
                {
                    "tensor": name,
                    "bits": bits,
                    "found": found,
                    "brute_force": best,
                    "start": no_overflow(float(tensor.min()), float(tensor.max()), bits),
                    "worse": error(tensor, bits, found) > least * (1 + 1e-9),
                }
            )
    moved = sum(r["found"] != r["start"] for r in rows)
    return {"searches": len(rows), "moved_from_the_start": moved, "rows": rows}


def ranks(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """LeNet-5's first fully-connected layer at each rank, of one seed; errors in percent."""
    data, model = mnist(quick), after("train", "lenet-5", seed, work, quick).model
    if quick:
        few = slice(0, 50)
        data = replace(data, validation=data.validation.take(few), test=data.test.take(few))
    layer = model.get_submodule("ip1")
    assert isinstance(layer, nn.Linear)  # as the network is built
    rows = []
    for size in sweep(layer, RANKS[::3] if quick else RANKS):
        short = copy.deepcopy(model)
        setattr(short, "ip1", factorize(layer, size.rank))  # noqa: B010 (a Module has no ip1)
        row = {"rank": size.rank, "ratio": size.ratio, "lost_energy": size.error}
        row |= _errors("float", short, data)
        # Qiu's 8/4: 4-bit weights in fully-connected layers
        images = _some(data.train, 16 if quick else CALIBRATION, seed)
        eight = Precision(8, 8, 8, True)
        row |= _errors("8/8", calibrate(short, [images], eight), data)
        row |= _errors("8/4", calibrate(short, [images], eight, weight_bits={"ip*": 4}), data)
        rows.append(row)
    return {"seed": seed, "float": _errors("float", model, data), "rows": rows}


def _errors(name: str, net: nn.Module, data: Dataset) -> dict[str, float]:
    return {
        f"{name}, {part}": 100 * evaluate(net, split).error
        for part, split in (("validation", data.validation), ("test", data.test))
    }


def _smallest(run: Mapping[str, Any], most: float) -> Mapping[str, Any]:
    """The first rank that loses no more than ``most`` points of validation accuracy."""
    rows: Sequence[Mapping[str, Any]] = run["rows"]
    limit = run["float"]["float, validation"] + most
    return next((r for r in rows if r["float, validation"] <= limit), rows[-1])


def _judge_svd(raw: Mapping[str, Any]) -> list[Claim]:
    chosen = [_smallest(run, 0.1) for run in raw["runs"]]
    before, after = raw["vgg_fc6"]
    page, what = f"{PAGE}.5", "LeNet-5 ip1 at the first rank within .1 points on validation:"
    lost = raw["test_points_lost"]["mean"]
    return [
        Claim(page, "VGG fc6 at rank 500, times smaller", round(before / after, 2), "==", 7.04),
        Claim(page, f"{what} times smaller, least", min(r["ratio"] for r in chosen), ">", 1),
        Claim(page, f"{what} test points lost, mean", lost, "<=", 0.2),
    ]


@experiment("fixed-point-svd", judge=_judge_svd)
def fixed_point_svd(context: Context) -> dict[str, Any]:
    """Fixed point 5: ranks of LeNet-5's first fully-connected layer; VGG fc6's 7.04 times."""
    work = lenets_folder(context)
    runs = context.map(ranks, [(seed, work, context.quick) for seed in context.seeds])
    chosen = [_smallest(run, 0.1) for run in runs]
    lost = [
        row["float, test"] - run["float"]["float, test"]
        for row, run in zip(chosen, runs, strict=True)
    ]
    vgg = svd_size(25088, 4096, 500)
    return {
        "vgg_fc6": [vgg.before, vgg.after],
        "chosen_ranks": [r["rank"] for r in chosen],
        "test_points_lost": spread(lost),
        "runs": runs,
    }
