"""A folder such as ``save_pretrained`` writes, with ``model.gsm`` in place of the weights.

``config.json`` (and ``generation_config.json``) say which network it is, the pack holds its
tensors, with the changes that compression made to its modules. Nothing in the folder is executed
or unpickled: the class is one of transformers' own, by its name, and what a config says of code
elsewhere is not looked at.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.compression import Result, records
from gossamer.core import names
from gossamer.core.errors import ArgumentError, FormatError, GossamerError
from gossamer.core.files import write_chunks
from gossamer.core.locate import failure
from gossamer.integrations.extras import missing
from gossamer.pack import Archive, pack
from gossamer.pack.coders.limits import ANY_BYTES

__all__ = ["from_pretrained", "save_pretrained"]

_CONFIG, _FILE = "config.json", "model.gsm"
_LONGEST = 1 << 24  # bytes of a config; the largest published ones are under a megabyte
# name code in a repository, or kernels that would be fetched
_CODE = ("auto_map", "implementation", "custom_pipelines", "trust_remote_code")


def save_pretrained(
    model: nn.Module, folder: str | Path, *, result: Result | None = None, profile: str = "smallest"
) -> Path:
    """Write a transformers network to a folder, packed; returns the folder.

    The folder is read back and compared bit for bit before this returns.

    Args:
        model: a network of a class of transformers' own, plain (methods finished).
        folder: made where there is none; a tokenizer's files may lie beside.
        result: of :func:`gossamer.compress` on this network: its file is taken, with the changes
            it tells of, and the config is the model's.
        profile: of :func:`gossamer.pack.pack`, without a ``result``.

    Raises :class:`ArgumentError` for a class that is not transformers' own, and as
    :func:`gossamer.pack.pack` does; :class:`GossamerError` where what is read back differs.
    """
    cls = type(model)
    if _class(cls.__name__) is not cls:
        raise ArgumentError(
            f"{cls.__module__}.{cls.__qualname__} is not a class of transformers' own, so that a "
            "reader could make it only by running code from elsewhere; gossamer.pack.pack writes "
            "the tensors alone"
        )
    like: Any = model
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(like.config)
    config.architectures = [cls.__name__]
    config.save_pretrained(folder)
    if like.can_generate():
        like.generation_config.save_pretrained(folder)
    path = folder / _FILE
    if result is None:
        with pack(model, path, profile=profile):
            pass
    else:
        write_chunks(path, [result.file.read_bytes()])
    expected = names.clean_state_dict(model if result is None else result.model)
    found = names.clean_state_dict(from_pretrained(folder))
    odd = [n for n in {**expected, **found} if not _same(expected.get(n), found.get(n))]
    if odd:
        path.unlink()
        raise GossamerError(
            f"{path}: read back, {odd[0]!r} is not what was packed, so the file was removed; is "
            "the config the network's own, and the result of this network?"
        )
    return folder


def from_pretrained(folder: str | Path, *, max_bytes: int | None = None) -> nn.Module:
    """The network of a folder that :func:`save_pretrained` wrote, in evaluation mode, bit for bit.

    Args:
        folder: on this machine.
        max_bytes: bound on the decoded tensors (:func:`gossamer.compression.records.load`).

    Raises :class:`FormatError` for a folder without the two files or a damaged one,
    :class:`ArgumentError` for a class that is not transformers' own or does not fit the file.
    """
    folder = Path(folder)
    plain = _config(folder / _CONFIG)
    named = plain.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise FormatError(
            f"{folder / _CONFIG}: architectures is {str(named)[:100]}; it must be a list of one "
            "class of transformers, such as ['BertForSequenceClassification']"
        )
    cls = _class(named[0])
    if cls is None:
        raise ArgumentError(
            f"{folder / _CONFIG}: architectures names {named[0][:100]!r}, which is no network of "
            "transformers' own; code from elsewhere is never run"
        )
    kind = cls.config_class.model_type
    if plain.get("model_type") != kind:
        raise FormatError(
            f"{folder / _CONFIG}: model_type is {str(plain.get('model_type'))[:100]!r}, but "
            f"{named[0]} is of type {kind!r}"
        )
    path = folder / _FILE
    if not path.is_file():
        raise FormatError(f"{folder} has no {_FILE}; transformers itself reads other weights")
    try:
        with torch.random.fork_rng(devices=[]):  # first values are drawn, and overwritten
            model = cls(cls.config_class.from_dict(_without_code(plain)))
    except Exception as e:  # values that transformers did not look at may raise anything
        raise FormatError(f"{folder / _CONFIG}: {named[0]} {failure(e)}") from e
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    with Archive(path, max_bytes=ANY_BYTES if max_bytes is None else max_bytes) as archive:
        archive.trusted = max_bytes is not None
        _as_packed(model, archive)
        return records.load(archive, model).eval()


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > _LONGEST:
        raise FormatError(f"{path} is no file of up to {_LONGEST:,} bytes")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{path} is no JSON: {str(e)[:100]}") from e
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds {type(found).__name__}, it must be an object")
    return found


def _without_code(found: Any) -> Any:
    if isinstance(found, dict):
        return {
            key: _without_code(value)
            for key, value in found.items()
            if not any(word in key for word in _CODE)
        }
    return [_without_code(value) for value in found] if isinstance(found, list) else found


def _class(name: str) -> Any:
    """The network class of transformers itself by that name; None where there is none."""
    try:
        import transformers
        from transformers import PreTrainedModel
    except (ImportError, RuntimeError) as e:
        missing("transformers", e)
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(found, type) or not found.__module__.startswith("transformers.models."):
        return None
    return found if issubclass(found, PreTrainedModel) else None


def _as_packed(model: nn.Module, archive: Archive) -> None:
    """Floating-point tensors in the file's precision; the class makes them in float32."""
    known = names.cleaned(model)
    for raw, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or known[raw] not in archive:
            continue
        dtype = getattr(torch, archive.entry(known[raw]).dtype.name, tensor.dtype)
        if dtype.is_floating_point and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*bits)
