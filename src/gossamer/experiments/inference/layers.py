"""Single layers in the runtime's kernels beside the dense engines: inference 1 to 4.

AlexNet's conv2-5 and the 3x3 layers of ResNet-18, batch 1, one thread, random weights and masks
(times of these kernels depend on where zeros are, not on values), float32 at densities .2, .1, .05
and 8 bits at .1, unstructured and in 1x4 blocks along the input channels; and linear layers of
4096 x 9216. All ways of a layer run in turn in one process; a figure is the least time. "Best" is
the fastest of onnxruntime and, where it is installed, OpenVINO. Their int8 networks quantize a
float32 input and give float32; the kernel's take and give codes, as between layers. Kernels are
bound to their arrays before, as in a plan.

A linear layer is "hot" right after itself, "cold" after 192 MB were read. The float32 product that
its bandwidth bounds is the faster of torch's and numpy's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.timing import best_of, one_thread
from gossamer.experiments import Claim, Context, experiment
from gossamer.runtime.engines import ENGINES, Subject, installed
from gossamer.runtime.kernels import conv, conv_int8, few_bits, gemv, gemv_int8, row_books
from gossamer.runtime.kernels.arrays import RELU, dot_products
from gossamer.runtime.kernels.eight_bits import TOP, Scale

__all__ = ["convolution", "layers", "product"]

# name -> input channels, filters, side, kernel, groups
LAYERS: dict[str, tuple[int, int, int, int, int]] = {
    "alexnet.conv2": (96, 256, 27, 5, 2),
    "alexnet.conv3": (256, 384, 13, 3, 1),
    "alexnet.conv4": (384, 384, 13, 3, 2),
    "alexnet.conv5": (384, 256, 13, 3, 2),
    "resnet18.layer1": (64, 64, 56, 3, 1),
    "resnet18.layer2": (128, 128, 28, 3, 1),
    "resnet18.layer3": (256, 256, 14, 3, 1),
    "resnet18.layer4": (512, 512, 7, 3, 1),
}
DENSITIES = (0.2, 0.1, 0.05)
BOUNDS = {"0.2": 2.7, "0.1": 4.2, "0.05": 6.0}
Calls = dict[str, Callable[[], Any]]


def _engines(subject: Subject) -> Calls:
    """The dense engines that are installed, float32 and int8."""
    calls: Calls = {}
    for engine in ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8"):
        if installed(engine):
            # Three times: sessions of one layer came out 5 and 15 ms apart here.
            for number in (1, 2, 3):
                made = ENGINES[engine].prepare(subject, subject.rows(1), 1)
                calls[f"{engine} #{number}"] = made.run
    return calls


def _times(calls: Calls, rounds: int) -> dict[str, float]:
    """Least milliseconds of each."""
    with one_thread(), torch.no_grad():
        best_of(list(calls.values()), 2)  # warms up
        taken = best_of(list(calls.values()), rounds)
    return {name: 1000 * t for name, t in zip(calls, taken, strict=True)}


def _best(ms: Mapping[str, float], int8: bool) -> float:
    return min(
        t
        for name, t in ms.items()
        if name.startswith(("onnxruntime", "openvino")) and ("int8" in name) == int8
    )


def convolution(
    inputs: int, filters: int, side: int, kernel: int, groups: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds of a layer (convolution, bias, ReLU) in each way, and speed-ups."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pad = kernel // 2
    layer = nn.Conv2d(inputs, filters, kernel, padding=pad, groups=groups)
    x = torch.rand(1, inputs, side, side)
    calls = _engines(Subject("dense", nn.Sequential(layer, nn.ReLU()), x))
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()  # type: ignore[union-attr]
    settings: dict[str, Any] = {"padding": pad, "groups": groups, "image": (side, side)}
    for density in DENSITIES:
        sparse = np.where(rng.random(weight.shape) < density, weight, 0).astype(np.float32)
        packed = conv.pack_conv(sparse, **settings)
        out = np.empty((1, filters, side, side), np.float32)
        calls[f"float32 {density}"] = conv.bound(packed, x.numpy(), out, bias=bias, ends=RELU)
    codes = rng.integers(0, 128, (1, inputs // 4, side, side, 4)).astype(np.uint8)
    whole = rng.random(weight.shape) < 0.1
    blocks = np.repeat(rng.random(whole[:, ::4].shape) < 0.1, 4, axis=1)
    for name, mask in (("unstructured", whole), ("blocks", blocks)):
        sparse = np.where(mask, weight, 0).astype(np.float32)
        eight = conv_int8.pack_conv_int8(
            sparse, source=Scale(1 / 127, 0), target=Scale(0.02, 0), bias=bias, **settings
        )
        out = np.empty((1, filters // 4, side, side, 4), np.uint8)
        calls[f"int8 {name} ({eight.taps.element})"] = conv.bound(
            eight.taps, codes, out, scale=eight.scale, bias=eight.bias, ends=(0, TOP)
        )
    ms = _times(calls, rounds)
    plain, eights = _best(ms, False), _best(ms, True)
    int8 = {name.split()[1]: t for name, t in ms.items() if name.startswith("int8")}
    return {
        "ms": ms,
        "float32": {str(d): plain / ms[f"float32 {d}"] for d in DENSITIES},
        "int8_over_float32": {name: plain / t for name, t in int8.items()},
        "int8_over_int8": {name: eights / t for name, t in int8.items()},
    }


def product(outputs: int, inputs: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a linear layer on one sample, hot and cold, and speed-ups over float32."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    layer = nn.Linear(inputs, outputs, bias=False)
    x = torch.rand(1, inputs)
    calls = {
        name: run for name, run in _engines(Subject("dense", layer, x)).items() if "int8" in name
    }
    weight, v = layer.weight.detach(), x.numpy()
    calls["float32 torch"] = lambda: torch.mv(weight, x[0])
    calls["float32 numpy"] = lambda: weight.numpy() @ v[0]
    dense = weight.numpy()
    sparse = np.where(rng.random(dense.shape) < 0.1, dense, 0).astype(np.float32)
    calls["sparse float32"] = partial(gemv.gemv, gemv.pack_rows(sparse), v[0])
    calls["sparse int8"] = partial(gemv_int8.linear_int8, gemv_int8.pack_bytes(sparse), v)
    book = rng.standard_normal(15).astype(np.float32)
    shared = book[rng.integers(0, 15, dense.shape)]
    ranks = rng.random((outputs, inputs // 128, 128)).argsort(axis=2).argsort(axis=2)
    balanced = np.where(ranks.reshape(dense.shape) < 8, shared, 0).astype(np.float32)
    packed = gemv_int8.pack_bytes(balanced, form="book", width=128)
    calls["balanced 8:128 book"] = partial(gemv_int8.linear_int8, packed, v)
    ternary = few_bits.pack_ternary(np.sign(sparse))
    calls["ternary"] = partial(few_bits.linear_few_bits, ternary, v)
    calls["ternary float32"] = partial(
        row_books.linear_row_books, row_books.pack_row_books(np.sign(sparse)), v
    )
    calls["book float32"] = partial(row_books.linear_row_books, row_books.pack_row_books(shared), v)
    calls["dense book"] = partial(few_bits.linear_few_bits, few_bits.pack_book(shared), v)
    evict = np.ones(48 << 20, np.float32)
    hot, cold = (dict.fromkeys(calls, float("inf")) for _ in range(2))
    with one_thread(), torch.no_grad():
        for _ in range(rounds):
            for name, run in calls.items():
                evict.sum()
                cold[name] = min(cold[name], *(1000 * t for t in best_of([run], 1)))
                hot[name] = min(hot[name], *(1000 * t for t in best_of([run], 2)))

    def over(ms: Mapping[str, float]) -> dict[str, float]:
        base = min(ms["float32 torch"], ms["float32 numpy"])
        return {name: base / t for name, t in ms.items()}

    return {
        "hot_ms": hot,
        "cold_ms": cold,
        "hot": over(hot),
        "cold": over(cold),
        "cold_over_int8": _best(cold, True) / cold["sparse int8"],
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    rows, linear = list(raw["layers"].values()), raw["product"]
    hot, cold = linear["hot"], linear["cold"]

    def least(key: str, name: str) -> float:
        return float(min(row[key][name] for row in rows))

    made = "4096 x 9216, times as fast as the float32 product"
    found = [
        Claim("inference.1", f"sparse int8 at 90 %, {made}, cold", cold["sparse int8"], ">=", 10),
        Claim("inference.1", f"sparse int8 at 90 %, {made}, hot", hot["sparse int8"], ">=", 25),
        Claim(
            "inference.1",
            "sparse int8 at 90 %, times as fast as the best dense int8, cold",
            linear["cold_over_int8"], ">=", 2.5,
        ),
    ]  # fmt: skip
    for name, plain, eights in (("unstructured", 6.5, 2.0), ("blocks", 14.0, 4.5)):
        what = f"int8 convolution, 90 % {name}, least of the layers, over the best"
        found += [
            Claim("inference.2", f"{what} float32", least("int8_over_float32", name), ">=", plain),
            Claim("inference.2", f"{what} int8", least("int8_over_int8", name), ">=", eights),
        ]
    for density, bound in BOUNDS.items():
        what = f"float32 convolution at density {density}, least of the layers, over the best dense"
        found.append(Claim("inference.3", what, least("float32", density), ">=", bound))
    return [
        *found,
        Claim("inference.4", f"ternary {made}, hot", hot["ternary"], ">=", 18),
        Claim("inference.4", f"ternary {made}, cold", cold["ternary"], ">=", 7),
    ]


@experiment("inference-layers", seeds=(0,), judge=_judge)
def layers(context: Context) -> dict[str, Any]:
    """Inference 1 to 4: single sparse layers against the best dense engines."""
    small, rounds = (16, 3) if context.quick else (1, 200)
    jobs = [
        (max(i // small // 4 * 4 * g, 4 * g) // g, max(f // small, 4 * g), side, k, g, rounds)
        for i, f, side, k, g in LAYERS.values()
    ]
    found = dict(zip(LAYERS, context.alone(convolution, jobs), strict=True))
    for name, row in found.items():
        context.say(
            f"{name}: "
            + ", ".join(f"float32 at {d} {v:.2f}x" for d, v in row["float32"].items())
            + "".join(f", int8 {n} {v:.2f}x" for n, v in row["int8_over_float32"].items())
        )
    size = (64, 256) if context.quick else (4096, 9216)
    (linear,) = context.alone(product, [(*size, 3 if context.quick else 50)])
    context.say(", ".join(f"{n} {v:.1f}x hot" for n, v in linear["hot"].items()))
    return {"dot_products": dot_products(), "layers": found, "product": linear}
