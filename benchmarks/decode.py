"""Decoding into resident float32 memory against memcpy and against zstd level 1.

Run: python benchmarks/decode.py [--rows 4096] [--json FILE]. One thread. The tensor is a layer of
AlexNet's fc6 (columns 9216), 9 % kept, 31 values. All ways run in turn, round after round, on
memory that is already there; a ratio is that of the medians. The zstd rows decompress the float32
tensor, and the symbol streams that this library codes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard
from encode import alexnet
from record import record

from gossamer.experiments import Claim
from gossamer.pack.coders.ans import Rans
from gossamer.pack.coders.gaps import to_gaps
from gossamer.pack.read.into import decode_sparse_into

PAGE = "deep-compression.beyond"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.time()
    torch.set_num_threads(1)
    weight = alexnet(args.rows / 4096)["fc6.weight"].numpy()
    values, inverse = np.unique(weight, return_inverse=True)
    zero = int(np.searchsorted(values, 0))
    codes = inverse.reshape(-1)[weight.reshape(-1) != 0]
    codes = (codes - (codes > zero)).astype(np.uint8)
    book = np.delete(values, zero)
    gaps = to_gaps(np.flatnonzero(weight))
    coder = Rans()
    gap_bytes, code_bytes = coder.encode(gaps, 256), coder.encode(codes, len(book))
    out, source = np.zeros_like(weight), weight.copy()
    level1 = zstandard.ZstdCompressor(level=1)
    whole, symbols = level1.compress(weight.tobytes()), level1.compress(bytes(gaps) + bytes(codes))
    inflate = zstandard.ZstdDecompressor().decompress

    def ours(isa: str | None) -> Callable[[], object]:
        def run() -> None:
            if isa:
                os.environ["GOSSAMER_ISA"] = isa
            decode_sparse_into(
                out,
                gap_bytes,
                code_bytes,
                gap_count=len(gaps),
                code_count=len(codes),
                codebook=book,
            )
            os.environ.pop("GOSSAMER_ISA", None)

        return run

    ways: dict[str, Callable[[], object]] = {
        "memcpy": lambda: np.copyto(out, source),
        "decode": ours(None),
        "decode, avx2": ours("avx2"),
        "decode, portable": ours("scalar"),
        "symbols only": lambda: (
            coder.decode(gap_bytes, len(gaps), 256),
            coder.decode(code_bytes, len(codes), len(book)),
        ),
        "zstd -1 of the float32 bytes": lambda: inflate(whole),
        "zstd -1 of the symbols": lambda: inflate(symbols),
    }
    ours(None)()
    if not np.array_equal(out, weight):
        raise SystemExit("decoded values differ")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(took) for name, took in seconds.items()}
    speed = {name: weight.nbytes / took / 1e9 for name, took in median.items()}
    for name, took in median.items():
        print(f"{name:30} {1000 * took:8.2f} ms  {speed[name]:6.2f} GB/s of float32")
    decode = median["decode"]
    record(
        "benchmark-decode",
        "Decoding a pruned layer of 38 M weights into resident float32, one thread.",
        began,
        [
            Claim(PAGE, "decode, GB/s of float32", speed["decode"], ">=", 8.0),
            Claim(PAGE, "decode over memcpy, time", decode / median["memcpy"], "<=", 2.0),
            Claim(PAGE, "portable decode, GB/s", speed["decode, portable"], ">=", 1.0),
            Claim(
                PAGE,
                "decode over zstd -1 of the float32 bytes, time",
                decode / median["zstd -1 of the float32 bytes"],
                "<=",
                1.0,
            ),
            Claim(
                PAGE,
                "symbols over zstd -1 of the same symbols, time",
                median["symbols only"] / median["zstd -1 of the symbols"],
                "<=",
                1.0,
            ),
        ],
        {
            "weights": weight.size,
            "bytes": {
                "decode": len(gap_bytes) + len(code_bytes) + book.nbytes,
                "zstd -1 of the float32 bytes": len(whole),
                "zstd -1 of the symbols": len(symbols),
            },
            "seconds_by_way": seconds,
            "gigabytes_per_second": speed,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
