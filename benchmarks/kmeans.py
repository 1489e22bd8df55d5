"""1-D k-means to the global optimum on 61 M weights against scikit-learn's on 1 M.

Run: python benchmarks/kmeans.py [--weights 61000000] [--json FILE]. Both use as many
threads as torch does, which is recorded.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from record import record
from sklearn.cluster import KMeans

from gossamer.experiments import Claim
from gossamer.quantize import share

PAGE = "deep-compression.beyond"


def timed(function) -> tuple[float, object]:
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=61_000_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.time()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(args.weights, generator=generator) * 0.02
    sample = weights[:1_000_000]
    rows, claims = [], []
    for k, most in ((4, 1.0), (32, 1.0), (256, 2.0)):
        took = min(timed(lambda k=k: share(weights, clusters=k, init="optimal"))[0] for _ in "123")
        own, mine = timed(lambda k=k: share(sample, clusters=k, init="optimal"))
        error = float((sample.double() - mine.dequantize().double()).square().mean())
        other, theirs = timed(
            lambda k=k: KMeans(k, n_init=1, max_iter=100, random_state=0).fit(sample.reshape(-1, 1))
        )
        reached = theirs.inertia_ / len(sample)
        rows.append(
            {
                "k": k,
                "seconds": took,
                "seconds_1m": own,
                "sklearn_seconds_1m": other,
                "mse_1m": error,
                "sklearn_mse_1m": reached,
            }
        )
        print(
            f"k={k:3}: {len(weights):,} weights in {took:.2f} s, 1 M in {own:.3f} s; scikit-learn "
            f"1 M in {other:.2f} s; mean squared error {error / reached:.4f} of its"
        )
        claims += [
            Claim(PAGE, f"k = {k}: seconds for {len(weights) / 1e6:g} M weights", took, "<=", most),
            Claim(PAGE, f"k = {k}: error over scikit-learn's", error / reached, "<=", 1.0001),
        ]
    record(
        "benchmark-kmeans",
        "1-D k-means to the global optimum on 61 M weights; scikit-learn on 1 M.",
        began,
        claims,
        {"weights": len(weights), "threads": torch.get_num_threads(), "rows": rows},
        args.json,
    )


if __name__ == "__main__":
    main()
