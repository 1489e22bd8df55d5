"""Networks whose modules were changed: how a file tells it, and how a reader makes them again.

A file holds tensors. Where a network is no longer the user's own class alone (activations are
quantized, a layer is two, sums are rounded), its metadata say under ``structure`` what was done, a
record a change, in order. :func:`load` does the same to a fresh network of the user's class and
fills in the tensors, so that it computes what the packed one did.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
)
from torch import nn

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack import Archive, load_into
from gossamer.pack.coders.limits import ANY_BYTES

__all__ = [
    "Activations",
    "LowRank",
    "LowRankConv",
    "OnGrid",
    "Record",
    "Smaller",
    "load",
    "metadata",
    "parse",
    "rebuild",
    "recorded",
    "shown",
]

_KEY = "structure"
_Frac = Annotated[int, Field(ge=-512, le=512)]
_Bits = Annotated[int, Field(ge=2, le=16)]
_MOST = 64  # records; a recipe makes one a stage that changes modules


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Activations(_Strict):
    """ReLUs are :class:`gossamer.quantize.QuantizedReLU`; alphas are tensors of the file."""

    kind: Literal["activations"] = "activations"
    bits: Annotated[int, Field(ge=2, le=8)]
    estimator: Literal["identity", "relu", "clipped"]
    form: Literal["ceil", "round"]
    learned: bool
    functional: bool
    layers: Annotated[tuple[str, ...], Field(min_length=1)]


class LowRank(_Strict):
    """Linear layers are two, of this rank."""

    kind: Literal["low-rank"] = "low-rank"
    ranks: Annotated[dict[str, Annotated[int, Field(ge=1)]], Field(min_length=1)]


class LowRankConv(_Strict):
    """Convolutions and linear layers are several, by name.

    ``layers``: of each its form (:data:`gossamer.structure.factors.FORMS`), the form's ranks, and
    whether the last factor has a bias.
    """

    kind: Literal["low-rank-conv"] = "low-rank-conv"
    layers: Annotated[
        dict[
            str,
            tuple[
                Literal["channel", "spatial", "tucker", "cp"],
                Annotated[
                    tuple[Annotated[int, Field(ge=1, lt=1 << 31)], ...],
                    Field(min_length=1, max_length=2),
                ],
                bool,
            ],
        ],
        Field(min_length=1),
    ]


class OnGrid(_Strict):
    """Batch-norm is folded and the network computes in fixed point.

    Attributes:
        bits: of the data.
        data: step -> fractional length of its result.
        layers: step -> bits and fractional length of its weight, then of its bias.
        shape: of the input, without the batch.
    """

    kind: Literal["fixed-point"] = "fixed-point"
    bits: _Bits
    data: dict[str, _Frac]
    layers: dict[str, tuple[_Bits, _Frac, _Bits, _Frac]]
    shape: Annotated[
        tuple[Annotated[int, Field(ge=1, lt=1 << 31)], ...], Field(min_length=1, max_length=8)
    ]


_Size = Annotated[int, Field(ge=1, lt=1 << 31)]
_Place = Annotated[int, Field(ge=0, lt=1 << 31)]


class Standing(_Strict):
    """A module that stands in for another: :class:`gossamer.structure.surgery.plan.Replaced`."""

    kind: Literal["recurrent", "heads", "constant", "identity", "layer-norm", "lowered"]
    sizes: Annotated[tuple[_Size, ...], Field(max_length=256)] = ()
    kept: tuple[_Place, ...] = ()


class Smaller(_Strict):
    """Dead units were taken out: :class:`gossamer.structure.surgery.plan.Plan`.

    Attributes:
        replaced: module -> what stands there.
        shapes: parameter or buffer -> its shape.
        numbers: module -> attribute -> value.
        picked: buffer that no file holds -> of each axis the entries that are left.
    """

    kind: Literal["shrunk"] = "shrunk"
    replaced: dict[str, Standing] = {}
    shapes: dict[str, Annotated[tuple[_Size, ...], Field(max_length=8)]] = {}
    numbers: dict[str, dict[str, _Size]] = {}
    picked: dict[str, Annotated[tuple[tuple[_Place, ...], ...], Field(max_length=8)]] = {}

    @model_serializer(mode="wrap")
    def _plain(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not there, as files from before have it."""
        return {k: v for k, v in whole(self).items() if k != "picked" or v}


