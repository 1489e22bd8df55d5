"""Networks of ternary weights as GGUF files, in llama.cpp's TQ2_0, read back before they are named.

A TQ2_0 block is 256 neighbours of a row: two bits each, -1, 0 or 1, and one scale in half
precision (ggml-common.h, ``block_tq2_0``), 2.0625 bits a weight. A weight goes in as it is or is
refused by name: it is never quantized here. Only scales change, by the rounding to half precision
(at most 2^-11 of themselves), which is stated. The file holds tensors and no graph: programs on
ggml read it, llama.cpp itself runs only the architectures that it knows.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.core.files import replacing
from gossamer.core.plain import copied, plain
from gossamer.runtime.sessions import needs

__all__ = ["BLOCK", "Written", "fault", "halved", "write"]

BLOCK = 256
"""Weights of a block."""
_ROUNDING = 2.0**-11  # of a value that half precision holds as a normal number
_DIMS, _NAME = 4, 63  # ggml's GGML_MAX_DIMS, and GGML_MAX_NAME without its end
_INTEGERS = {
    torch.bool: torch.int8, torch.uint8: torch.int16, torch.int8: torch.int8,
    torch.int16: torch.int16, torch.int32: torch.int32, torch.int64: torch.int64,
}  # fmt: skip
_WHY = "it makes .gguf files and reads them back"


@dataclass(frozen=True)
class Written:
    """What a file holds.

    Attributes:
        bytes: of the file. dense_bytes: of the network's tensors as they are.
        ternary: names of the tensors in TQ2_0.
        change: the largest change of a scale by half precision, as a fraction of it.
        notes: what else is to be said.
    """

    bytes: int
    dense_bytes: int
    ternary: tuple[str, ...]
    change: float
    notes: tuple[str, ...]


def fault(weight: NDArray[Any]) -> str | None:
    """Why TQ2_0 cannot hold a weight (..., width), in words; None: it can.

    Every block of 256 of a row must be ``scale * {-1, 0, 1}``, the scale within 2^-11 in half
    precision; so rows, and the whole, may have one scale.
    """
    if weight.ndim < 2 or not weight.size or weight.shape[-1] % BLOCK:
        size = weight.shape[-1] if weight.ndim else 0
        return f"rows of {size} values (its last dimension) are no multiple of {BLOCK}"
    if not np.isfinite(weight).all():
        return "it holds NaN or infinity"
    blocks = weight.reshape(-1, BLOCK)
    size = np.abs(blocks)
    scale = size.max(axis=1)
    mixed = ((blocks != 0) & (size != scale[:, None])).any(axis=1)
    if mixed.any():
        block = blocks[np.flatnonzero(mixed)[0]]
        up, down = np.unique(block[block > 0]), np.unique(-block[block < 0])
        if len(up) == len(down) == 1:
            return f"its scales differ: {up[0]:g} for positive weights, {down[0]:g} for negative"
        return f"it is not ternary: {len(np.unique(np.abs(block)))} magnitudes in {BLOCK} weights"
    half = halved(scale.astype(np.float32))  # as the file's writer does
    far = np.abs(half - scale) > _ROUNDING * scale
    if far.any():
        return f"its scale {scale[far][0]:g} is beyond half precision ({half[far][0]:g} there)"
    return None


def halved(values: NDArray[Any]) -> NDArray[np.float32]:
    """Values rounded to half precision; beyond it they are infinite."""
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16).astype(np.float32)


def write(model: nn.Module, path: str | Path, *, exclude: Iterable[str] | None = None) -> Written:
    """Write a network's tensors, its compressible weights in TQ2_0; the file is read back first.

    Other tensors are float32, or float16 where they have two or more dimensions and that is
    exact; integers keep their width. A tied tensor is written once; ``gossamer.tied`` in the
    file's metadata says ``alias=name``.

    Args:
        model: left as it is; wrappers and derived weights are taken off a copy.
        exclude: patterns of weights (:func:`gossamer.core.names.select`) that need not be ternary.

    Raises :class:`ArgumentError`, and writes nothing: without the package ``gguf``; for a weight
    that TQ2_0 cannot hold and ``exclude`` does not name (all of them are named, with the reason);
    where no weight is left; for a tensor that GGUF has no place for.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is of type {type(model).__name__}; give an nn.Module")
    needs("gguf", extra="gguf", why=_WHY)
    network, told = plain(copied(model))
    state = names.clean_state_dict(network)
    tied = {a: n for a, n in names.tied(network).items() if n in state and a not in state}
    chosen = _ternary(network, state, exclude)
    arrays = {name: _array(name, tensor, name in chosen) for name, tensor in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.gguf"
        _save(made, type(network).__name__, arrays, chosen, tied)
        _compare(made, arrays, chosen)
        size = made.stat().st_size
        with made.open("rb") as source, replacing(path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    change = max(_change(arrays[name]) for name in chosen)
    dense = sum(t.numel() * t.element_size() for t in state.values())
    return Written(
        size, dense, tuple(chosen), change, (*told, *_said(arrays, chosen, change, tied))
    )


def _ternary(
    network: nn.Module, state: Mapping[str, Tensor], exclude: Iterable[str] | None
) -> list[str]:
    """The weights to write in TQ2_0; raises as :func:`write`."""
    chosen = list(names.weights(network, exclude=exclude))
    if not chosen:
        raise ArgumentError(
            f"{type(network).__name__} has no weights of linear, convolution or recurrent layers "
            "that exclude leaves; .gguf is for ternary ones"
        )
    faults = {name: fault(_array(name, state[name], True)) for name in chosen}
    bad = {name: why for name, why in faults.items() if why is not None}
    if bad:
        shown = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:20])
        more = f"; and {len(bad) - 20} more" if len(bad) > 20 else ""
        options = " ".join(f"--exclude {name}" for name in list(bad)[:3])
        raise ArgumentError(
            f"TQ2_0 does not hold {len(bad)} of {len(chosen)} weights: {shown}{more}. Quantize "
            "them to ternary with one scale a row (quantize: {method: twn}, or lat), or write them "
            f"in floating point: exclude= ({options})"
        )
    return chosen


