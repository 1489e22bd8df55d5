"""Tensors from weight files as people have them; nothing in a file is executed.

Checkpoints of training programs hold more than tensors, and name them after a wrapper. What is
there is found where it can be only one thing; else the message says what there is to choose from.
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack.safetensors_io import load_safetensors

__all__ = ["check_values", "fitted", "read_tensors"]

# What training programs call the network's tensors, in the order that they are looked for in.
_KEYS = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
# What wrappers and training programs put before a name: DDP and DataParallel, torch.compile,
# Lightning modules whose network is called model, net or network.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_MOST_NAMED = 8


def read_tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or checkpoint file.

    Args:
        key: where in a checkpoint they are, with dots: ``ema``, ``state.model``. None looks for
            what the file itself or one of its entries can only mean.

    Raises :class:`ArgumentError` for a file of another kind, naming the kind and the way out, and
    for a checkpoint with nothing or more than one thing in it that could be meant;
    :class:`FormatError` when it is damaged.
    """
    head = _head(path)
    if _is_safetensors(head):
        if key is not None:
            raise ArgumentError(f"{path} is a safetensors file, which has no key {key!r}")
        return load_safetensors(path)[0]
    foreign = _foreign(path, head)
    if foreign is not None:
        raise ArgumentError(f"{path} is {foreign}")
    return _chosen(_loaded(path), path, key)


def _head(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.read(4096)


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 9 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] < 1 << 40


def _foreign(path: Path, head: bytes) -> str | None:
    """What a file is that holds no checkpoint, and what to do; None where it may hold one."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "empty; fetch it again"
    if head.startswith(b"\x89GSM"):
        return "a packed file; give it the ending .gsm"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; run git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, such as a download's error; fetch the file itself"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file (Keras); load it there, and save the tensors as .safetensors"
    if head.startswith(b"GGUF"):
        return "a GGUF file; dequantize it, and save the tensors as .safetensors"
    if head.startswith(b"\x1f\x8b"):
        return "compressed with gzip; unpack it first"
    if head.startswith(b"\x93NUMPY"):
        return "a numpy array; give a file of named tensors (.safetensors)"
    if head.startswith(b"PK"):
        return _archive(path)
    if head[:1] == b"\x08" and (b"pytorch" in head or b"onnx" in head or head[2:3] in b"\x12:"):
        return "an ONNX model; give the PyTorch weights that it was exported from"
    if head[:1] != b"\x80":
        if text[:1] in (b"{", b"["):
            return "a JSON text; give a file of tensors (.safetensors, .pt)"
        if b"ustar" in head:
            return "a tar archive; unpack it, and give the file of tensors in it"
        return f"no weight file (it begins with {head[:8]!r}); give a .safetensors, .pt or .gsm"
    return None


def _archive(path: Path) -> str | None:
    """What a zip file holds, where that is no checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        raise FormatError(
            f"{path} is a truncated or corrupt zip archive ({e}); fetch it again"
        ) from e
    inside = [name.partition("/")[2] for name in names]
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        return (
            "a TorchScript archive, which holds code; write its tensors with "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt'), and give that"
        )
    if any(name.startswith("models/") or name == "archive_format" for name in (*names, *inside)):
        return (
            "an exported program (torch.export), which holds code; write its tensors with "
            "torch.save(torch.export.load(FILE).state_dict, 'weights.pt'), and give that"
        )
    if "data.pkl" in inside or "data.pkl" in names:
        return None
    if any(name.endswith(".npy") for name in names):
        return "a numpy archive (.npz); save its arrays as .safetensors, and give that"
    some = ", ".join(names[:3]) or "nothing"
    return f"a zip archive of something else ({some}); unpack it, and give the file of tensors"


