"""What few-bit weights cost in training: a step over the float step.

    python benchmarks/quantizers.py [--net resnet-20] [--only ttq lab] [--json x.json]

The same as ``gossamer reproduce quantizer-overhead``, for a network and quantizers of choice.
"""

import argparse
import time
from pathlib import Path

from record import record

from gossamer.experiments.ttq.quantizer_overhead import QUANTIZERS, claims, ratios


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--net", default="resnet-20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--only", nargs="*", choices=list(QUANTIZERS), default=list(QUANTIZERS))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    began = time.time()
    rows = ratios(options.net, options.batch, options.blocks, options.only)
    record(
        "quantizer-overhead",
        f"Few-bit weights: training step over the float step, {options.net}, "
        f"batch {options.batch}, one thread",
        began,
        claims(options.net, rows),
        {"ratios": rows, "blocks": options.blocks, "batch": options.batch},
        options.json,
    )


if __name__ == "__main__":
    main()
