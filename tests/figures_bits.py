"""Figures in the cards of few bits, of coding and of the exchange."""

from collections.abc import Callable, Sequence
from typing import Any

from gossamer.experiments.post_training.resnets import bytes_at

Data = dict[str, Any]
Figures = Callable[[Data], Sequence[float]]
Row = tuple[str, str, str, Figures]


def _spread(figure: Data, unit: float = 1) -> list[float]:
    """Mean and standard deviation."""
    return [unit * figure["mean"], unit * figure["std"]]


def _hook(d: Data, name: str) -> Data:
    return next(row for row in d["two"]["rows"] if row["hook"] == name)


def _rates(d: Data, what: str, least: int) -> list[float]:
    """Extremes, over ternary planes and gapless signs and sizes, of a part of reading's rate."""
    rows = [row for n, row in d["gigabytes_per_second"].items() if int(n) >= least]
    found = [row[f"{what} {form}"] / row["read"] for row in rows for form in ("planes", "sparse")]
    return [min(found), max(found)]


def _base3(d: Data) -> float:
    rows = [row for n, row in d["gigabytes_per_second"].items() if int(n) >= 1 << 24]
    return float(min(row[f"{w} base3"] / row["read"] for row in rows for w in ("encode", "decode")))


def _sq4(d: Data) -> float:
    (row,) = d["sq4_gigabytes_per_second"].values()
    ways = [f"{way} {form}" for way in ("encode", "decode") for form in ("planes", "sparse")]
    return float(min(row[way] / row["read"] for way in ways))


def _twice(d: Data, key: str) -> float:
    """The least ratio of the ring's speed-up at twice the workers."""
    rows = d[key]["rows"] if key == "assumed_accelerator" else d[key]
    pairs = [
        (b["speed_up"], a["speed_up"])
        for a in rows
        for b in rows
        if (a["network"], a["rate"], 2 * a["workers"]) == (b["network"], b["rate"], b["workers"])
    ]
    return min(b / a for b, a in pairs)


