"""A convolution's weight as taps: what is not zero, in blocks of input channels.

A tap is a value and its place in its block; rows are ordered by how many taps they have, so that
the loops over them are as long as the ones before (``native/sparse_conv.h``). Taps are made from
the entries that are not zero: time and memory are theirs, not those of the dense weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.arrays import (
    Packed,
    array,
    frozen,
    pair,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CHUNK", "ELEMENTS", "SparseConv", "moved", "pack_taps", "paddings"]

# What 32 bits of the input are: a float, four channels of seven bits, or two of 16 bits.
ELEMENTS = ("float32", "quads", "pairs")
CHUNK = 128  # rows that are ordered by their number of taps
_CACHE = 36 << 10  # bytes of copies of one block for one register tile, a little over a first level
_FULL = 0.8  # density from which zeros are taps as well
_TILE = (14, 14 * 48 * 1.3)  # vectors of a register tile; bytes of its copies, a kernel column


class SparseConv(Packed):
    """A packed weight and the geometry of its convolution.

    Attributes:
        shape: (output channels, input channels of a group, kernel height, kernel width).
        stride, padding, dilation: of height and width. ``padding`` has (top, left, bottom, right).
        groups: of channels.
        element: one of :data:`ELEMENTS`.
        block: planes (channels, quads or pairs of channels) in a block.
        starts: int32, (groups * blocks * (rows + 1)): where the taps of a row begin.
        order: int32, (groups * blocks * rows): the row at each position of a block.
        taps: uint16: (plane in its block * kernel height + y) * kernel width + x.
        values: uint32: the bits of each tap's float, four bytes or two 16-bit weights.

    Raises :class:`ArgumentError` where the parts do not fit together.
    """

    shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    element: str
    block: int
    starts: NDArray[np.int32]
    order: NDArray[np.int32]
    taps: NDArray[np.uint16]
    values: NDArray[np.uint32]

    def check(self) -> None:
        """Check that parts fit."""
        one_of("element", self.element, ELEMENTS)
        if min(self.shape) < 1 or self.groups < 1 or self.shape[0] % self.groups:
            raise ArgumentError(f"groups={self.groups} does not divide {self.shape[0]} channels")
        if self.block < 1 or self.block * self.shape[2] * self.shape[3] > 65536:
            raise ArgumentError(f"block={self.block} must be 1 to 65536 taps of {self.shape}")
        panels = self.groups * self.blocks
        array("starts", self.starts, np.int32, [panels * (self.rows + 1)])
        array("order", self.order, np.int32, [panels * self.rows])
        array("taps", self.taps, np.uint16, [None])
        array("values", self.values, np.uint32, [len(self.taps)])
        if not np.array_equal(
            np.sort(self.order.reshape(panels, self.rows), axis=1),
            np.broadcast_to(np.arange(self.rows), (panels, self.rows)),
        ):
            raise ArgumentError("order must hold every row once in each block")

    @property
    def rows(self) -> int:
        """Output channels of a group."""
        return self.shape[0] // self.groups

    @property
    def planes(self) -> int:
        """Channels, quads or pairs of channels that a group reads."""
        return -(-self.shape[1] // _PER[self.element])

    @property
    def blocks(self) -> int:
        """Blocks of planes in a group."""
        return -(-self.planes // self.block)

    @property
    def nbytes(self) -> int:
        """Bytes that the kernel reads of the weight."""
        return sum(a.nbytes for a in (self.starts, self.order, self.taps, self.values))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output; :class:`ArgumentError` where the kernel does not fit."""
        return _output_size(
            (height, width), self.shape[2:], self.stride, self.padding, self.dilation
        )

    @cached_property
    def dense(self) -> NDArray[Any]:
        """The weight, (output channels, channels of a group, height, width): float32 or int16."""
        kh, kw = self.shape[2:]
        counts = np.diff(self.starts.reshape(-1, self.rows + 1), axis=1).reshape(-1)
        at = np.repeat(np.arange(counts.size), counts)  # position of each tap
        panel, row = at // self.rows, self.order[at]
        plane = panel % self.blocks * self.block + self.taps // (kh * kw)
        y, x = self.taps // kw % kh, self.taps % kw
        channel = panel // self.blocks * self.rows + row
        per = _PER[self.element]
        kind: Any = {1: np.float32, 2: np.int16, 4: np.int8}[per]
        full = np.zeros((self.shape[0], self.planes, kh, kw, per), kind)
        full[channel, plane, y, x] = self.values.view(kind).reshape(-1, per)
        full = full.transpose(0, 1, 4, 2, 3).reshape(self.shape[0], -1, kh, kw)[:, : self.shape[1]]
        return frozen(full if per == 1 else full.astype(np.int16))


_PER = {"float32": 1, "quads": 4, "pairs": 2}  # channels of a plane


