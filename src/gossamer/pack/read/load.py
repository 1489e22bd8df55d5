"""Decode a file straight into a live model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.names import Tensors
from gossamer.pack.coders.limits import ANY_BYTES
from gossamer.pack.format.values import to_bits
from gossamer.pack.read.archive import Archive

__all__ = ["load_into"]

_SLACK = 64 << 20


def load_into(
    path: str | Path | bytes | Archive,
    model: nn.Module,
    *,
    strict: bool = True,
    max_bytes: int | None = None,
) -> nn.Module:
    """Decode a file straight into a model's parameters and buffers.

    Names, shapes, dtypes and all checksums are checked before anything is written.

    Args:
        path: the file; or an archive, which stays open, and whose own bound counts.
        model: gets the values, on whatever device its tensors are.
        strict: refuse names that only one side has; otherwise they are left alone.
        max_bytes: bound on the decoded bytes of all tensors in the file. By default what is decoded
            for the model is bounded: twice the bytes of its tensors that are in the file, and 64
            MiB.

    Raises :class:`ArgumentError` when the model does not fit, :class:`FormatError` for damage.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model is {model!r:.80}, and must be an nn.Module of the network that was packed; "
            "gossamer.load takes the file first: load(FILE, network)"
        )
    with ExitStack() as stack:
        if isinstance(path, Archive):
            archive = path
        else:
            bound = ANY_BYTES if max_bytes is None else max_bytes
            archive = stack.enter_context(Archive(path, max_bytes=bound))
            archive.trusted = max_bytes is not None
        targets = _targets(archive, model, strict)
        if not archive.trusted:
            _check_cost(archive, targets)
        archive.check_sections()
        _check_tied(archive, targets)
        aliases = archive.aliases
        for done, (name, target) in enumerate(targets.items()):
            same = aliases.get(name)
            if same is None or targets.get(same) is not target:
                try:
                    archive.read_into(name, target)
                except FormatError as e:
                    raise FormatError(
                        f"{e}. {done} of the model's {len(targets)} tensors hold the file's values "
                        "by now: build the model anew before it is used"
                    ) from e
    # what get_extra_state gives is a copy: its module is told
    if any(name.endswith("_extra_state") for name in targets):
        known = names.cleaned(model)
        for prefix, module in model.named_modules():
            name = known[f"{prefix}._extra_state".lstrip(".")]
            if name in targets:
                module.set_extra_state(targets[name])
    return model


def _check_cost(archive: Archive, targets: Tensors) -> None:
    """Small tensors are decoded with their group, most of which may be none of the model's."""
    cost, have = archive.cost(targets), sum(t.nbytes for t in targets.values())
    if cost > 2 * have + _SLACK:
        raise FormatError(
            f"{archive.where}: {cost} bytes would be decoded for {have} bytes of the model's; "
            f"if you trust the file, pass max_bytes={archive.dense_bytes}"
        )


def _check_tied(archive: Archive, targets: Tensors) -> None:
    """Where the model ties what the file does not, one of two values would be lost."""
    aliases, first = archive.aliases, dict[object, str]()
    for name, tensor in targets.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        other = first.setdefault(place if tensor.numel() else id(tensor), name)
        if aliases.get(other, other) == aliases.get(name, name):
            continue
        one, two = (to_bits(n, archive.tensor(n))[1] for n in (other, name))
        if not np.array_equal(one, two):
            raise ArgumentError(
                f"{archive.where} does not fit the model: {name!r} is tied to {other!r} in the "
                "model, and each has values of its own in the file. Nothing was changed; untie "
                "them in the model"
            )


def _targets(archive: Archive, model: nn.Module, strict: bool) -> Tensors:
    """The model's tensor for each name of the file, all checks done."""
    state: Tensors = {}
    parametrized: set[str] = set()
    known = names.cleaned(model)
    problems: list[str] = []
    for raw, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            if strict and tensor is not None:
                problems.append(f"{raw!r} of the model is {type(tensor).__name__}, no tensor")
        else:
            computed = ".parametrizations." in f".{raw}"
            name = names.clean(known[raw]) if computed else known[raw]
            state.setdefault(name, tensor)
            if computed:
                parametrized.add(name)
    shared = [n for n in archive.names if n in state]
    if strict:
        problems += [f"{n!r} is only in the file" for n in archive.names if n not in state]
        problems += [f"{n!r} is only in the model" for n in state if n not in archive]
    for name in shared:
        entry = archive.entry(name)
        tensor = state[name]
        have = f"{entry.dtype.name}{list(entry.shape)}"
        want = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        if name in parametrized:
            problems.append(
                f"{name!r} is parametrized in the model "
                "(torch.nn.utils.parametrize.remove_parametrizations takes that off)"
            )
        elif tensor.is_meta:
            problems.append(f"{name!r} is on the meta device (use model.to_empty(device='cpu'))")
        elif have != want:
            problems.append(f"{name!r} is {have} in the file and {want} in the model")
        elif any(
            step == 0 for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
        ):
            problems.append(
                f"{name!r} is expanded in the model: several entries share one place "
                "(give the module a contiguous copy of it)"
            )
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ArgumentError(
            f"{archive.where} does not fit the model: {'; '.join(problems[:8])}{more}. Nothing "
            "was changed; build the model the file was packed from, or pass strict=False"
        )
    return {name: state[name] for name in shared}
