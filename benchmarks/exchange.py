"""One core's speed of gradient codecs, against reading memory in the same rounds.

Run: python benchmarks/exchange.py [--elements N] [--rounds R] [--json FILE]. Figures are this
machine's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from record import record

from gossamer.distribute import by_name
from gossamer.experiments import Claim
from gossamer.experiments.exchange.exchange_codecs import ALEXNET, speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=ALEXNET)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--codecs", default="terngrad,sq3,sq4,sq8,signsgd,dorefa-4")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.time()
    torch.set_num_threads(1)
    rows, claims = {}, []
    for name in args.codecs.split(","):
        row = speed(by_name(name), args.elements, args.rounds, 0)
        rows[name] = row
        print(f"{name:10} " + ", ".join(f"{k} {v:.1f}" for k, v in row.items()), flush=True)
        claims += [
            Claim("exchange.5", f"{name}, {k}: part of reading's GB/s", v / row["read"], ">=", 0.7)
            for k, v in row.items()
            if k.startswith(("encode", "decode")) and "two" not in k
        ]
    about = "Speed of gradient codecs on one core."
    raw = {"elements": args.elements, "gigabytes_per_second": rows}
    record("benchmark-exchange", about, began, claims, raw, args.json)


if __name__ == "__main__":
    main()
