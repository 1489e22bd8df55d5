"""Networks, plain torch; they know nothing of the rest.

:func:`build` makes them by name, through a user's own ``module:function``, or from another tool's
file (:mod:`gossamer.nets.sources`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.locate import called, find, function
from gossamer.nets.classic import conv_n, glorot_, lenet_5, lenet_300_100, mlp
from gossamer.nets.language import LSTMLM, lstm_lm
from gossamer.nets.resnet import ResNet, WideResNet, resnet, wrn
from gossamer.nets.sources import is_own, is_source, open_source
from gossamer.nets.transformer import GPT, gpt
from gossamer.nets.vision import alexnet, cifarnet, convnet, vgg

__all__ = ["GPT", "LSTMLM", "NETS", "ResNet", "WideResNet", "build", "glorot_", "is_own"]

NETS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "lenet-300-100": lenet_300_100,
    "lenet-5": lenet_5,
    "lenet-5-caffe": lenet_5,
    "conv-2": partial(conv_n, 2),
    "conv-4": partial(conv_n, 4),
    "conv-6": partial(conv_n, 6),
    "convnet": convnet,
    "cifarnet": cifarnet,
    "alexnet": alexnet,
    "vgg-11": partial(vgg, 11),
    "vgg-16": partial(vgg, 16),
    "vgg-19": partial(vgg, 19),
    "resnet-20": partial(resnet, 20),
    "resnet-32": partial(resnet, 32),
    "resnet-44": partial(resnet, 44),
    "resnet-56": partial(resnet, 56),
    "wrn-16-8": partial(wrn, 16, 8),
    "wrn-28-2": partial(wrn, 28, 2),
    "lstm-lm": lstm_lm,
    "gpt": gpt,
}

PRETRAINED = {f"resnet-{d}": f"resnet-cifar10/resnet{d}.safetensors" for d in (20, 32, 44, 56)}


def _family(name: str) -> Callable[..., nn.Module] | None:
    # Names with numbers in them: any depth and width of a family.
    if m := re.fullmatch(r"resnet-(\d{1,4})", name):
        return partial(resnet, int(m[1]))
    if m := re.fullmatch(r"wrn-(\d{1,4})-(\d{1,3})", name):
        return partial(wrn, int(m[1]), int(m[2]))
    if m := re.fullmatch(r"vgg-(\d{1,3})", name):
        return partial(vgg, int(m[1]))
    if m := re.fullmatch(r"mlp((?:-\d{1,7}){2,})", name):
        return partial(mlp, sizes=tuple(int(n) for n in m[1][1:].split("-")))
    return None


def build(
    name: str,
    *,
    classes: int | None = None,
    in_shape: tuple[int, ...] | None = None,
    pretrained: bool = False,
    root: str | Path | None = None,
    seed: int | None = None,
    **options: Any,
) -> nn.Module:
    """A network by name.

    Args:
        name: one of :data:`NETS`; ``mlp-784-500-10``, ``resnet-110``, ``wrn-40-4`` and their
            like; or ``module:function`` (the current directory is importable; the function may
            take any of these keyword arguments, and returns an nn.Module); or a file or folder
            that :func:`gossamer.nets.sources.open_source` opens, with the values in it.
        classes: outputs; None: the network's own (10, mostly).
        in_shape: shape of one input, (C, H, W); None: the network's own.
        pretrained: load the CIFAR-10 weights of resnet-20, 32, 44 or 56 from the data folder.
        root: the data folder, as in :func:`gossamer.datasets.load`.
        seed: of the initial weights; torch's global generator is left as it was. None draws from
            that.
        options: what this network takes besides, such as ``sizes``, ``dropout``, ``hidden``.

    >>> sum(p.numel() for p in build("lenet-300-100").parameters())
    266610

    Raises :class:`ArgumentError` for unknown names, shapes and options,
    :class:`~gossamer.core.errors.DatasetError` when pretrained weights are missing.
    """
    if is_source(name):
        if pretrained or options:
            given_too = "pretrained=" if pretrained else f"{next(iter(options))}="
            raise ArgumentError(f"network {name!r} takes no {given_too}; it is a file of its own")
        return open_source(name)
    given: dict[str, Any] = {"classes": classes, "in_shape": in_shape}
    make = NETS.get(name) or _family(name)
    if make is not None:
        given = {k: v for k, v in given.items() if v is not None}
    elif ":" in name:
        make = function(name, "network")
        offered = {**given, "pretrained": pretrained, "root": root, "seed": seed}
        accepted = inspect.signature(make).parameters
        if pretrained and "pretrained" not in accepted:
            raise ArgumentError(
                f"network {name!r} takes no pretrained=; load the weights in the function itself"
            )
        given = {k: v for k, v in offered.items() if k in accepted and v is not None}
    else:
        raise ArgumentError(
            f"network {name!r} is not one of {', '.join(NETS)}, 'module:function', "
            "'file.pt2' (exported), 'file.pt' (TorchScript), 'hf:FOLDER'"
        )
    if classes is not None and classes < 1:
        raise ArgumentError(f"classes={classes} must be at least 1")
    if pretrained and ":" not in name and name not in PRETRAINED:
        raise ArgumentError(
            f"network {name!r} has no pretrained weights; these have: {', '.join(PRETRAINED)}"
        )
    if isinstance(make, nn.Module):
        raise ArgumentError(
            f"network {name!r} is a {type(make).__name__} that is made already; name a function "
            "that returns one, for a run builds it more than once"
        )
    try:
        inspect.signature(make).bind(**given, **options)
    except TypeError as e:
        raise ArgumentError(f"network {name!r}: {e}; it takes {inspect.signature(make)}") from e
    if seed is None:
        model = called(make, f"network {name!r}", **given, **options)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = called(make, f"network {name!r}", **given, **options)
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"network {name!r} returned {type(model).__name__}, not an nn.Module; return the "
            "module itself (a state dict goes to --weights as a file)"
        )
    state = [*model.named_parameters(), *model.named_buffers()] if ":" in name else []
    empty = [n for n, t in state if t.is_meta]
    if empty:
        raise ArgumentError(
            f"network {name!r} returned tensors without values ({empty[0]!r} is on the meta "
            "device); let it load them, or call model.to_empty(device='cpu') and set them"
        )
    if pretrained and name in PRETRAINED:
        _load(model, find(PRETRAINED[name], root))
    return model


def _load(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError) as e:
        raise FormatError(f"{path} is no sound safetensors file: {e}; fetch it again") from e
    own = model.state_dict()
    # Batch counters are not stored; everything else must be there, in the right shape.
    needed = {n for n in own if not n.endswith("num_batches_tracked")}
    odd = sorted(needed ^ (set(state) - {n for n in state if n.endswith("num_batches_tracked")}))
    odd += sorted(n for n in needed & set(state) if state[n].shape != own[n].shape)
    if odd:
        raise ArgumentError(
            f"{path} does not fit this network (width, classes or in_shape differ): "
            f"{', '.join(odd[:6])}"
        )
    model.load_state_dict(state, strict=False)
