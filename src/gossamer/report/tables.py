"""Figures of a compressed network, layer by layer: the rows of run.json and of every table.

The columns of Deep Compression's tables (Han, Mao, Dally, ICLR 2016, tables 2-5) are computed
from the values alone: fixed-width differences with filler zeros, Huffman codes over both streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.codebook import Quantized
from gossamer.pack.gaps import fixed_gaps
from gossamer.pack.huffman import code_lengths

__all__ = ["first_layer_image", "layer_rows", "mask_image", "paper_columns", "paper_table"]

# Beyond this many distinct values a tensor is not shared, and its histogram says nothing.
_MOST_VALUES = 1024


def _huffman_bits(histogram: NDArray[np.int64]) -> float:
    return float((code_lengths(histogram) * histogram).sum())


def _entropy(histogram: NDArray[np.int64]) -> float:
    """Bits a symbol."""
    counts = histogram[histogram > 0].astype(np.float64)
    return (
        float((counts * np.log2(counts.sum() / counts)).sum() / counts.sum())
        if len(counts)
        else 0.0
    )


def paper_columns(
    codes: NDArray[np.integer], *, index_bits: int = 5, biases: int = 0
) -> dict[str, float]:
    """One layer's columns of the published tables.

    Args:
        codes: the layer's codes in C order, 0 for a removed weight.
        index_bits: bits of a position difference; a longer one takes filler zeros.
        biases: float32 biases, in the reference and in the compressed size alike, as published.

    Returns weights, kept_percent, weight_bits (fixed width), weight_bits_huffman, index_bits,
    index_bits_huffman, weight_entropy, index_entropy (bits per stored entry), rate_pq_percent and
    rate_pqh_percent (compressed bits over reference bits; code book and fillers included, for
    Huffman its table, one byte a symbol, too).

    >>> columns = paper_columns(np.array([0, 1, 0, 0, 2, 1, 0, 0]), index_bits=2)
    >>> columns["kept_percent"], columns["weight_bits"]
    (37.5, 2)
    """
    flat = np.asarray(codes).reshape(-1)
    positions = np.flatnonzero(flat)
    gaps, fillers = fixed_gaps(positions, index_bits)
    stored = np.zeros(len(gaps), np.int64)  # a filler stores code 0
    stored[np.setdiff1d(np.arange(len(gaps)), fillers)] = flat[positions]
    entries = int(flat.max(initial=0)) + 1
    width = max(1, math.ceil(math.log2(max(2, entries))))
    used, wide = np.bincount(stored, minlength=1), np.bincount(gaps, minlength=1)
    book = 32 * len(np.unique(flat[positions]))
    reference = 32 * (len(flat) + biases)
    fixed = len(gaps) * (width + index_bits) + book + 32 * biases
    weight_bits = _huffman_bits(used) if len(gaps) else 0.0
    gap_bits = _huffman_bits(wide) if len(gaps) else 0.0
    tables = 8 * (np.count_nonzero(used) + np.count_nonzero(wide))
    huffman = weight_bits + gap_bits + tables + book + 32 * biases
    count = max(1, len(gaps))
    return {
        "weights": len(flat),
        "kept_percent": 100 * len(positions) / max(1, len(flat)),
        "weight_bits": width,
        "weight_bits_huffman": weight_bits / count,
        "index_bits": index_bits,
        "index_bits_huffman": gap_bits / count,
        "weight_entropy": _entropy(used),
        "index_entropy": _entropy(wide),
        "rate_pq_percent": 100 * fixed / max(1, reference),
        "rate_pqh_percent": 100 * huffman / max(1, reference),
    }


def layer_rows(
    rows: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], *, index_bits: int = 5
) -> list[dict[str, Any]]:
    """The ``layers`` of run.json from an archive's rows and its decoded tensors.

    Weights with few distinct values get their code book, its histogram and the paper's columns,
    a bias of the same layer counted with them.
    """
    layers = []
    for row in rows:
        name = str(row["name"])
        value = tensors[name]
        layer: dict[str, Any] = {
            "name": name,
            "shape": list(row["shape"]),
            "numel": row["numel"],
            "kept": row["nonzeros"],
            "density": row["density"],
            "distinct": row["distinct"],
            "codec": row["codec"],
            "bytes": row["bytes"],
            "parts": dict(row["parts"]),
            "bits_per_weight": row["bits_per_weight"],
            "codebook": [],
            "histogram": [],
            "paper": None,
        }
        shared = 1 < row["distinct"] <= _MOST_VALUES and value.is_floating_point()
        if shared and value.ndim >= 2 and not row["tied_to"]:
            quantized = Quantized.of(value.float())
            codes = quantized.codes.numpy().reshape(-1)
            layer["codebook"] = quantized.codebook.tolist()
            layer["histogram"] = np.bincount(codes, minlength=quantized.codebook.numel()).tolist()
            bias = tensors.get(name.removesuffix("weight") + "bias")
            layer["paper"] = paper_columns(
                codes, index_bits=index_bits, biases=0 if bias is None else bias.numel()
            )
        layers.append(layer)
    return layers


def mask_image(weight: Tensor, shape: tuple[int, int]) -> dict[str, Any]:
    """How many of the outputs keep each input: the picture of a first layer's mask.

    ``weight``: ``(out, in)`` with ``in`` a multiple of ``h * w`` (channels are summed).
    """
    kept = (weight != 0).sum(0).reshape(-1, *shape).sum(0)
    return {"shape": list(shape), "counts": kept.tolist(), "out": int(weight.shape[0])}


def first_layer_image(
    tensors: Mapping[str, Tensor], in_shape: tuple[int, ...] | None
) -> dict[str, Any] | None:
    """The picture of the first linear layer that reads the image; None where none does."""
    if in_shape is None or len(in_shape) != 3:
        return None
    pixels = math.prod(in_shape)
    for name, value in tensors.items():
        if value.ndim == 2 and value.shape[1] == pixels and torch.count_nonzero(value == 0):
            return {"name": name, **mask_image(value, (in_shape[1], in_shape[2]))}
        if value.ndim >= 2:
            return None
    return None


_HEADER = (
    "layer", "weights", "kept %", "bits (P+Q)", "bits (P+Q+H)", "index (P+Q)", "index (P+Q+H)",
    "rate % (P+Q)", "rate % (P+Q+H)",
)  # fmt: skip


def paper_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """The published table as Markdown, its total row weighted by the layers' weights."""
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + " --- |" * len(_HEADER)]
    told = [(layer["name"], layer["paper"]) for layer in layers if layer.get("paper")]
    for name, p in told:
        lines.append(
            f"| {name} | {p['weights']:,} | {p['kept_percent']:.1f} | {p['weight_bits']} | "
            f"{p['weight_bits_huffman']:.1f} | {p['index_bits']} | {p['index_bits_huffman']:.1f} | "
            f"{p['rate_pq_percent']:.2f} | {p['rate_pqh_percent']:.2f} |"
        )
    total = sum(p["weights"] for _, p in told)
    if total:
        mean = {
            key: sum(p[key] * p["weights"] for _, p in told) / total
            for key in ("kept_percent", "rate_pq_percent", "rate_pqh_percent")
        }
        lines.append(
            f"| total | {total:,} | {mean['kept_percent']:.1f} | | | | | "
            f"{mean['rate_pq_percent']:.2f} | {mean['rate_pqh_percent']:.2f} |"
        )
    return "\n".join(lines)
