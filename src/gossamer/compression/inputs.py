"""A user's model and data: objects as they are, or names made into objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gossamer import nets
from gossamer.compression.records import load, recorded
from gossamer.compression.weights import check_values, fitted, read_tensors
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.files import write_chunks
from gossamer.datasets import Dataset
from gossamer.pack import unpack
from gossamer.pack.netfile import NetLayer, net_tensors, read_net, write_net
from gossamer.pack.safetensors_io import safetensors_bytes
from gossamer.pack.write.state import named_tensors

__all__ = [
    "build_options",
    "load_weights",
    "network",
    "plain",
    "read_state",
    "save_net",
    "save_safetensors",
]


def network(
    spec: str,
    data: Dataset,
    *,
    seed: int = 0,
    pretrained: bool = False,
    weights: str | Path | None = None,
    key: str | None = None,
) -> nn.Module:
    """A network by name, in the shape of the data, with trained weights where a file is given.

    ``key``: where in that file they are, as for :func:`read_state`.

    Raises :class:`ArgumentError` for an unknown name, a file that does not fit, or a network that
    cannot take the data.
    """
    if not isinstance(spec, str):
        raise ArgumentError(
            f"model is of type {type(spec).__name__}; give the nn.Module itself, or a name such as "
            "'file.py:function' (a state dict goes to weights as a file)"
        )
    model = nets.build(spec, **build_options(spec, data, seed=seed, pretrained=pretrained))
    return model if weights is None else load_weights(model, weights, key)


def build_options(
    spec: str, data: Dataset, *, seed: int = 0, pretrained: bool = False
) -> dict[str, Any]:
    """What :func:`gossamer.nets.build` takes for a network in the shape of the data."""
    options: dict[str, Any] = {"seed": seed, "pretrained": pretrained}
    if not nets.is_own(spec):
        if data.classes is not None:
            options["classes"] = data.classes
        if len(data.in_shape) == 3:
            options["in_shape"] = data.in_shape
    return options


def read_state(
    path: str | Path, key: str | None = None, *, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.gsm``, ``.net`` or checkpoint file; none of it is run.

    ``key``: where in a checkpoint they are, with dots
    (:func:`gossamer.compression.weights.read_tensors`). ``model``: gives a ``.net`` file its names
    and shapes, which it does not hold (:mod:`gossamer.pack.netfile`).

    Raises :class:`ArgumentError` when there is no such file, no tensors in it or a choice to be
    made, :class:`FormatError` when it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ArgumentError(f"there is no file {path}")
    if path.suffix == ".gsm":
        if key is not None:
            raise ArgumentError(f"{path} is a packed file, which has no key {key!r}")
        return unpack(path)
    if path.suffix == ".net":
        if model is None:
            raise ArgumentError(
                f"{path} is a .net file, which holds no names and shapes; say of which network it "
                "is (--model)"
            )
        shapes = {name.removesuffix(".weight"): w for name, w in names.weights(model).items()}
        return net_tensors(read_net(path, {n: tuple(w.shape) for n, w in shapes.items()}))
    return read_tensors(path, key)


def load_weights(model: nn.Module, path: str | Path, key: str | None = None) -> nn.Module:
    """Load a file's tensors into a model; a packed file may tell of changes to its modules.

    What a wrapper put before every name is taken off where the names then fit
    (:func:`gossamer.compression.weights.fitted`). ``key``: as for :func:`read_state`.

    Raises :class:`ArgumentError` when they do not fit, naming the first that do not.
    """
    if Path(path).suffix == ".gsm" and Path(path).is_file() and key is None:
        return load(path, model)
    state = fitted(read_state(path, key), model.state_dict())
    check_values(path, state, model.state_dict(keep_vars=True))
    try:
        wrong = model.load_state_dict(state, strict=False)
    except RuntimeError as e:
        line = str(e).strip().splitlines()[-1].strip()
        raise ArgumentError(f"{path} does not fit the network: {line}") from e
    # safetensors keeps tied tensors once; batch counters are often left out
    own = model.state_dict(keep_vars=True)
    loaded = {id(own[n]) for n in own if n not in wrong.missing_keys}
    missing = [
        n
        for n in wrong.missing_keys
        if id(own[n]) not in loaded and not n.endswith("num_batches_tracked")
    ]
    if missing or wrong.unexpected_keys:
        parts = []
        for kind, those in (("missing", missing), ("unknown", list(wrong.unexpected_keys))):
            parts += [f"{kind} {n!r}" for n in those[:3]]
            parts += [f"{len(those) - 3} more {kind}"] if len(those) > 3 else []
        raise ArgumentError(f"{path} does not fit the network: {', '.join(parts)}")
    return model


def plain(weights: str | None) -> None:
    """Raise :class:`ArgumentError` for a packed file of a network that was changed.

    What it tells of would be missing in the next file.
    """
    if weights is None or Path(weights).suffix != ".gsm" or not Path(weights).is_file():
        return
    found = recorded(weights)
    if found:
        raise ArgumentError(
            f"{weights} is of a network whose modules were changed ({found[0].kind}); start from "
            "the float network, and give all stages in one recipe"
        )


def save_safetensors(source: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write plain tensors, atomically; tied ones once, their aliases as metadata.

    Raises :class:`ArgumentError` when the folder does not exist, or a tensor is called
    ``__metadata__``, :class:`GossamerError` when the disk is full.
    """
    state, aliases = named_tensors(source)
    # clones: views of one storage are tensors of their own
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    write_chunks(path, [safetensors_bytes(plain, aliases or None)])


def save_net(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write pruned and shared layers in the layout published with Deep Compression.

    Raises :class:`ArgumentError` for a tensor that is no ``NAME.weight`` or its ``NAME.bias``, and
    for values that the layout has no room for (:class:`gossamer.pack.netfile.NetLayer`).
    """
    layers = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    known = {f"{layer}.{what}" for layer in layers for what in ("weight", "bias")}
    if other := [name for name in tensors if name not in known]:
        raise ArgumentError(
            f"a .net file holds weights and their biases alone, not {other[0]!r}; write "
            ".safetensors"
        )
    rows = [NetLayer.of(n, tensors[f"{n}.weight"], tensors.get(f"{n}.bias")) for n in layers]
    write_net(path, rows)
