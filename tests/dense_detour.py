"""Packing by way of the dense weight, slowly and plainly: the oracle of packing from entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import ArgumentError
from gossamer.runtime.kernels.arrays import dot_products, frozen, pair
from gossamer.runtime.kernels.conv import SparseConv
from gossamer.runtime.kernels.gemv import SparseRows
from gossamer.runtime.kernels.gemv_int8 import WIDTHS, SparseBytes
from gossamer.runtime.kernels.taps import _FULL, CHUNK, _tile, block_of, paddings

__all__ = ["conv", "conv_codes", "row_codes", "rows"]

_LANES = 16


def conv(weight: NDArray[np.float32], **settings: Any) -> SparseConv:
    """As ``pack_conv``."""
    geometry, groups = _settings(settings)
    bits = weight.view(np.uint32)
    return SparseConv(
        **_taps(weight != 0, bits, weight.shape, "float32", groups, geometry, **settings)
    )


def _settings(settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    geometry = {
        name: settings.pop(name, default)
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    return geometry, settings.pop("groups", 1)


def rows(weight: NDArray[np.float32]) -> SparseRows:
    """As ``pack_rows``."""
    row, column = np.nonzero(weight)
    starts = np.searchsorted(row, np.arange(len(weight) + 1)).astype(np.int32)
    return SparseRows(weight.shape, starts, column.astype(np.uint16), weight[row, column])


def row_codes(codes: NDArray[np.int8], width: int | None = None) -> SparseBytes:
    """As ``gemv_int8.pack_codes``."""
    return _packed(codes, np.ones(len(codes)), codes != 0, codes.view(np.uint8), None, width)


def conv_codes(codes: NDArray[np.int8], element: str, **settings: Any) -> SparseConv:
    """As ``conv_int8.pack_codes``."""
    geometry, groups = _settings(settings)
    m, c = codes.shape[:2]
    if groups > 1 and (c % 4 or (m // groups) % 4):
        apart = np.zeros((groups, m // groups, groups, *codes.shape[1:]), np.int8)
        each = np.arange(groups)
        apart[each, :, each] = codes.reshape(groups, -1, *codes.shape[1:])
        codes, c, groups = apart.reshape(m, groups * c, *codes.shape[2:]), groups * c, 1
    full = np.zeros((m, -(-c // 4) * 4, *codes.shape[2:]), np.int8)
    full[:, :c] = codes
    if element == "auto":
        element = _cheaper(full)
    per = {"quads": 4, "pairs": 2}[element]
    last = full.reshape(m, -1, per, *full.shape[2:]).transpose(0, 1, 3, 4, 2)
    kind: Any = {4: np.int8, 2: np.int16}[per]
    bits = np.ascontiguousarray(last.astype(kind)).view(np.uint32)[..., 0]
    count = -(-c // per)
    shape: tuple[int, int, int, int] = (m, c, *codes.shape[2:])
    mask, planes = (bits != 0)[:, :count], bits[:, :count]
    return SparseConv(**_taps(mask, planes, shape, element, groups, geometry, **settings))


def _cheaper(codes: NDArray[np.int8]) -> str:
    """``quads`` or ``pairs``: without VNNI a quad takes about 1.45 times as long (Zen 3)."""
    live = codes.reshape(len(codes), -1, 2, *codes.shape[2:]).any(axis=2)
    pairs = int(live.sum())
    quads = int(live.reshape(len(codes), -1, 2, *codes.shape[2:]).any(axis=2).sum())
    cost = 1 if dot_products() else 1.45
    return "quads" if cost * quads <= pairs else "pairs"


def _taps(
    planes: NDArray[Any],
    values: NDArray[np.uint32],
    shape: tuple[int, int, int, int],
    element: str,
    groups: int,
    geometry: Mapping[str, Any],
    block: int | None = None,
    image: Sequence[int] | None = None,
) -> dict[str, Any]:
    rows, count, (kh, kw) = shape[0] // groups, planes.shape[1], shape[2:]
    geometry = {
        "stride": pair("stride", geometry["stride"], 1),
        "padding": paddings(geometry["padding"]),
        "dilation": pair("dilation", geometry["dilation"], 1),
    }
    if block is None:
        tile = _tile(rows, (kh, kw), geometry, image) if image is not None else None
        block = block_of(count, kh, kw, float(planes.mean()), tile)
    if float(planes.mean()) > _FULL:  # rows of the same taps share what they load
        planes = np.ones_like(planes)
    blocks = -(-count // block)
    channel, plane, y, x = np.nonzero(planes)
    taps = (plane % block * kh + y) * kw + x
    panel = channel // rows * blocks + plane // block
    row = channel % rows
    counts = np.bincount(panel * rows + row, minlength=groups * blocks * rows)
    counts = counts.reshape(-1, rows)
    chunk = np.broadcast_to(np.arange(rows) // CHUNK, counts.shape)
    order = np.lexsort((counts, chunk), axis=1)
    position = np.argsort(order, axis=1)[panel, row]
    sort = np.lexsort((taps, position, panel))
    starts = np.zeros((len(counts), rows + 1), np.int64)
    np.cumsum(np.take_along_axis(counts, order, 1), axis=1, out=starts[:, 1:])
    starts[1:] += np.cumsum(starts[:-1, -1])[:, None]
    if len(taps) >= 2**31:
        raise ArgumentError(f"{len(taps)} taps are more than 2^31 - 1")
    return {
        **geometry,
        "shape": shape,
        "groups": groups,
        "element": element,
        "block": block,
        "starts": frozen(starts.reshape(-1).astype(np.int32)),
        "order": frozen(order.reshape(-1).astype(np.int32)),
        "taps": frozen(taps[sort].astype(np.uint16)),
        "values": frozen(values[planes][sort]),
    }


def _packed(
    codes: NDArray[np.int8],
    scale: NDArray[Any],
    live: NDArray[np.bool_],
    slots: NDArray[np.uint8],
    book: NDArray[np.int8] | None,
    width: int | None,
) -> SparseBytes:
    outputs, inputs = codes.shape
    if width is None:
        density = float(live.mean())
        width = 128 if dot_products() or density < 0.15 else 64 if density < 0.35 else 32
    elif width not in WIDTHS:
        raise ArgumentError(f"width={width} is not one of {WIDTHS}")
    groups, blocks = -(-outputs // _LANES), -(-inputs // width)
    order = np.full(groups * _LANES, -1, np.int32)
    order[:outputs] = np.argsort(-live.sum(axis=1), kind="stable")
    place = np.empty(outputs, np.int64)  # of a row
    place[order[:outputs]] = np.arange(outputs)
    row, column = np.nonzero(live[order[:outputs]])
    block = column // width
    counts = np.bincount(row * blocks + block, minlength=groups * _LANES * blocks)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    k = np.arange(len(row)) - first[row * blocks + block]  # of its row and block
    most = counts.reshape(groups, _LANES, blocks).max(axis=1).T  # (blocks, groups)
    steps = -(-most // 4)
    if book is not None:
        steps += steps % 2
    starts = np.concatenate([[0], np.cumsum(steps.reshape(-1))])
    at = starts[block * groups + row // _LANES] + k // 4, row % _LANES, k % 4
    index = np.zeros((int(starts[-1]), _LANES, 4), np.uint8)
    value = np.zeros_like(index)
    index[at] = column % width
    value[at] = slots[order[row], column]
    if book is None:
        data = np.stack([index, value], axis=1)
    else:
        twos = value.reshape(-1, 2, _LANES, 4)
        packed = twos[:, 0] | twos[:, 1] << 4
        data = np.concatenate([index.reshape(-1, 2, _LANES, 4), packed[:, None]], axis=1)
    return SparseBytes(
        shape=(outputs, inputs),
        width=width,
        starts=frozen(starts.astype(np.int32)),
        data=frozen(data.reshape(-1)),
        book=None if book is None else frozen(book),
        order=frozen(order),
        scale=frozen(scale.astype(np.float32)),
        sums=frozen(codes.sum(axis=1, dtype=np.int32)),
    )
