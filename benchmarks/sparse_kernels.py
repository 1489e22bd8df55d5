"""The runtime's kernels on each instruction set of this machine, and on more threads.

Run: python benchmarks/sparse_kernels.py [--rounds 50] [--json FILE]. All ways of a layer run in
turn; a figure is the least milliseconds. Against the dense engines: gossamer reproduce
inference-layers.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from gossamer.core.timing import best_of
from gossamer.runtime.kernels import conv, conv_int8, few_bits, gemv, gemv_int8
from gossamer.runtime.kernels.arrays import RELU, dot_products
from gossamer.runtime.kernels.eight_bits import Scale


def calls(density: float) -> dict[str, Callable[..., Any]]:
    """Kernels by name; each takes the number of threads."""
    rng = np.random.default_rng(0)

    def sparse(*shape: int) -> np.ndarray:
        weight = rng.standard_normal(shape).astype(np.float32)
        return np.where(rng.random(shape) < density, weight, 0).astype(np.float32)

    weight = sparse(384, 256, 3, 3)
    x = rng.random((1, 256, 13, 13), np.float32)
    codes = rng.integers(0, 128, (1, 64, 13, 13, 4)).astype(np.uint8)
    made: dict[str, Callable[..., Any]] = {
        "convolution float32": partial(
            conv.convolve, conv.pack_conv(weight, padding=1), x, clamp=RELU
        )
    }
    for element in ("quads", "pairs"):
        packed = conv_int8.pack_conv_int8(
            weight, source=Scale(0.01, 0), target=Scale(0.1, 0), padding=1, element=element
        )
        made[f"convolution int8, {element}"] = partial(conv_int8.convolve_int8, packed, codes)
    matrix, v = sparse(2048, 2048), rng.random((1, 2048), np.float32)
    made["linear float32"] = partial(gemv.gemv, gemv.pack_rows(matrix), v[0])
    for width in gemv_int8.WIDTHS:
        packed = gemv_int8.pack_bytes(matrix, width=width)
        made[f"linear int8, blocks of {width}"] = partial(gemv_int8.linear_int8, packed, v)
    ternary = few_bits.pack_ternary(np.sign(matrix))
    made["linear ternary"] = partial(few_bits.linear_few_bits, ternary, v)
    book = few_bits.pack_book(np.round(np.clip(matrix, -2, 2) * 3))
    made["linear, 4-bit book"] = partial(few_bits.linear_few_bits, book, v)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.time()
    levels = ["scalar", "avx2", *(["avx512"] if dot_products() else [])]
    rows = {}
    for name, call in calls(args.density).items():
        ways: dict[str, Callable[[], Any]] = {}
        for level in levels:

            def run(level: str = level, call: Callable[..., Any] = call) -> None:
                os.environ["GOSSAMER_ISA"] = level
                call(threads=1)

            ways[level] = run
        ways["2 threads"] = partial(call, threads=2)  # on the level of the last
        taken = best_of(list(ways.values()), args.rounds)
        rows[name] = {way: 1000 * t for way, t in zip(ways, taken, strict=True)}
        print(f"{name:28}" + "".join(f"  {way} {ms:.3f} ms" for way, ms in rows[name].items()))
    os.environ.pop("GOSSAMER_ISA", None)
    record("sparse-kernels", "The runtime's kernels by instruction set", began, [],
           {"density": args.density, "ms": rows}, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