ROWS: list[Row] = [
    *(
        ("docs/methods/deep-compression.md",
         f"| {name} | {{}} KB | {{}} ± {{}} KB | {{}} ± {{}} KB | {{}} ± {{}} KB | {{}} ± {{}} % | "
         "{} ± {} % |",
         "deep-compression-lenets",
         lambda d, net=net: [
             d["summary"][net]["published_kb"],
             *(v for p in ("huffman", "fast", "smallest")
               for v in _spread(d["summary"][net]["file_kb"][p])),
             *_spread(d["summary"][net]["error_dense"]),
             *_spread(d["summary"][net]["error_shared"]),
         ])
        for name, net in (("LeNet-300-100", "lenet-300-100"), ("LeNet-5", "lenet-5"))
    ),
    *(
        ("docs/methods/deep-compression.md", f"| {name} | " + " | ".join(7 * ["{}"]) + " |",
         "deep-compression-lenets",
         lambda d, net=net, layer=layer: [
             next(x["paper"] for r in d["runs"] for x in r["layers"]
                  if (r["net"], r["seed"], x["name"]) == (net, 0, f"{layer}.weight"))[key]
             for key in ("kept_percent", "weight_bits", "weight_bits_huffman", "index_bits",
                         "index_bits_huffman", "rate_pq_percent", "rate_pqh_percent")
         ])
        for name, net, layer in (
            ("LeNet-300-100 ip1 | 235K", "lenet-300-100", "ip1"),
            ("ip2 | 30K", "lenet-300-100", "ip2"),
            ("ip3 | 1K", "lenet-300-100", "ip3"),
            ("LeNet-5 conv1 | .5K", "lenet-5", "conv1"),
            ("conv2 | 25K", "lenet-5", "conv2"),
            ("ip1 | 400K", "lenet-5", "ip1"),
            ("ip2 | 5K", "lenet-5", "ip2"),
        )
    ),
    (
        "docs/methods/deep-compression.md",
        "Huffman saves {} % and {} % of codes and positions",
        "deep-compression-lenets",
        lambda d: [c["value"] for c in d["claims"] if "saved by Huffman" in c["what"]],
    ),
    (
        "docs/methods/deep-compression.md",
        "at 4, 6 and 8 bits it is, by {}, {} and {} points of the mean",
        "deep-compression-inits",
        lambda d: [
            d["errors"][b]["linear"]["mean"]
            - min(d["errors"][b][i]["mean"] for i in ("density", "forgy"))
            for b in "468"
        ],
    ),
    *(
        ("docs/methods/deep-compression.md", f"| {bits} | " + " | ".join(4 * ["{} ± {}"]) + " |",
         "deep-compression-inits",
         lambda d, bits=bits: [
             v for i in ("linear", "density", "forgy", "optimal")
             for v in _spread(d["errors"][bits][i])
         ])
        for bits in "234568"
    ),
    *(
        ("docs/methods/fixed-point.md", f"| {bits} | {dynamic} | {{}} |",
         "fixed-point-static-dynamic",
         lambda d, bits=bits: [d["accuracy"][w][bits]["mean"] for w in ("dynamic", "static")])
        for bits, dynamic in (("16", "{}"), ("8", "**{}**"), ("6", "{}"), ("4", "{}"))
    ),
    (
        "docs/methods/fixed-point.md",
        "LeNet-5's ip1 at the first rank within .1 points on validation ({}, {} and {} of 500) "
        "loses {} points on test",
        "fixed-point-svd",
        lambda d: [*d["chosen_ranks"], d["test_points_lost"]["mean"]],
    ),
    *(
        (
            "docs/methods/post-training.md",
            f"| ResNet-{depth} | **{{}} KB** | {{}} → {{}} % | {{}} KB | {{}} |",
            "post-training-resnets",
            lambda d, depth=depth: next(
                [
                    row["bytes"] / 1e3,
                    row["accuracy_before"],
                    row["accuracy"],
                    bytes_at(d["nncodec"][str(depth)]["rows"], row["same"]) / 1e3,
                    row["processor_seconds"],
                ]
                for row in d["files"]
                if row["depth"] == depth
            ),
        )
        for depth in (20, 32, 44, 56)
    ),
    *(
        (
            "docs/methods/post-training.md",
            f"| {way} | {{}} ({{}}) | {{}} ({{}}) | {{}} ({{}}) | {{}} ({{}}) |",
            "post-training-resnets",
            lambda d, way=way: [
                row[key] for row in d["compared"] if row["way"] == way for key in ("stage", "plain")
            ],
        )
        for way in ("50 %", "2:4", "4 bits", "3 bits", "2 bits")
    ),
    (
        "README.md",
        "| ResNet-20, CIFAR-10, from 512 images without labels, nothing trained | 1,085 KB | "
        "**{} KB** | {}× | {} → {} % |",
        "post-training-resnets",
        lambda d: [
            d["files"][0]["bytes"] / 1e3,
            1085 / (d["files"][0]["bytes"] / 1e3),
            100 - d["files"][0]["accuracy_before"],
            100 - d["files"][0]["accuracy"],
        ],
    ),
    *(
        ("docs/methods/post-training.md", f"| {shown} | **{{}}** | {{}} | {{}} |",
         "post-training-language",
         lambda d, way=way: [
             row[key] for row in d["ways"] if row["way"] == way
             for key in ("bits_per_byte", "plain_bits_per_byte", "bytes")
         ])
        for shown, way in (
            ("4 bits", "4 bits"), ("3 bits", "3 bits"), ("ternary", "2 bits (ternary)"),
            ("ternary, a step for 32 weights", "ternary, a step for 32"), ("50 % kept", "50 %"),
            ("2:4", "2:4"),
        )
    ),
    (
        "docs/methods/post-training.md",
        "A transformer of {} M parameters on Shakespeare's characters, {} bits per byte before",
        "post-training-language",
        lambda d: [d["before"]["parameters"] / 1e6, d["before"]["bits_per_byte"]],
    ),
    (
        "docs/methods/post-training.md",
        "`rate: 0.001` ends in {} bytes of {} at {} bits per byte",
        "post-training-language",
        lambda d: next(
            [row["bytes"], d["before"]["bytes"], row["bits_per_byte"]]
            for row in d["ways"] if row["way"] == "rate .001"
        ),
    ),
    *(
        (
            "docs/methods/post-training.md",
            f"| {shown} | {{}} M | {{}} KB of {{}} | {{}} | {{}} | {{}} | {{}} MB |",
            "post-training-outside",
            lambda d, shown=shown: next(
                [
                    row["parameters"] / 1e6, row["bytes"] / 1e3, row["dense_bytes"] / 1e3,
                    row["cosine"], row["worst_cosine"], row["seconds"], row["peak_bytes"] / 1e6,
                ]
                for row in d["runs"]
                if shown.startswith(row["network"]) and row["way"] == "default"
            ),
        )
        for shown in (
            "speaker encoder (3-layer LSTM, trained)",
            "MTCNN P-net (trained)",
            "MTCNN R-net (trained)",
            "MTCNN O-net (trained)",
            "pitch CNN (trained)",
            "BERT-mini (not proved: buffers that no file holds)",
            "GPT-2-shaped",
            "ViT-tiny",
            "MobileNetV2",
            "ResNet-50-shaped, half as wide",
            "Whisper-tiny-shaped, two layers",
        )
    ),
    (
        "docs/methods/post-training.md",
        "a step for each row: 8 bits cosine {}, worst {}; 4 bits {}, where rounding to nearest "
        "gives {}.",
        "post-training-outside",
        lambda d: [
            row[key]
            for way, keys in (
                ("8 bits", ("cosine", "worst_cosine")),
                ("4 bits", ("cosine",)),
                ("4 bits, nearest", ("cosine",)),
            )
            for row in d["runs"]
            if row["way"] == way
            for key in keys
        ],
    ),
    (
        "docs/methods/loss-aware-gradients.md",
        "Against float gradients SQ4 loses {} points of accuracy, SQ2 with c = 3 {}:",
        "laq-gradient-bits",
        lambda d: [c["value"] for c in d["claims"] if "points lost" in c["what"]],
    ),
    (
        "docs/methods/loss-aware-gradients.md",
        "SQ3 loses {} to {} points to float gradients, SQ2 with c = 3 {} to {};",
        "laq-workers",
        lambda d: [
            pick(c["value"] for c in d["claims"] if c["what"].endswith(way))
            for way in ("SQ3", "SQ2, c=3")
            for pick in (min, max)
        ],
    ),
    *(
        ("docs/methods/loss-aware.md", f"| {hidden} | " + " | ".join(5 * ["{}"]) + " |",
         "laq-weight-bits",
         lambda d, hidden=hidden: [
             d["final"][hidden][b]["mean"] for b in ("1", "2", "3", "4", "float")
         ])
        for hidden in ("32", "64", "128")
    ),
    (
        "docs/methods/loss-aware.md",
        "costs {} (LAB), {} (LAT, exact) and {} (LAQ-3, 10 alternations)",
        "quantizer-overhead",
        lambda d: [
            d["ratios"][n]["ratio"] for n in ("lab", "lat, exact", "laq-3, 10 alternations")
        ],
    ),
    *(
        ("docs/methods/straight-through.md",
         f"| {bits} | {{}} ± {{}} | {{}} ± {{}} | **{{}} ± {{}}** |",
         "ste-lenet",
         lambda d, bits=bits: [
             v for e in ("identity", "relu", "clipped")
             for v in _spread(d["accuracy"][f"{bits} bits, {e}"])
         ])
        for bits in (2, 4)
    ),
    (
        "docs/methods/straight-through.md",
        "at 2 bits {} (identity), {} (ReLU), {} % (clipped), at 4 bits {} % (clipped). Restarted "
        "from there at a rate of 1e-5, the identity's training loss rises from {} to {} in",
        "ste-resnet20-reduced",
        lambda d: [
            *(d["accuracy"][f"2 bits, {e}"]["mean"] for e in ("identity", "relu", "clipped")),
            d["accuracy"]["4 bits, clipped"]["mean"],
            d["restarts"][0]["losses"][0],
            d["restarts"][0]["losses"][-1],
        ],
    ),
    (
        "docs/methods/terngrad.md",
        "float {} %; 2, 4, 8 and 16 workers {}, {}, {}, {} %",
        "terngrad-lenet-workers",
        lambda d: [d["accuracy"][n]["mean"] for n in ("float", "2", "4", "8", "16")],
    ),
    (
        "docs/methods/terngrad.md",
        "(`terngrad-cifarnet`): {} % against {} % for float. The gap of {} points",
        "terngrad-cifarnet",
        lambda d: [d["accuracy"]["2"]["mean"], d["accuracy"]["float"]["mean"], d["gap_points"]],
    ),
    (
        "docs/methods/terngrad.md",
        "encoding at {} to {} of the speed of reading memory, decoding one payload at {} to {}. "
        ".7 was asked for; base 3 falls to {}, SQ4 to {}, and of 1 M elements, which a cache reads "
        "at {} GB/s, ternary planes are encoded at {}.",
        "exchange-codecs",
        lambda d: [
            *_rates(d, "encode", 1 << 24),
            *_rates(d, "decode", 1 << 24),
            _base3(d),
            _sq4(d),
            d["gigabytes_per_second"]["1048576"]["read"],
            d["gigabytes_per_second"]["1048576"]["encode planes"]
            / d["gigabytes_per_second"]["1048576"]["read"],
        ],
    ),
    (
        "docs/methods/terngrad.md",
        "is {} at d = 100 (2.19 by integration) and {} at d = 100,000 (published 3.61); clipped at "
        "3 sigma it is {} at every d.",
        "gradient-exact",
        lambda d: [
            d["length"][name]["drawn"]
            for name in ("d=100, unclipped", "d=100000, unclipped", "d=1000, c=3")
        ],
    ),
    *(
        ("docs/methods/ttq.md",
         f"| {name} | {{}} | {{}} | {{}} ± {{}} | {{}} | {{}} | {{}} ± {{}} | {{}} KB | {{}} KB |",
         file,
         lambda d: [
             d["errors"]["ttq"]["float"]["n"],
             d["errors"]["ttq"]["float"]["mean"],
             *_spread(d["errors"]["ttq"]["final"]),
             d["errors"]["ttq"]["best_by_validation"]["mean"],
             d["errors"]["ttq"]["best_of_all_epochs"]["mean"],
             *_spread(d["errors"]["twn"]["final"]),
             *(d["errors"][k]["file_bytes"]["mean"] / 1000 for k in ("ttq", "twn")),
         ])
        for name, file in (("LeNet-5", "ttq-lenet"), ("ResNet-20", "ttq-resnet20"))
    ),
    *(
        ("docs/exchange-performance.md", f"| {name} | {sent} | {seconds} | {{}} |",
         "exchange-bench",
         lambda d, hook=hook: [
             _hook(d, hook)["sent"] / 1e6, _hook(d, hook)["seconds"], _hook(d, hook)["cpu_seconds"]
         ])
        for name, hook, sent, seconds in (
            ("none (plain DDP)", "none", "{}", "{}"), ("fp16", "fp16", "{}", "{}"),
            ("PowerSGD, rank 1, one bucket", "powersgd-1", "{}", "{}"),
            ("TernGrad, all_gather", "terngrad", "**{}**", "**{}**"),
            ("TernGrad, two_phase", "terngrad-two-phase", "{}", "{}"),
            ("TernGrad, server", "terngrad-server", "{}", "{}"),
        )
    ),
    (
        "docs/exchange-performance.md",
        "{} times as fast as plain DDP, in {} of its processor time, and {} times as fast as "
        "PowerSGD",
        "exchange-bench",
        lambda d: [
            _hook(d, "none")["seconds"] / _hook(d, "terngrad")["seconds"],
            _hook(d, "terngrad")["cpu_seconds"] / _hook(d, "none")["cpu_seconds"],
            _hook(d, "powersgd-1")["seconds"] / _hook(d, "terngrad")["seconds"],
        ],
    ),
    (
        "docs/exchange-performance.md",
        "leave at worst {} of the ring's speed-up with this machine's compute and {} with the "
        "accelerator's",
        "exchange-performance",
        lambda d: [_twice(d, "measured_compute"), _twice(d, "assumed_accelerator")],
    ),
]  # fmt: skip
