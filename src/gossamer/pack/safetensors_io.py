"""A safetensors file with shared weights as codes and code books, for other tools to read.

A coded tensor ``NAME`` becomes ``NAME.codes`` (uint8 or uint16, its own shape) and
``NAME.codebook`` (its own dtype; entry 0 is zero): ``codebook[codes]`` is the tensor. The rest
is stored as it is. The file's ``__metadata__`` holds one JSON string under ``gossamer``:
``{"version": 1, "coded": [names], "tied": {alias: name}, "metadata": {...}}``. It is larger than
a ``.gsm`` file, since nothing is entropy coded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.files import write_chunks
from gossamer.core.names import Tensors
from gossamer.pack.format.values import analyse, from_bits, to_bits
from gossamer.pack.write.metadata import json_text
from gossamer.pack.write.state import named_tensors

__all__ = ["load_safetensors", "safetensors_bytes", "save_safetensors"]

_KEY = "gossamer"
_VERSION = 1


def save_safetensors(
    model_or_state: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors, coded where that is smaller, losslessly and atomically.

    Args:
        model_or_state: a module or name -> tensor.
        path: the file.
        metadata: anything JSON can hold.

    Raises :class:`ArgumentError` when a tensor's own name clashes with a coded one's, or the
    metadata is no JSON.
    """
    state, aliases = named_tensors(model_or_state)
    out: Tensors = {}
    coded: list[str] = []
    for name, tensor in state.items():
        pair = _coded(name, tensor)
        if pair is None:
            parts = {name: tensor.detach().cpu().contiguous()}
        else:
            parts = {f"{name}.codes": pair[0], f"{name}.codebook": pair[1]}
            coded.append(name)
        for part, value in parts.items():
            if part in out or (part != name and part in state):
                raise ArgumentError(f"the name {part!r} is needed for the codes of {name!r}")
            out[part] = value
    head = {"version": _VERSION, "coded": coded, "tied": aliases}
    text = json_text(metadata or {}, around=head, ensure_ascii=True)
    write_chunks(path, [safetensors_bytes(out, {_KEY: text})])


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """A safetensors file of contiguous tensors.

    Raises :class:`ArgumentError` for a tensor called ``__metadata__``, a name that the format
    keeps for itself: the file could not be read.
    """
    if "__metadata__" in tensors:
        raise ArgumentError(
            "a tensor is called '__metadata__', a name that safetensors keeps for itself, so no "
            "reader could open the file; rename the tensor, or keep the .gsm file"
        )
    return bytes(save(dict(tensors), metadata=dict(metadata) if metadata else None))


def load_safetensors(path: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the metadata of a file by :func:`save_safetensors`.

    A safetensors file of another origin gives its tensors as they are, and no metadata.

    Raises :class:`FormatError` for a damaged file or codes outside their code book.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {}).get(_KEY)
    except SafetensorError as e:
        raise FormatError(f"{path}: not a whole safetensors file ({e}); fetch it again") from None
    if text is None:
        return stored, {}
    head = _head(str(path), text)
    out: Tensors = {}
    for name in head["coded"]:
        codes, codebook = stored.pop(f"{name}.codes", None), stored.pop(f"{name}.codebook", None)
        if codes is None or codebook is None:
            raise FormatError(f"{path}: tensor {name!r} lacks its codes or its code book")
        index = codes.long()
        known = codes.dtype in (torch.uint8, torch.uint16) and codebook.ndim == 1
        if not known or (index.numel() and int(index.max()) >= len(codebook)):
            raise FormatError(f"{path}: tensor {name!r}: a code lies outside the code book")
        out[name] = codebook[index]
    out.update(stored)
    for alias, name in head["tied"].items():
        if not isinstance(name, str) or name not in out:
            raise FormatError(f"{path}: {alias!r} is tied to {name!r}, which is missing")
        out[alias] = out[name]
    return out, head["metadata"]


def _coded(name: str, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes and code book, where they take fewer bytes than the tensor."""
    dtype, bits = to_bits(name, tensor)
    shape = tuple(tensor.shape)
    values = analyse(bits, dtype, shape)
    if values.book is None or values.codes is None:
        return None
    kind = np.uint8 if len(values.book) < 256 else np.uint16
    size = np.dtype(kind).itemsize
    if len(values.book) >= 1 << 16 or dtype.size * (len(bits) - len(values.book) - 1) <= size * len(
        bits
    ):
        return None
    codes = np.zeros(len(bits), kind)
    codes[values.positions] = values.codes.astype(kind) + 1
    book = from_bits(np.insert(values.book, 0, 0), dtype, (len(values.book) + 1,))
    signed = torch.from_numpy(codes.view(f"i{size}"))
    return signed.view(torch.uint8 if size == 1 else torch.uint16).reshape(shape), book


def _head(where: str, text: str) -> dict[str, Any]:
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{where}: the metadata {_KEY!r} is no JSON ({e})") from None
    kinds = {"version": int, "coded": list, "tied": dict, "metadata": dict}
    if not isinstance(head, dict) or any(
        not isinstance(head.get(k), kind) for k, kind in kinds.items()
    ):
        raise FormatError(f"{where}: the metadata {_KEY!r} lacks one of {', '.join(kinds)}")
    if head["version"] != _VERSION:
        raise FormatError(
            f"{where}: version {head['version']}, this gossamer reads {_VERSION}; upgrade it"
        )
    return head
