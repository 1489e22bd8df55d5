"""The `.net` files published with Deep Compression, read and written byte for byte.

S. Han, H. Mao, W. J. Dally, "Deep Compression: Compressing Deep Neural Networks with Pruning,
Trained Quantization and Huffman Coding", ICLR 2016; the layout of the released AlexNet model.
Little-endian, without magic number or shapes: layers come in the network's own order, shapes from
the network. First the stored entries of every layer (uint32, fillers included); then per layer
the code book (float32, 2^b entries; b is 8 for convolutions, 4 for the rest), the bias (float32),
the codes (b bits each), and the 4-bit gaps; nibbles low first. Nothing is Huffman coded. A filler
is gap 15 with code 0, and advances by 16. The reference reader checks no bounds; this one does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.core.files import write_chunks
from gossamer.core.names import Tensors
from gossamer.pack.coders.gaps import fixed_gaps, fixed_runs
from gossamer.pack.coders.limits import MAX_BYTES, Reader

__all__ = ["NetLayer", "net_tensors", "read_net", "write_net"]


@dataclass(frozen=True, eq=False)
class NetLayer:
    """One layer as it is stored.

    Attributes:
        name: of the layer.
        shape: of its weight, ``(out, in)`` or ``(out, in, kh, kw)``.
        codebook: float32 ``(2**bits,)``; entry 0 is zero.
        bias: float32 ``(out,)``.
        codes: uint8, one per stored entry.
        gaps: uint8 below 16, entries skipped before each stored one.
    """

    name: str
    shape: tuple[int, ...]
    codebook: NDArray[np.float32]
    bias: NDArray[np.float32]
    codes: NDArray[np.uint8]
    gaps: NDArray[np.uint8]

    @property
    def bits(self) -> int:
        """Bits of a code: 8 for convolutions, 4 for the rest."""
        return _code_bits(self.shape)

    def weight(self) -> Tensor:
        """The dense weight, float32."""
        flat = np.zeros(int(np.prod(self.shape)), np.float32)
        for first, place in fixed_runs(self.gaps, len(flat)):
            flat[place] = self.codebook[self.codes[first : first + len(place)]]
        return torch.from_numpy(flat).reshape(self.shape)

    @classmethod
    def of(cls, name: str, weight: Tensor, bias: Tensor | None = None) -> NetLayer:
        """Code a pruned and shared weight.

        Args:
            name: of the layer, for messages.
            weight: float32, at most 255 distinct non-zero values for a convolution, 15 otherwise.
            bias: float32 ``(out,)``; zeros when ``None``, since the layout has no layer without.

        Raises :class:`ArgumentError` for more values, another dtype or shape, or values that are
        not finite.
        """
        shape = tuple(weight.shape)
        size = 1 << _code_bits(shape)
        if weight.dtype != torch.float32 or len(shape) not in (2, 4) or weight.numel() == 0:
            raise ArgumentError(
                f"layer {name!r}: weight is {weight.dtype} of shape {shape}; a .net file holds "
                "float32 of shape (out, in) or (out, in, kh, kw)"
            )
        bias = torch.zeros(shape[0]) if bias is None else bias
        if bias.dtype != torch.float32 or tuple(bias.shape) != shape[:1]:
            raise ArgumentError(
                f"layer {name!r}: bias is {bias.dtype} of shape {tuple(bias.shape)}, "
                f"it must be float32 of shape {shape[:1]}"
            )
        flat = weight.detach().cpu().contiguous().reshape(-1).numpy()
        if not np.isfinite(flat).all() or not bool(bias.isfinite().all()):
            raise ArgumentError(f"layer {name!r}: weight or bias holds NaN or infinity")
        positions = np.flatnonzero(flat)
        values, index = np.unique(flat[positions], return_inverse=True)
        if len(values) >= size:
            raise ArgumentError(
                f"layer {name!r}: {len(values)} distinct non-zero weights, a .net file has room "
                f"for {size - 1}; share fewer values or use a .gsm file"
            )
        codebook = np.zeros(size, np.float32)
        codebook[1 : len(values) + 1] = values
        gaps, fillers = fixed_gaps(positions, 4)
        codes = np.zeros(len(gaps), np.uint8)
        codes[np.delete(np.arange(len(gaps)), fillers)] = index + 1
        plain = bias.detach().cpu().contiguous().numpy().astype("<f4")
        return cls(name, shape, codebook, plain, codes, gaps.astype(np.uint8))


def read_net(
    path: str | Path | bytes,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    max_bytes: int = MAX_BYTES,
) -> list[NetLayer]:
    """Read a ``.net`` file.

    Args:
        path: the file, or its bytes.
        shapes: layer name -> weight shape, for every layer, in the network's order.
        max_bytes: bound on the decoded weights.

    Raises :class:`FormatError` when the bytes do not fit the shapes, :class:`ArgumentError` for
    shapes that no ``.net`` file has.
    """
    for name, shape in shapes.items():
        if len(shape) not in (2, 4) or min(shape) < 1:
            raise ArgumentError(f"shapes[{name!r}] is {shape}; pass (out, in) or (out, in, kh, kw)")
    total = 4 * sum(int(np.prod(s)) for s in shapes.values())
    if total > max_bytes:
        raise ArgumentError(f"shapes hold {total} bytes of weights, max_bytes is {max_bytes}")
    data = path if isinstance(path, bytes) else Path(path).read_bytes()
    reader = Reader(data, "archive" if isinstance(path, bytes) else str(path))
    counts = np.frombuffer(reader.take(4 * len(shapes), "entry counts"), "<u4")
    layers: list[NetLayer] = []
    for (name, shape), count in zip(shapes.items(), counts.tolist(), strict=True):
        what, numel, bits = f"layer {name!r}", int(np.prod(shape)), _code_bits(shape)
        if count > numel:
            raise reader.fail(f"{what} stores {count} entries of {numel} weights")
        codebook = np.frombuffer(reader.take(4 << bits, f"{what} code book"), "<f4")
        if codebook[0] != 0:
            raise reader.fail(f"{what}: code book entry 0 is {codebook[0]}, it must be 0")
        bias = np.frombuffer(reader.take(4 * shape[0], f"{what} bias"), "<f4")
        codes = _unpack(reader, count, bits, f"{what} codes")
        gaps = _unpack(reader, count, 4, f"{what} gaps")
        reached = int(gaps.sum(dtype=np.int64)) + count
        if reached > numel:
            raise reader.fail(f"{what}: gaps lead to entry {reached - 1} of {numel}")
        layers.append(NetLayer(name, tuple(shape), codebook.copy(), bias.copy(), codes, gaps))
    reader.done()
    return layers


def write_net(path: str | Path, layers: Sequence[NetLayer]) -> int:
    """Write layers in the published layout, atomically; returns the file's bytes."""
    chunks = [np.array([len(layer.codes) for layer in layers], "<u4").tobytes()]
    for layer in layers:
        chunks += [layer.codebook.astype("<f4").tobytes(), layer.bias.astype("<f4").tobytes()]
        chunks += [_pack(layer.codes, layer.bits), _pack(layer.gaps, 4)]
    write_chunks(path, chunks)
    return sum(len(c) for c in chunks)


def net_tensors(layers: Sequence[NetLayer]) -> Tensors:
    """``NAME.weight`` and ``NAME.bias`` of every layer."""
    out: Tensors = {}
    for layer in layers:
        out[f"{layer.name}.weight"] = layer.weight()
        out[f"{layer.name}.bias"] = torch.from_numpy(layer.bias.astype(np.float32))
    return out


def _code_bits(shape: tuple[int, ...]) -> int:
    return 8 if len(shape) == 4 else 4


def _unpack(reader: Reader, count: int, bits: int, what: str) -> NDArray[np.uint8]:
    if bits == 8:
        return np.frombuffer(reader.take(count, what), np.uint8).copy()
    data = np.frombuffer(reader.take((count + 1) // 2, what), np.uint8)
    return np.stack([data & 15, data >> 4], axis=1).reshape(-1)[:count]


def _pack(symbols: NDArray[np.uint8], bits: int) -> bytes:
    if bits == 8:
        return symbols.tobytes()
    even = np.append(symbols, np.zeros(len(symbols) % 2, np.uint8))
    return (even[::2] | even[1::2] << 4).astype(np.uint8).tobytes()
