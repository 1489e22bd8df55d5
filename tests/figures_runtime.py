"""Figures in the README and in the card of sparse kernels: what is fast."""

from collections.abc import Callable, Sequence
from typing import Any

Data = dict[str, Any]
Figures = Callable[[Data], Sequence[float]]
Row = tuple[str, str, str, Figures]


def _least(d: Data, what: str, name: str) -> float:
    return min(float(row[what][name]) for row in d["layers"].values())


# page, its words with {} for each figure, results file, the figures in that order
def _large(rate: Data) -> list[float]:
    """Ternary, the best dense float32 engine, the best dense int8 engine."""
    dense = {k: v for k, v in rate["dense"].items() if not k.startswith("gossamer")}
    kinds = [[v for k, v in dense.items() if k.endswith("-int8") == int8] for int8 in (False, True)]
    return [rate["ternary"]["gossamer"], *map(max, kinds)]


ROWS: list[Row] = [
    (
        "docs/methods/sparse-kernels.md",
        "float32 at 20, 10 and 5 % of the weights: {}, {} and {} times",
        "inference-layers",
        lambda d: [_least(d, "float32", density) for density in ("0.2", "0.1", "0.05")],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "any pattern: {} times the best float32 and {} times the best int8; in blocks of 1x4 {} "
        "and {} times",
        "inference-layers",
        lambda d: [
            _least(d, f"int8_over_{engine}", name)
            for name in ("unstructured", "blocks")
            for engine in ("float32", "int8")
        ],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "sparse bytes at 10 % {} and {} times, ternary {} and {} times",
        "inference-layers",
        lambda d: [
            d["product"][state][name]
            for name in ("sparse int8", "ternary")
            for state in ("hot", "cold")
        ],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "{} times the best float32 engine in float32, in int8 {} times the best float32 and {} "
        "times the best int8 engine; ResNet-20 at 15 % {} times the best float32 engine in "
        "float32, {} times the best int8 engine in int8.",
        "inference-networks",
        lambda d: [c["value"] for c in d["claims"][:5]],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "conv2 of AlexNet has {} times in float32 at 10 %, {} and {} times in blocks of 8 bits",
        "inference-layers",
        lambda d: [
            d["layers"]["alexnet.conv2"][kind][name]
            for kind, name in (
                ("float32", "0.1"),
                ("int8_over_float32", "blocks"),
                ("int8_over_int8", "blocks"),
            )
        ],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "ResNet-20 at 15 % answers {} times as fast as the dense network in onnxruntime, and is "
        "from the file to its first answer in {} of a session's time",
        "inference-from-c",
        lambda d: [d["claims"][1]["value"], d["claims"][0]["value"]],
    ),
    (
        "README.md",
        "answers {} times as fast as the best dense float32 engine and {} times as fast as the "
        "best dense int8 engine, ResNet-20 with 15 % {} and {} times",
        "inference-networks",
        lambda d: [c["value"] for c in d["claims"][1:5]],
    ),
    (
        "README.md",
        "10,000 images, is answered in {} s on two cores, from a file of {} bytes that is decoded "
        "in that time, at {} %",
        "cifar-half-second",
        lambda d: [d["claims"][i]["value"] for i in (2, 0, 1)],
    ),
    (
        "README.md",
        "one image alone takes {} microseconds on one core, the dense network in onnxruntime {}, "
        "in eight bits {}",
        "cifar-half-second",
        lambda d: [
            d["single"]["microseconds"][n] for n in ("gossamer", "onnxruntime", "onnxruntime-int8")
        ],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "a file of {} bytes; decoded, bound and run on two cores it answers the 10,000 test images "
        "in {} s (imports not counted; the whole process takes {} s), {} % of them right",
        "cifar-half-second",
        lambda d: [
            d["claims"][0]["value"],
            d["claims"][2]["value"],
            min(row["process"] for row in d["whole"]["batches"].values()),
            d["claims"][1]["value"],
        ],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "An image alone takes {} microseconds on one core; of the dense network {} in onnxruntime, "
        "{} in its eight bits.",
        "cifar-half-second",
        lambda d: [
            d["single"]["microseconds"][n] for n in ("gossamer", "onnxruntime", "onnxruntime-int8")
        ],
    ),
    (
        "README.md",
        "after {} of the time for ResNet-20",
        "inference-cold-start",
        lambda d: [d["claims"][0]["value"]],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "LeNet-5, LeNet-300-100 and AlexNet comes after {}, {}, {} and {} of onnxruntime's time",
        "inference-cold-start",
        lambda d: [c["value"] for c in d["claims"]],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "{} tokens a second where onnxruntime gives {} of the dense one, and half sparse in 4 bits "
        "{};",
        "inference-tokens",
        lambda d: [
            d["networks"]["4 layers of 256"]["tokens_per_second"][form][engine]
            for form, engine in (
                ("ternary", "gossamer"),
                ("dense", "onnxruntime"),
                ("grid", "gossamer"),
            )
        ],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "no cache holds, {} where the best float32 engine gives {}, and the best dense int8 engine "
        "{}.",
        "inference-tokens",
        lambda d: _large(d["networks"]["4 layers of 768"]["tokens_per_second"]),
    ),
    (
        "docs/methods/sparse-kernels.md",
        "On {} networks, dense ones among them, `auto` is at least {} % faster",
        "inference-auto",
        lambda d: [len(d["networks"]), -100 * d["claims"][0]["value"]],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "2048 x 2048 in {} ms, where bitnet.cpp publishes {} on an AMD EPYC 7V13; {} times "
        "llama.cpp's TQ2_0 on the same machine, 4096 x 9216 {} times it and {} times the best "
        "dense int8, and with weights out of cache {}, {} and {} times",
        "inference-ternary",
        lambda d: [
            d["claims"][0]["value"],
            0.058,
            *(d["claims"][i]["value"] for i in (1, 3, 5, 2, 4, 6)),
        ],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "a relative error of {} against {} at 2048 x 2048",
        "inference-ternary",
        lambda d: [
            d["products"]["2048 x 2048"]["error"][name] for name in ("ggml TQ2_0", "ternary")
        ],
    ),
    (
        "docs/methods/sparse-kernels.md",
        "and {} of {} fall short",
        "inference-layers",
        lambda d: [sum(not c["holds"] for c in d["claims"]), len(d["claims"])],
    ),
]
