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

from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError
from gossamer.pack.coders.gaps import fixed_gaps
from gossamer.pack.coders.huffman import code_lengths

__all__ = [
    "LAYER_HEADER",
    "PAPER_HEADER",
    "first_layer_image",
    "layer_name",
    "layer_rows",
    "layer_table",
    "markdown",
    "mask_image",
    "paper_columns",
    "paper_rows",
    "paper_table",
    "tensor_rows",
]

# Beyond this many distinct values a tensor is not shared, and its histogram says nothing.
_MOST_VALUES = 1024


def _huffman_bits(histogram: NDArray[np.int64]) -> int:
    return int((code_lengths(histogram) * histogram).sum()) if histogram.any() else 0


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
        codes: the layer's codes, 0 for a removed weight; any shape, in C order.
        index_bits: bits of a position difference; a longer one takes filler zeros.
        biases: float32 biases, in the reference and in the compressed size alike, as published.

    Returns ``weights``, ``biases``, ``entries`` (stored ones: kept weights and fillers),
    ``fillers``, ``kept_percent``; bits of a stored entry: ``weight_bits`` and ``index_bits``
    (fixed width), ``weight_bits_huffman`` and ``index_bits_huffman`` (mean code lengths),
    ``weight_entropy`` and ``index_entropy``; ``rate_pq_percent`` and ``rate_pqh_percent``, the
    compressed bits over the reference's, with code book, fillers and biases, and for Huffman its
    tables too (a byte a symbol that occurs).

    Raises :class:`ArgumentError` for negative codes or ``index_bits`` outside 1 to 16.

    >>> columns = paper_columns(np.array([0, 1, 0, 0, 2, 1, 0, 0]), index_bits=2)
    >>> columns["kept_percent"], columns["weight_bits"], columns["rate_pqh_percent"]
    (37.5, 2, 43.75)
    """
    flat = np.asarray(codes).reshape(-1)
    if len(flat) and int(flat.min()) < 0:
        raise ArgumentError(f"codes must be 0 (removed) or more, got {int(flat.min())}")
    positions = np.flatnonzero(flat)
    gaps, fillers = fixed_gaps(positions, index_bits)
    real = np.ones(len(gaps), np.bool_)
    real[fillers] = False
    stored = np.zeros(len(gaps), np.int64)  # a filler stores code 0
    stored[real] = flat[positions]
    width = max(1, int(flat.max(initial=0)).bit_length())
    used, wide = np.bincount(stored, minlength=1), np.bincount(gaps, minlength=1)
    weight_bits, gap_bits = _huffman_bits(used), _huffman_bits(wide)
    always = 32 * (len(np.unique(flat[positions])) + biases)
    fixed = len(gaps) * (width + index_bits) + always
    tables = 8 * int(np.count_nonzero(used) + np.count_nonzero(wide))
    huffman = weight_bits + gap_bits + tables + always
    reference = max(1, 32 * (len(flat) + biases))
    count = max(1, len(gaps))
    return {
        "weights": len(flat),
        "biases": biases,
        "entries": len(gaps),
        "fillers": len(fillers),
        "kept_percent": 100 * len(positions) / max(1, len(flat)),
        "weight_bits": width,
        "weight_bits_huffman": weight_bits / count,
        "index_bits": index_bits,
        "index_bits_huffman": gap_bits / count,
        "weight_entropy": _entropy(used),
        "index_entropy": _entropy(wide),
        "rate_pq_percent": 100 * fixed / reference,
        "rate_pqh_percent": 100 * huffman / reference,
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
        # a mask of minus infinity has few values, and they are no code book of weights
        shared = shared and bool(torch.isfinite(value).all())
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

    Args:
        weight: ``(out, in)`` with ``in`` a multiple of ``h * w``; channels are summed.
        shape: ``(h, w)`` of the input.

    Returns ``shape``, ``counts`` (``h`` rows of ``w``) and ``out``, the largest possible count of
    one channel. Raises :class:`ArgumentError` when the weight does not fit the shape.

    >>> mask_image(torch.tensor([[0.5, 0.0, 1.0, 2.0], [0.0, 0.0, 3.0, 0.0]]), (2, 2))["counts"]
    [[1, 0], [2, 1]]
    """
    pixels = shape[0] * shape[1]
    if weight.ndim != 2 or pixels < 1 or weight.shape[1] == 0 or weight.shape[1] % pixels:
        raise ArgumentError(
            f"weight of shape {tuple(weight.shape)} does not read {shape[0]}x{shape[1]} pixels; "
            "it must be (out, channels * h * w)"
        )
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


