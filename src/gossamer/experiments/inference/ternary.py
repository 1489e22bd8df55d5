"""A ternary matrix times a vector beside llama.cpp's TQ2_0 and dense int8, in one run.

2048 x 2048, which bitnet.cpp publishes for one thread of an AMD EPYC 7V13 (microsoft/BitNet,
src/README.md, "Kernel Performance Comparison": .058 ms, mean, the best of its three kernels), and
4096 x 9216, whose bounds over dense int8 are the ratios of the specification's own facts (2-bit
ternary 22.8 and 5.3 times float32, int8 VNNI 5.2 and 3.8, hot and cold). Random ternary weights
with a scale a row, one thread, float32 in and out, the least time over interleaved rounds: "hot"
right after itself, "cold" after 192 MB were read. A call from Python is in every figure.

ggml is timed where ``GOSSAMER_GGML`` names its library (:mod:`.ggml`): TQ2_0, and Q8_0 among the
dense int8. Errors are of the root of squared differences over that of the exact product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gossamer.core.timing import best_of, one_thread
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.inference.ggml import VARIABLE, Product, library
from gossamer.runtime.engines import ENGINES, Call, Subject, installed
from gossamer.runtime.kernels import few_bits, row_books
from gossamer.runtime.kernels.arrays import dot_products

__all__ = ["SIZES", "ternary"]

SIZES = {"2048 x 2048": (2048, 2048), "4096 x 9216": (4096, 9216)}
BITNET_MS = 0.058
_DENSE = ("onnxruntime-int8", "openvino-int8", "ggml Q8_0")

Calls = dict[str, Callable[[], Any]]


def _calls(outputs: int, inputs: int) -> tuple[Calls, NDArray[np.float64]]:
    """Every way to the product, and the product of the ternary matrix."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.01, 0.1, (outputs, 1)).astype(np.float16).astype(np.float32)
    weight = rng.integers(-1, 2, (outputs, inputs)).astype(np.float32) * scale
    x = rng.standard_normal((1, inputs)).astype(np.float32)
    packed, books = few_bits.pack_ternary(weight), row_books.pack_row_books(weight)
    layer = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
    calls: Calls = {
        "ternary": partial(few_bits.linear_few_bits, packed, x),
        "ternary, float32 activations": partial(row_books.linear_row_books, books, x),
        "float32 torch": partial(torch.mv, layer.weight.detach(), torch.from_numpy(x[0])),
        "float32 numpy": partial(np.matmul, weight, x[0]),
    }
    subject = Subject("dense", layer, torch.from_numpy(x))
    for engine in _DENSE:
        if engine in ENGINES and installed(engine):
            made = ENGINES[engine].prepare(subject, subject.rows(1), 1)
            calls[engine] = partial(_read, made)
    if (ggml := library()) is not None:
        for kind in ("TQ2_0", "Q8_0"):
            calls[f"ggml {kind}"] = partial(Product(ggml, weight, kind), x[0])
    return calls, weight.astype(np.float64) @ x[0]


def _read(made: Call) -> Tensor:
    return made.read(made.run())[0]


def measured(outputs: int, inputs: int, rounds: int, evicted: int) -> dict[str, Any]:
    """Least milliseconds of each way, hot and cold, and how far each is from the exact product.

    ``evicted``: floats that are read before a cold call.
    """
    calls, wanted = _calls(outputs, inputs)
    evict = np.ones(evicted, np.float32)
    hot, cold = (dict.fromkeys(calls, float("inf")) for _ in range(2))
    error = {}
    with one_thread(), torch.no_grad():
        for name, run in calls.items():
            off = np.asarray(run(), np.float64).reshape(-1) - wanted
            error[name] = float(np.linalg.norm(off) / np.linalg.norm(wanted))
        for _ in range(rounds):
            for name, run in calls.items():
                evict.sum()
                cold[name] = min(cold[name], 1000 * best_of([run], 1)[0])
                hot[name] = min(hot[name], 1000 * best_of([run], 5)[0])
    return {"hot_ms": hot, "cold_ms": cold, "error": error}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    small, large = (raw["products"][name] for name in SIZES)
    what = "2048 x 2048 ternary, ms here; bitnet.cpp's published .058 is on an AMD EPYC 7V13"
    found = [Claim("inference.ternary", what, small["hot_ms"]["ternary"], "<=", BITNET_MS)]
    for name, row in raw["products"].items():
        for state in ("hot", "cold"):
            ms = row[f"{state}_ms"]
            if "ggml TQ2_0" in ms:
                what = f"{name} ternary, times as fast as llama.cpp's TQ2_0, {state}"
                ratio = ms["ggml TQ2_0"] / ms["ternary"]
                found.append(Claim("inference.ternary", what, ratio, ">", 1.0))
    for state, bound in (("hot", 4.4), ("cold", 1.4)):
        ms = large[f"{state}_ms"]
        best = min(t for name, t in ms.items() if name in _DENSE)
        what = f"4096 x 9216 ternary, times as fast as the best dense int8, {state}"
        found.append(Claim("inference.ternary", what, best / ms["ternary"], ">=", bound))
    return found


@experiment("inference-ternary", seeds=(0,), judge=_judge)
def ternary(context: Context) -> dict[str, Any]:
    """Ternary products beside llama.cpp's TQ2_0 and dense int8 engines."""
    more = (3, 1 << 20) if context.quick else (100, 48 << 20)
    sizes = dict.fromkeys(SIZES, (256, 512)) if context.quick else SIZES
    rows = context.alone(measured, [(*size, *more) for size in sizes.values()])
    found = dict(zip(SIZES, rows, strict=True))
    for name, row in found.items():
        ms = ", ".join(f"{n} {t:.3f}" for n, t in row["hot_ms"].items())
        context.say(f"{name}, hot ms: {ms}")
    ggml = library()
    if ggml is None:
        context.say(f"ggml is left out: {VARIABLE} names no library")
    return {
        "dot_products": dot_products(),
        "ggml": None if ggml is None else ggml.ggml_version().decode(),
        "products": found,
    }