Record = Annotated[
    Activations | LowRank | LowRankConv | OnGrid | Smaller, Field(discriminator="kind")
]
_ADAPTER: TypeAdapter[list[Any]] = TypeAdapter(Annotated[list[Record], Field(max_length=_MOST)])


def parse(found: Any, where: str = "structure") -> list[Any]:
    """Records from plain values; raises :class:`FormatError` for what is none."""
    try:
        return _ADAPTER.validate_python(found)
    except ValidationError as e:
        first = e.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise FormatError(
            f"{where}: the metadata's structure is damaged: {at}: {first['msg']}"
        ) from e


def metadata(records: Iterable[BaseModel]) -> dict[str, Any] | None:
    """What to pack beside the tensors; None for an unchanged network."""
    plain = [r.model_dump(mode="json") for r in records]
    return {_KEY: plain} if plain else None


def rebuild(model: nn.Module, records: Iterable[Any]) -> nn.Module:
    """Do the recorded changes to a network of the original class; values are to be loaded.

    The model is changed, and returned where that is possible; a captured graph, or a folded
    network, is another module. Layers are found by their whole names: a record is a file's word,
    and holds no pattern.

    Raises :class:`ArgumentError` where the network is not the one that was changed; some of the
    changes may then be done (:func:`load` tries them on a copy).
    """
    for record in records:
        model = _REBUILD[type(record)](model, record)
    return model


def _activations(model: nn.Module, record: Activations) -> nn.Module:
    from gossamer.quantize import capture
    from gossamer.quantize.activations import quantize_activations_

    there = capture.known(model, record.functional)
    for name in record.layers:
        if name not in there:
            raise ArgumentError(
                f"the network has no activation {name[:100]!r}, which was quantized; it has: "
                f"{', '.join(there[:20]) or 'none'}"
            )
    return quantize_activations_(
        model,
        record.bits,
        estimator=record.estimator,
        form=record.form,
        alpha=1.0,
        learned=record.learned,
        include=record.layers,
        functional=record.functional,
    )


def _low_rank(model: nn.Module, record: LowRank) -> nn.Module:
    for name, rank in record.ranks.items():
        layer = dict(model.named_modules()).get(name) if name else None
        if layer is None:
            raise ArgumentError(f"the network has no layer {name[:100]!r}, which was factorized")
        if not isinstance(layer, nn.Linear):
            raise ArgumentError(f"{name!r} is {type(layer).__name__}, and was an nn.Linear")
        if rank * (layer.in_features + layer.out_features) >= layer.weight.numel():
            raise ArgumentError(
                f"{name!r} of {layer.in_features} x {layer.out_features} was not factorized to "
                f"rank {str(rank)[:20]}: two such layers are no smaller than one"
            )
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        pair = nn.Sequential(
            nn.Linear(layer.in_features, rank, bias=False, **like),
            nn.Linear(rank, layer.out_features, bias=layer.bias is not None, **like),
        )
        setattr(owner, attribute, pair.train(layer.training))
    return model


def _low_rank_conv(model: nn.Module, record: LowRankConv) -> nn.Module:
    from gossamer.structure.factors import CONVOLUTIONS, build

    for name, (form, ranks, bias) in record.layers.items():
        layer = dict(model.named_modules()).get(name) if name else None
        if layer is None:
            raise ArgumentError(f"the network has no layer {name[:100]!r}, which was factorized")
        if type(layer) not in (nn.Linear, *CONVOLUTIONS) or getattr(layer, "groups", 1) != 1:
            raise ArgumentError(
                f"{name!r} is {type(layer).__name__}, and was a linear layer or a convolution "
                "without groups"
            )
        try:
            made = build(layer, form, ranks, bias=bias)
        except ArgumentError as e:
            raise ArgumentError(f"{name!r} was not factorized so: {e}") from e
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, made)
    return model