PAPER_HEADER = (
    "Layer", "#Weights", "Weights % (P)", "Weight bits (P+Q)", "Weight bits (P+Q+H)",
    "Index bits (P+Q)", "Index bits (P+Q+H)", "Compress rate (P+Q)", "Compress rate (P+Q+H)",
)  # fmt: skip
"""The columns of Deep Compression's tables 2 to 5."""


def layer_name(layer: Mapping[str, Any]) -> str:
    """The layer of a weight: its name without ``.weight``."""
    return str(layer["name"]).removesuffix(".weight")


def paper_rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The published table as text, a row a layer that has its columns, and the total below.

    The total's rates are over all reference bits, its kept part over all weights, its bits over
    all stored entries, as if the layers were one.
    """
    told = [(layer_name(layer), layer["paper"]) for layer in layers if layer.get("paper")]
    if not told:
        return []
    rows = [_paper_row(name, p) for name, p in told]
    if len(told) > 1:
        rows.append(_paper_row("Total", _paper_total([p for _, p in told])))
    return rows


def _paper_row(name: str, p: Mapping[str, float]) -> list[str]:
    return [
        name,
        f"{p['weights']:,}",
        f"{p['kept_percent']:.1f} %",
        f"{p['weight_bits']:.3g}",
        f"{p['weight_bits_huffman']:.1f}",
        f"{p['index_bits']:.3g}",
        f"{p['index_bits_huffman']:.1f}",
        _rate(p["rate_pq_percent"]),
        _rate(p["rate_pqh_percent"]),
    ]


def _rate(percent: float) -> str:
    """As published: percent, and the factor in brackets."""
    return f"{percent:.2f} % ({100 / percent:.0f}×)" if percent > 0 else "0 %"


def _paper_total(told: Sequence[Mapping[str, float]]) -> dict[str, float]:
    weights = {
        "kept_percent": [p["weights"] for p in told],
        "rate": [p["weights"] + p.get("biases", 0) for p in told],
        "bits": [p.get("entries", p["weights"] * p["kept_percent"] / 100) for p in told],
    }
    total: dict[str, float] = {"weights": sum(p["weights"] for p in told)}
    for key in (k for k in told[0] if all(k in p for p in told)):
        by = weights.get(key) or weights.get(key.split("_")[0])
        if by is None and "_bits" in key:
            by = weights["bits"]
        if by is not None:
            total[key] = sum(w * p[key] for w, p in zip(by, told, strict=True)) / max(1, sum(by))
    return total


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, padded so that it reads well in a terminal too; numbers to the right.

    >>> print(markdown(["layer", "bytes"], [["ip1", "12"]]))
    | layer | bytes |
    | ----- | ----: |
    | ip1   |    12 |
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = [
        [
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]
    lines.insert(1, ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paper_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """The published table (see :func:`paper_rows`) as Markdown."""
    return markdown(PAPER_HEADER, paper_rows(layers))


LAYER_HEADER = (
    "Tensor", "Shape", "Values", "Density", "Distinct", "Coding", "Bytes", "Bits a value",
)  # fmt: skip
"""The columns of :func:`tensor_rows`."""


def tensor_rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What each tensor of the file is and takes, as text."""
    return [
        [
            str(layer["name"]),
            "×".join(map(str, layer["shape"])) or "scalar",
            f"{layer['numel']:,}",
            f"{100 * layer['density']:.1f} %",
            f"{layer['distinct']:,}",
            str(layer["codec"]),
            f"{layer['bytes']:,}",
            f"{layer['bits_per_weight']:.2f}",
        ]
        for layer in layers
    ]


def layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """The tensors of the file (see :func:`tensor_rows`) as Markdown."""
    return markdown(LAYER_HEADER, tensor_rows(layers))
