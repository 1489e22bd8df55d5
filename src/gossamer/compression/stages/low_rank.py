"""Layers as factors of low rank, fitted to responses, with ranks under one budget."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from gossamer.compression import records
from gossamer.compression.layers import per_layer
from gossamer.compression.parts import examples
from gossamer.compression.settings import ByLayer, LayerDensity, Positive, Training
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State, ends_of
from gossamer.core import access, names, nest
from gossamer.core.errors import ArgumentError
from gossamer.core.files import write_text
from gossamer.core.timing import paired
from gossamer.structure.factors import CONVOLUTIONS
from gossamer.structure.fit_network import (
    Factorized,
    Kind,
    Survey,
    approximate,
    form_of,
    replace,
    survey,
)
from gossamer.structure.ladders import Levels, costs, levels, whole_milliseconds
from gossamer.structure.rank_selection import Ladder, choose_ranks
from gossamer.training.renorm import reestimate

__all__ = ["LowRank"]


class LowRank(LayerStage):
    """Convolutions and linear layers as factors of low rank, where that costs less.

    Fitted from inputs alone, from the bottom up; layers with groups, transposed convolutions and
    all others are left and named. Later stages name the factors ``LAYER.0``, ``LAYER.1``, ...

    Attributes:
        kind: what the factors are and are fitted to: ``nonlinear`` (responses, through ReLU where
            one follows), ``linear`` (responses), ``spatial`` (k x 1, 1 x k and 1 x 1, responses),
            ``tucker``, ``cp`` (kernels, by tensorly), ``svd`` (kernels).
        speedup: the whole network's cost over what it may be; ranks follow from the energies.
        energy: in its place: the least rank of each layer that keeps this part of its energy,
            where the layer costs less with it, by ``budget``.
        rank: in its place: components of the outputs, one number or one by layer pattern; the same.
        milliseconds: in its place: what the whole network may take, by ``budget: latency``.
        budget: what is counted: ``flops`` (multiply-adds), ``bytes`` (of parameters), or
            ``latency`` (measured layer by layer, batch 1, one thread, in torch; what is between
            the layers is left out of a ``speedup``, and part of ``milliseconds``). A layer that
            is not measured to be faster in factors stays as it is.
        multiple: ranks are multiples of it: kernels work in blocks of 8 or 16 channels.
        asymmetric: layers see the inputs that the layers before give, not the original's.
        images: how many examples are looked at; ``positions``: of each one's responses.
        calibrate_on: of which split; labels are not read.
        train: the training of the factors.
    """

    stage: Literal["low_rank"] = "low_rank"
    kind: Kind = "nonlinear"
    speedup: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    energy: LayerDensity | None = None
    rank: ByLayer[Annotated[int, Field(ge=1)]] | None = None
    milliseconds: Positive | None = None
    budget: Literal["flops", "bytes", "latency"] = "flops"
    multiple: Annotated[int, Field(ge=1)] = 1
    asymmetric: bool = True
    images: Annotated[int, Field(ge=1)] = 3000
    positions: Annotated[int, Field(ge=1)] = 10
    calibrate_on: Literal["train", "validation"] = "train"
    train: Training | None = None

    rebuilds: ClassVar[bool] = True
    by_layer: ClassVar[tuple[str, ...]] = ("energy", "rank")

    @model_validator(mode="after")
    def _one_way(self) -> LowRank:
        ways = (self.speedup, self.milliseconds, self.energy, self.rank)
        if sum(v is not None for v in ways) != 1:
            raise ValueError(
                "give one of speedup (of the whole network), milliseconds, energy (the part that "
                "is kept) and rank"
            )
        if self.milliseconds is not None and self.budget != "latency":
            raise ValueError("milliseconds is a budget of time; give budget: latency")
        if self.rank is not None and self.multiple > 1:
            raise ValueError("multiple is of ranks that are chosen; leave it out where rank is")
        if self.kind == "cp" and self.rank is None:
            raise ValueError("kind cp knows no energies to choose ranks by; give rank")
        return self

    @property
    def retrains(self) -> bool:
        """Where it trains at all."""
        return self.train is not None

    def covered(self, model: nn.Module) -> set[str] | None:
        """Of the weights those of linear layers and of convolutions without groups."""
        return (super().covered(model) or set()) & set(_known(model))

    def run(self, state: State) -> None:
        """Survey, ranks, factors, batch-norm measured anew, and their training."""
        model = state.model
        split = getattr(state.data, self.calibrate_on)
        batches = examples(split, self.images, state.generator(97))
        generator, known = state.generator(98), _known(model)
        chosen = [n for n in self.weights(model) if n in known]
        others = [n.removesuffix(".weight") for n in self.weights(model) if n not in known]
        seen = survey(model, batches, chosen, positions=self.positions, generator=generator)
        ranks, kept = self._ranks(state, seen)
        if not ranks:
            raise ArgumentError(
                f"stage {state.name}: no layer costs less at these settings; give a lower rank, "
                "energy or a higher speedup, or leave the stage out"
            )
        done = approximate(
            model, batches, seen, ranks, kind=self.kind, asymmetric=self.asymmetric,
            positions=self.positions, generator=generator,
            progress=lambda *now: state.progress.count(f"{state.name} layers", *now),
        )  # fmt: skip
        record = records.LowRankConv(
            layers={
                row["name"]: (row["form"], tuple(row["ranks"]), _last(done, row["name"]))
                for row in done.rows
            }
        )
        rows = [
            row | {"energy": kept[row["name"]], "ms": _measured(seen, done, row["name"])}
            for row in done.rows
        ]
        original = model if not _normed(model) else access.copied(model)
        replace(model, done.made)
        for name in done.made:
            state.factored(name)  # the bias is fitted, too
        state.change(model, record)
        # statistics of what the factors give now, where held-back inputs are nearer with them
        renewed = None
        if original is not model and len(batches) > 1:
            renewed = reestimate(model, original, batches[:-1], batches[-1:])
        left = seen.left | dict.fromkeys(
            others, "it is no linear layer or convolution without groups"
        )
        for name in seen.layers:
            if name not in ranks:
                left.setdefault(name, "it costs least as it is")
        notes: dict[str, Any] = {
            "kind": self.kind,
            "budget": self.budget,
            "layers": rows,
            "left": left,
            "note": seen.note,
            "batch_norm": renewed,
            "macs": _total(seen, rows, "macs"),
            "parameters": _total(seen, rows, "parameters"),
        }
        for name, why in left.items():
            state.progress.say(f"  {name}: left, {why}")
        if seen.note:
            state.progress.say(f"  {seen.note}")
        if self.train is not None and self.train.epochs:
            notes |= ends_of(state.train(self.train, state.others(())))
        state.notes["low_rank"] = notes

    def _ranks(
        self, state: State, seen: Survey
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
        """The ranks of the layers that get cheaper, and the energy that each keeps."""
        found: dict[str, Levels] = {}
        for name, layer in seen.layers.items():
            form = form_of(self.kind, layer.module)
            if form is None:
                seen.left[name] = f"kind {self.kind} is of convolutions"
            else:
                made = levels(
                    layer,
                    seen.pairs[name],
                    form,
                    weights=self.kind == "svd",
                    multiple=self.multiple,
                )
                if made.ranks:
                    found[name] = made
                else:
                    seen.left[name] = f"it has no rank that is a multiple of {self.multiple}"
        # measured once in a run: a restart must choose the same
        path = state.out / f"{state.name}-ranks.train.pt"
        if path.exists():
            at: dict[str, int] = json.loads(path.read_text())
        elif self.speedup is not None or self.milliseconds is not None:
            at = self._budgeted(state, seen, found)
        else:
            at = self._given(state.model, seen, found)
        write_text(path, json.dumps(at))
        ranks = {n: tuple(found[n].ranks[level]) for n, level in at.items()}
        return ranks, {n: found[n].energies[level] for n, level in at.items()}

    def _budgeted(self, state: State, seen: Survey, found: dict[str, Levels]) -> dict[str, int]:
        """Levels under the budget."""
        ladders, fixed = [], 0.0
        if self.budget == "flops":
            fixed = float(seen.fixed[0])
        elif self.budget == "bytes":
            sizes = {layer.module.weight.element_size() for layer in seen.layers.values()}
            fixed = float(seen.fixed[1] * max(sizes, default=4))
        for name, layer in seen.layers.items():
            if name in found:
                each, whole = costs(layer, found[name], self.budget)
                ladders.append(Ladder(name, found[name].energies, each, whole))
            else:
                fixed += costs(layer, Levels("channel", [], []), self.budget)[1]
        total = fixed + sum(ladder.whole for ladder in ladders)
        if self.milliseconds is not None:
            one = nest.mapped(lambda t: t[:1], state.example())
            one = one[0] if isinstance(one, tuple) else one
            fixed += max(0.0, whole_milliseconds(state.model, one) - total)
            most = self.milliseconds
        else:
            assert self.speedup is not None
            most = total / self.speedup
        chosen = choose_ranks(ladders, most, fixed=fixed)
        return {n: level for n, level in chosen.items() if level is not None}

    def _given(self, model: nn.Module, seen: Survey, found: dict[str, Levels]) -> dict[str, int]:
        """Levels by rank or energy, where the layer gets cheaper."""
        value: Any = self.energy if self.rank is None else self.rank
        at: dict[str, int] = {}
        for weight, one in per_layer(model, [f"{n}.weight" for n in found], value).items():
            name = weight.removesuffix(".weight")
            kept = found[name].energies
            if self.rank is None:
                level = next((i for i, e in enumerate(kept) if e >= one), len(kept) - 1)
            else:
                level = int(one) - 1
            if level >= len(kept):
                continue
            each, whole = costs(seen.layers[name], found[name], self.budget)
            if each[level] < whole:
                at[name] = level
        return at


def _known(model: nn.Module) -> list[str]:
    """Weights of linear layers, and of convolutions without groups."""
    return [
        f"{n}.weight"
        for n, m in names.modules(model).items()
        if type(m) is nn.Linear or (type(m) in CONVOLUTIONS and m.groups == 1)
    ]


def _last(done: Factorized, name: str) -> bool:
    return done.made[name][-1].bias is not None


def _normed(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _measured(seen: Survey, done: Factorized, name: str) -> list[float]:
    """Milliseconds of the layer and of its factors, batch 1, one thread, in torch."""
    layer, made = seen.layers[name], done.made[name]
    x = torch.randn(1, *layer.geometry.shape, generator=torch.Generator().manual_seed(0))
    x = x.to(layer.module.weight)
    with torch.inference_mode():
        found = paired(
            lambda: layer.module(x), lambda: made(x), pairs=20, seconds=0.2, device=x.device
        )
    return [1e3 * found.first, 1e3 * found.second]


def _total(seen: Survey, rows: list[dict[str, Any]], key: Literal["macs", "parameters"]) -> Any:
    """Before and after, of all convolutions and linear layers."""
    fixed = seen.fixed[key == "parameters"]
    rest = 0
    for name, layer in seen.layers.items():
        if name not in {row["name"] for row in rows}:
            rest += layer.whole[key == "parameters"]
    return [fixed + rest + sum(row[key][i] for row in rows) for i in (0, 1)]