def _on_grid(model: nn.Module, record: OnGrid) -> nn.Module:
    from gossamer.quantize.emulated import Emulated
    from gossamer.quantize.fixed_point import Format
    from gossamer.quantize.network import FixedPoint, Layer
    from gossamer.quantize.steps import read
    from gossamer.structure.fold import fold_batchnorm

    try:
        folded = fold_batchnorm(model)
    except ArgumentError:  # an axis that only the input's shape tells
        like = next(model.parameters(), torch.zeros(0))
        folded = fold_batchnorm(model, torch.zeros(1, *record.shape).to(like))
    program = read(folded)
    steps = {step.name for step in program.steps}
    if steps != set(record.data) or set(program.weights) != set(record.layers):
        odd = sorted(steps ^ set(record.data)) or sorted(set(program.weights) ^ set(record.layers))
        raise ArgumentError(f"the network is not the one that was put on grids: {odd[0]!r} differs")
    layers = {}
    for name, (weight, bias) in program.weights.items():
        form, bias_form = Format(*record.layers[name][:2]), Format(*record.layers[name][2:])
        layers[name] = Layer(weight, form, bias, bias_form)
    formats = {step.name: Format(record.bits, record.data[step.name]) for step in program.steps}
    net = FixedPoint(program, layers, formats, {})
    net.measure(record.shape)
    return Emulated(folded, net)


def _smaller(model: nn.Module, record: Smaller) -> nn.Module:
    from gossamer.structure.surgery.plan import Plan, Replaced, apply

    replaced = {n: Replaced(s.kind, s.sizes, s.kept) for n, s in record.replaced.items()}
    return apply(model, Plan(replaced, record.shapes, record.numbers, record.picked))


_REBUILD: Mapping[type, Any] = {
    Activations: _activations,
    LowRank: _low_rank,
    LowRankConv: _low_rank_conv,
    OnGrid: _on_grid,
    Smaller: _smaller,
}


def shown(record: Any) -> str:
    """A record in one line: its kind, and how much it is about."""
    counts = {
        k: len(v) for k, v in record.model_dump().items() if isinstance(v, (dict, list, tuple))
    }
    return f"{record.kind}: " + ", ".join(f"{n} {k}" for k, n in counts.items() if n)


def recorded(path: str | Path | bytes, *, max_bytes: int | None = None) -> list[Any]:
    """The changes that a file tells of; raises :class:`FormatError` for damage.

    No tensor is decoded, so by default a file may claim any number of bytes.
    """
    with Archive(path, max_bytes=ANY_BYTES if max_bytes is None else max_bytes) as archive:
        return parse(archive.metadata.get(_KEY, []), archive.where)


def load(
    path: str | Path | bytes | Archive,
    model: nn.Module,
    *,
    strict: bool = True,
    max_bytes: int | None = None,
) -> nn.Module:
    """Decode a file into a network: :func:`gossamer.pack.load_into`, and the changes it tells of.

    Use what is returned: a file of a network that was changed makes the same changes to ``model``,
    which may give another module. They are made, and the file decoded, on a copy first, so that a
    file that does not fit leaves ``model`` as it was.

    Raises as :func:`gossamer.pack.load_into`, and :class:`ArgumentError` where the changes do not
    fit the network.
    """
    if not isinstance(model, nn.Module):
        return load_into(path, model)  # which refuses it
    if isinstance(path, Archive):
        records = parse(path.metadata.get(_KEY, []), path.where)
    else:
        records = recorded(path, max_bytes=max_bytes)
    if records:
        load_into(path, rebuild(_copy(model), records), strict=strict, max_bytes=max_bytes)
    return load_into(path, rebuild(model, records), strict=strict, max_bytes=max_bytes)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as e:  # the user's own classes, which may raise anything
        raise ArgumentError(
            f"{type(model).__name__} cannot be copied ({e}), so that the changes which the file "
            "tells of cannot be tried first; build it anew, without hooks and open files"
        ) from e