def _loaded(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle's protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        said = str(e)
        if "Unsupported global" in said or "weights_only" in said.lower():
            named = said.partition("GLOBAL ")[2].split(" ")[0].strip("'\"`.,") or "a class"
            raise ArgumentError(
                f"{path} holds Python objects ({named}), perhaps a whole pickled module, and "
                "unpickling them would run code. Where you trust it, write its tensors with "
                "torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pt'), and "
                "give that"
            ) from e
        raise FormatError(_damaged(path, e)) from e
    except (
        OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError, TypeError,
        struct.error, zipfile.BadZipFile,
    ) as e:  # fmt: skip
        raise FormatError(_damaged(path, e)) from e


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"{path} is truncated or corrupt ({reason[0][:160]}); fetch it again, or take a copy"


def _tensors(value: object) -> dict[str, Tensor] | None:
    """A mapping of names to tensors as a dict; None for anything else."""
    if not isinstance(value, Mapping) or not value:
        return None
    fits = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    return dict(value) if fits else None


def _chosen(found: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    if key is not None:
        return _at(found, path, key)
    whole = _tensors(found)
    if whole is not None:
        return whole
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise ArgumentError(f"{path} holds {kind}, not a mapping of tensors")
    known = [name for name in _KEYS if _tensors(found.get(name)) is not None]
    if len(known) == 1:
        return dict(found[known[0]])
    for name in () if known else _KEYS:  # {"model": {"state_dict": ...}}
        inner = found.get(name)
        if isinstance(inner, Mapping) and any(_tensors(inner.get(k)) is not None for k in _KEYS):
            return _chosen(inner, path, None)
    # states of optimizers hold no tensors right below, so what is left is a network's
    others = [str(k) for k, v in found.items() if _tensors(v) is not None]
    if len(others) == 1:
        return _chosen(found, path, others[0])
    if others:
        raise ArgumentError(
            f"{path} holds several mappings of tensors: {', '.join(others[:_MOST_NAMED])}; choose "
            f"one with --key {others[0]} (key={others[0]!r})"
        )
    raise ArgumentError(
        f"{path} is no mapping of names to tensors: it holds {_described(found)}; name where they "
        "are with --key (key=), such as --key state.model"
    )


def _at(found: Any, path: Path, key: str) -> dict[str, Tensor]:
    at, rest = found, key
    while rest:
        if not isinstance(at, Mapping):
            at = None
            break
        # a key may hold dots itself: the longest that is there
        parts = rest.split(".")
        ends = [i for i in range(len(parts), 0, -1) if ".".join(parts[:i]) in at]
        if not ends:
            raise ArgumentError(f"{path} has no key {key!r}; there is {_described(at)}")
        at, rest = at[".".join(parts[: ends[0]])], ".".join(parts[ends[0] :])
    tensors = _tensors(at)
    if tensors is None:
        raise ArgumentError(
            f"{path}: key {key!r} is of type {type(at).__name__}, no mapping of names to tensors"
        )
    return tensors


def _described(found: Mapping[Any, Any]) -> str:
    if not found:
        return "nothing"
    told = [f"{str(k)[:40]!r} is of type {type(v).__name__}" for k, v in found.items()]
    more = f" and {len(told) - _MOST_NAMED} more" if len(told) > _MOST_NAMED else ""
    return ", ".join(told[:_MOST_NAMED]) + more


def fitted(state: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The tensors by the network's own names, where a wrapper's prefix stands before them.

    A prefix is taken off only while none of the names is the network's: one whose own part is
    called ``module`` keeps its names. It stands before every name; or before exactly those of the
    network, when the rest of the file is not the network's (a loss or a metric in Lightning's).

    >>> list(fitted({"module.a": torch.zeros(1)}, ["a"]))
    ['a']
    >>> list(fitted({"module.a": torch.zeros(1)}, ["module.a"]))
    ['module.a']
    >>> list(fitted({"model.a": torch.zeros(1), "loss.weight": torch.zeros(1)}, ["a"]))
    ['a']
    """
    names = {n for n in wanted if not n.endswith("num_batches_tracked")}
    for _ in _PREFIXES:  # "module._orig_mod.": a wrapper in a wrapper
        if names & set(state):
            break
        for prefix in _PREFIXES:
            bare = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            own = {n for n in bare if not n.endswith("num_batches_tracked")}
            if bare and (len(bare) == len(state) or own == names):
                state = bare
                break
        else:
            break
    return state


def check_values(path: str | Path, state: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    """Whether the network's tensors (``own``) can hold the values of a file's, by name.

    torch copies between any two dtypes without a word: integer codes into weights, complex numbers
    without their imaginary part, what is too large for half precision as infinity; and of two
    values for one tied tensor it keeps the last.

    Raises :class:`ArgumentError` for each of these.
    """
    first: dict[int, str] = {}
    for name, given in state.items():
        mine = own.get(name)
        if not isinstance(mine, Tensor) or mine.shape != given.shape:
            continue  # told of by load_state_dict
        wrong = _lost(given, mine)
        other = first.setdefault(id(mine), name)
        if other != name and not torch.equal(state[other], given):
            wrong = f"it is tied to {other!r} in the network, and has other values in the file"
        if wrong:
            raise ArgumentError(f"{path} does not fit the network: {name!r}: {wrong}")


def _lost(given: Tensor, mine: Tensor) -> str | None:
    """What a copy into the network's tensor would lose without a word."""
    if given.dtype == mine.dtype or not given.numel():
        return None
    kinds = f"the file has {given.dtype}, the network {mine.dtype}"
    if given.is_quantized:
        return f"{kinds}; give the float weights that it was quantized from"
    if given.is_complex() or mine.is_complex():
        return f"{kinds}, which has no imaginary part" if given.is_complex() else None
    value, kept = given.double(), given.to(mine.dtype).double()
    if not mine.is_floating_point():
        return None if torch.equal(value, kept) else f"{kinds}, which does not hold its values"
    if bool((value.isfinite() & ~kept.isfinite()).any()):
        return f"{kinds}, which does not hold values as large as {float(value.abs().max()):.3g}"
    coded = isinstance(mine, nn.Parameter) and not given.is_floating_point()
    if coded and float(value.abs().max()) > 1:  # 0 and 1, a mask, are what they say
        return f"{kinds}; integer codes are no weights: give them times their scale"
    return None