def block_of(
    planes: int, kh: int, kw: int, density: float, tile: tuple[float, float] | None = None
) -> int:
    """Planes of a block: copies for a register tile that about stay in the first-level cache.

    Few taps take more, from the second level: sums that go in and out of registers for a few taps
    cost more than that. ``tile``: its vectors, and bytes of its copies of a plane, where the map is
    known.
    """
    vectors, copies = tile or (_TILE[0], _TILE[1] * kw)
    fit = _CACHE / copies
    wanted = (6 + 60 / vectors) / max(density * kh * kw, 1e-9)  # taps of a row in a block
    block = round(min(max(fit, wanted), 4 * fit))
    return max(1, min(planes, block, 65536 // (kh * kw)))


def _output_size(
    image: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    top, left, bottom, right = padding
    tall, wide = (kernel_size[0] - 1) * dilation[0] + 1, (kernel_size[1] - 1) * dilation[1] + 1
    down, across = image[0] + top + bottom - tall, image[1] + left + right - wide
    if down < 0 or across < 0:
        raise ArgumentError(
            f"an input of {image[0]} x {image[1]} is smaller than the kernel's {tall} x {wide} "
            f"after padding {tuple(padding)}"
        )
    return down // stride[0] + 1, across // stride[1] + 1


def _tile(
    rows: int, kernel_size: Sequence[int], geometry: Mapping[str, Any], image: Sequence[int]
) -> tuple[float, float] | None:
    """This processor's register tile, as :func:`block_of` takes it; None without the kernels."""
    module = kernel("sparse_conv")
    if module is None:
        return None
    (sy, sx), (dy, _) = geometry["stride"], geometry["dilation"]
    oh, ow = _output_size(image, kernel_size, **geometry)
    if max(kernel_size) == sy == sx == 1 and (oh, ow) == tuple(image):
        oh, ow = 1, oh * ow  # one long row
    vectors, copies = module.tile(rows, *kernel_size, oh, ow, sy, dy)
    return float(vectors), float(copies)


def pack_taps(
    places: NDArray[np.integer[Any]],
    bits: NDArray[np.uint32],
    count: int,
    shape: tuple[int, int, int, int],
    element: str,
    groups: int,
    geometry: Mapping[str, Any],
    block: int | None = None,
    image: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Geometry and arrays of a :class:`SparseConv`.

    Raises :class:`ArgumentError` for blocks that no tap's 16 bits number.

    Args:
        places: ascending: the taps among (output channels, planes, height, width), flat.
        bits: uint32, of each tap.
        count: planes: channels of a group, or its quads or pairs of channels.
        shape: of the dense weight.
        geometry: stride, padding and dilation, as given.
        block: planes in a block; None for a rule.
        image: height and width of the inputs, where they are known: for the rule.
    """
    rows, (kh, kw) = shape[0] // groups, shape[2:]
    geometry = {
        "stride": pair("stride", geometry["stride"], 1),
        "padding": paddings(geometry["padding"]),
        "dilation": pair("dilation", geometry["dilation"], 1),
    }
    size = shape[0] * count * kh * kw
    density = len(places) / size
    if block is None:
        tile = _tile(rows, (kh, kw), geometry, image) if image is not None else None
        block = block_of(count, kh, kw, density, tile)
    if block < 1 or block * kh * kw > 65536:
        raise ArgumentError(f"block={block} must be 1 to 65536 taps of {shape}")
    if density > _FULL:  # rows of the same taps share what they load
        every = np.zeros(size, np.uint32)
        every[places] = bits
        places, bits = np.arange(size), every
    if len(places) >= 2**31:
        raise ArgumentError(f"{len(places)} taps are more than 2^31 - 1")
    blocks = -(-count // block)
    # a channel's taps in a block are neighbours in ``places``: whole pieces are moved
    lows = np.add.outer(np.arange(shape[0]) * count, np.arange(blocks) * block).reshape(-1)
    lows = (lows * (kh * kw)).astype(places.dtype)
    ends = np.append(np.searchsorted(places, lows), len(places))
    counts = np.diff(ends)
    panels = counts.reshape(groups, rows, blocks).transpose(0, 2, 1).reshape(-1, rows)
    if rows > CHUNK:
        order = np.lexsort((panels, np.broadcast_to(np.arange(rows) // CHUNK, panels.shape)), 1)
    else:
        order = panels.argsort(1, kind="stable")
    at = order + np.arange(0, panels.size, rows)[:, None]
    starts = np.zeros((len(panels), rows + 1), np.int64)
    panels.reshape(-1)[at].cumsum(1, out=starts[:, 1:])
    starts[1:] += starts[:-1, -1].cumsum()[:, None]
    begins = np.empty(panels.size, np.int64)  # of a panel's row, among the taps
    begins[at] = starts[:, :-1]
    begins = begins.reshape(groups, blocks, rows).transpose(0, 2, 1).reshape(-1)
    to = moved(counts, begins)
    taps, values = np.empty(len(to), np.uint16), np.empty(len(to), np.uint32)
    taps[to], values[to] = places - lows.repeat(counts), bits
    return {
        **geometry,
        "shape": shape,
        "groups": groups,
        "element": element,
        "block": block,
        "starts": frozen(starts.reshape(-1).astype(np.int32)),
        "order": frozen(order.reshape(-1).astype(np.int32)),
        "taps": frozen(taps),
        "values": frozen(values),
    }


def moved(counts: NDArray[np.integer[Any]], begins: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Where each of a row of entries goes whose pieces are moved as they are.

    Args:
        counts: how many entries each piece has; one piece lies behind the other.
        begins: where each piece begins afterwards.

    >>> moved(np.array([2, 0, 3]), np.array([3, 5, 0]))
    array([3, 4, 0, 1, 2])
    """
    found: NDArray[np.int64] = (begins - (counts.cumsum() - counts)).repeat(counts)
    found += np.arange(len(found))
    return found


def paddings(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) from one, two or four numbers."""
    if isinstance(padding, Sequence) and len(padding) == 4:
        return pair("padding", padding[:2], 0) + pair("padding", padding[2:], 0)
    return pair("padding", padding, 0) * 2