def _array(name: str, tensor: Tensor, ternary: bool) -> NDArray[Any]:
    """A tensor as it is written, or a ternary one in full; raises for what GGUF cannot hold."""
    if tensor.ndim > _DIMS or not tensor.numel():
        raise ArgumentError(
            f"{name} has shape {tuple(tensor.shape)}; a GGUF tensor has at most {_DIMS} dimensions "
            "and is not empty"
        )
    if len(name.encode()) > _NAME:
        raise ArgumentError(f"name {name!r} is longer than ggml's {_NAME} bytes; rename the module")
    t = tensor.detach().cpu().contiguous()
    if t.dtype in _INTEGERS:
        return t.to(_INTEGERS[t.dtype]).numpy()
    if not t.is_floating_point():
        raise ArgumentError(f"{name} is {t.dtype}, which GGUF does not hold")
    wide: NDArray[Any] = t.double().numpy()
    # kernels of ggml want vectors in float32
    if t.ndim > 1 and not ternary:
        with np.errstate(over="ignore"):
            half = wide.astype(np.float16)
        if np.array_equal(half, wide, equal_nan=True):
            return half
    return wide if t.dtype == torch.float64 else wide.astype(np.float32)


def _save(
    path: Path,
    title: str,
    arrays: Mapping[str, NDArray[Any]],
    chosen: Iterable[str],
    tied: Mapping[str, str],
) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType.TQ2_0
    writer = gguf.GGUFWriter(path, "gossamer")
    writer.add_name(title)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_TQ2_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_array("gossamer.tied", [f"{alias}={name}" for alias, name in tied.items()])
    known = set(chosen)
    for name, array in arrays.items():
        if name in known:
            writer.add_tensor(
                name, gguf.quants.quantize(array.astype(np.float32), kind), raw_dtype=kind
            )
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _compare(path: Path, arrays: Mapping[str, NDArray[Any]], chosen: Iterable[str]) -> None:
    """Every tensor as the format's own reader gives it; raises where one is not the network's."""
    import gguf

    known = set(chosen)
    held = {t.name: t for t in gguf.GGUFReader(path).tensors}
    if list(held) != list(arrays):
        raise GossamerError(f"the file reads back {len(held)} tensors of {len(arrays)}")
    for name, array in arrays.items():
        found, wanted = held[name], array
        values = found.data
        if name in known:
            kind = gguf.GGMLQuantizationType.TQ2_0
            values = gguf.quants.dequantize(values, kind)
            wanted = (np.sign(array) * halved(np.abs(array.astype(np.float32)))).astype(np.float32)
            if found.tensor_type != kind:
                raise GossamerError(f"{name} reads back as {found.tensor_type.name}, not TQ2_0")
        shape = tuple(int(n) for n in reversed(found.shape))
        same = shape == array.shape and values.dtype == wanted.dtype
        exact = np.issubdtype(wanted.dtype, np.floating)
        if not same or not np.array_equal(values, wanted, equal_nan=exact):
            raise GossamerError(f"{name} reads back otherwise than it was written; no file is left")


def _change(array: NDArray[Any]) -> float:
    scale = np.abs(array.reshape(-1, BLOCK)).max(axis=1)
    scale = scale[scale > 0]
    half = halved(scale.astype(np.float32))
    return float((np.abs(half - scale) / scale).max(initial=0))


def _said(
    arrays: Mapping[str, NDArray[Any]],
    chosen: Iterable[str],
    change: float,
    tied: Mapping[str, str],
) -> list[str]:
    known = set(chosen)
    count = sum(arrays[name].size for name in known)
    kinds: dict[str, int] = {}
    for name, array in arrays.items():
        if name not in known:
            kinds[str(array.dtype)] = kinds.get(str(array.dtype), 0) + 1
    told = [
        f"{count:,} weights in {len(known)} tensors are TQ2_0, 2.0625 bits each; half precision "
        + (f"changes their scales by up to {change:.1e} of themselves" if change else
           "holds their scales exactly")
    ]  # fmt: skip
    if kinds:
        rest = ", ".join(f"{n} {dtype}" for dtype, n in sorted(kinds.items()))
        told.append(f"the other tensors: {rest}, values unchanged")
    told += [f"{alias} is {name}, and is written once" for alias, name in tied.items()]
    return told
