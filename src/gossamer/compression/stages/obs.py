"""Post-training compression from inputs alone: Optimal Brain Surgeon, layer by layer."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.compression.layers import per_layer
from gossamer.compression.parts import examples
from gossamer.compression.settings import ByLayer, LayerDensity, Positive, Strength
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.core.obs import Choice, Kept, factor, solve, start_from
from gossamer.pack import pack_bytes
from gossamer.quantize.obs import (
    Coded,
    Prices,
    Pruned,
    Rounded,
    Sparsity,
    Within,
    scale_of,
    step_for,
)
from gossamer.training import load_checkpoint, save_atomic
from gossamer.training.layer_inputs import Moments
from gossamer.training.layer_stream import layer_by_layer

__all__ = ["Obs"]

_MOST = 2000  # codes of a rate-coded layer: -2000..2000
_PASSES = 3  # over a rate-coded layer: the first prices codes as rounding to nearest has them
_CODED = 1 << 18  # weights up to which prices are those of the real coder's bytes


class Obs(LayerStage):
    """Prune, round or code weights so that each layer's outputs on real inputs change least.

    From inputs alone, without training: each weight's error is carried to those not yet treated
    (:mod:`gossamer.core.obs`), and layers see the inputs that the layers treated before give.

    Attributes:
        density: the fraction kept; one number, or one by layer pattern (a layer that none names
            keeps its weights, and is treated only where ``bits`` or ``rate`` name it).
        sparsity: ``unstructured``, ``2:4``, ``4:8``, or ``1x4``: four neighbours along the inputs.
        bits: values are -n..n times a step, n = 2^(bits - 1) - 1.
        group: weights that share a step: ``tensor``, ``channel`` (a row), or so many along a row.
        rate: in place of ``bits``: what 1000 bits of the file may cost, as a part of the power of
            the layer's outputs; the step follows from it.
        damp: added to the Hessian's diagonal, as a part of its mean.
        calibration: how many examples are looked at.
        calibrate_on: of which split; labels are not read, the test split decides nothing.
    """

    stage: Literal["obs"] = "obs"
    density: LayerDensity | None = None
    sparsity: Sparsity = "unstructured"
    bits: ByLayer[Annotated[int, Field(ge=2, le=8)]] | None = None
    group: Literal["tensor", "channel"] | Annotated[int, Field(ge=8)] = "channel"
    rate: Strength | None = None
    damp: Positive = 0.01
    calibration: Annotated[int, Field(ge=1)] = 512
    calibrate_on: Literal["train", "validation"] = "train"

    rebuilds: ClassVar[bool] = True
    by_layer: ClassVar[tuple[str, ...]] = ("density", "bits", "rate")

    @model_validator(mode="after")
    def _something(self) -> Obs:
        if self.density is None and self.bits is None and self.rate is None:
            raise ValueError("give density, bits or rate: what becomes of the weights")
        if self.bits is not None and self.rate is not None:
            raise ValueError("give either bits (a grid of so many values) or rate (cheap codes)")
        every = self.density.values() if isinstance(self.density, dict) else (self.density,)
        if ":" in self.sparsity and any(d != 0.5 for d in every):
            raise ValueError(f"sparsity {self.sparsity} keeps half; give density: 0.5")
        return self

    @property
    def shares(self) -> bool:  # type: ignore[override]
        """Where values are few."""
        return self.bits is not None or self.rate is not None

    def run(self, state: State) -> None:
        """Layer by layer, in the order in which an input meets them."""
        weights = self.weights(state.model)
        wanted = {
            key: {}
            if (value := getattr(self, key)) is None
            else per_layer(state.model, weights, value)
            for key in self.by_layer
        }
        treated = [n for n in weights if any(n in found for found in wanted.values())]
        if not treated:
            raise ArgumentError(f"stage {state.name} names no layer; give density, bits or rate")
        split = getattr(state.data, self.calibrate_on)
        batches = examples(split, self.calibration, state.generator(97))
        rows: list[dict[str, Any]] = []
        done = _Finished(state)
        layers = layer_by_layer(state.model, batches, treated, done.rows)
        with contextlib.closing(layers):
            for name, seen in layers:
                if name in done.rows:
                    row = done.put(name, weights[name])
                else:
                    options = {key: found.get(name) for key, found in wanted.items()}
                    row = self._treat(weights[name], seen, state.masks.get(name), **options)
                    done.add(name, weights[name], row)
                rows.append({"name": name, **row})
                state.progress.count(f"{state.name} layers", len(rows), len(treated), name)
        state.fixed -= set(treated)
        pruned = {n for n in treated if n in wanted["density"] or n in state.masks}
        own = names.parameters(state.model)
        state.masks.update(Masks.of({n: own[n] for n in pruned}))
        if self.shares:
            state.fixed |= {n for n in treated if n in wanted["bits"] or n in wanted["rate"]}
        state.notes["obs"] = {"layers": rows, "examples": sum(len(b) for b in batches)}

    @torch.no_grad()
    def _treat(
        self,
        weight: nn.Parameter,
        seen: Moments | None,
        mask: Tensor | None,
        *,
        density: float | None,
        bits: int | None,
        rate: float | None,
    ) -> dict[str, Any]:
        """Set one weight; what became of it."""
        turned = seen is not None and seen.turned
        groups = 1 if seen is None or seen.hessian is None else len(seen.hessian)
        plain = weight.detach().T if turned else weight.detach()
        matrix = plain.reshape(groups, plain.shape[0] // groups, -1).double()
        columns = matrix.shape[2]
        eye = torch.eye(columns, dtype=torch.float64, device=weight.device)
        hessian = eye.expand(groups, -1, -1) if seen is None else _given(seen.hessian)
        power = float((matrix @ hessian * matrix).sum())
        if not power > 0:
            return {"seen": seen is not None, "density": _density(weight), "error": 0.0}
        start = matrix
        if seen is None:
            hessian = hessian / power
        else:
            start = torch.stack(
                [
                    start_from(w, h, c, self.damp)
                    for w, h, c in zip(matrix, hessian, _given(seen.cross), strict=True)
                ]
            )
            seen.cross = None  # of a wide layer it is large
            hessian.div_(power)  # err^2 is then a part of the power of the layer's outputs
        uppers = [factor(h, self.damp) for h in hessian]
        within = None if mask is None else (mask.T if turned else mask).reshape(matrix.shape)

        def solved(inner: list[Choice]) -> Tensor:
            parts = []
            for g, choice in enumerate(inner):
                if density is not None and density < 1:
                    choice = Pruned(density, self.sparsity, choice)
                if within is not None:
                    choice = Within(within[g].to(matrix.device), choice)
                parts.append(solve(start[g], uppers[g], choice).weight)
            return torch.stack(parts)

        row: dict[str, Any] = {}
        if rate is not None:
            diagonal = torch.cat([u.diagonal() for u in uppers])
            cost = rate / 1000
            step = step_for(diagonal, cost)
            found = start
            for _ in range(_PASSES):
                prices = _prices((found / step).round(), step, plain.shape)
                tall = matrix.shape[1]
                found = solved(
                    [Coded(step, cost, prices[g * tall : (g + 1) * tall]) for g in range(groups)]
                )
            codes = (found / step).round().flatten(0, 1)
            row["bits"] = float(prices.of(codes).sum())
        elif bits is not None:
            group = self.group if isinstance(self.group, int) else None
            step = None
            if self.group == "tensor":
                metric = torch.stack([u.diagonal().square().reciprocal() for u in uppers])
                every = metric[:, None].expand_as(start).reshape(-1)
                step = float(scale_of(start.reshape(1, -1), bits, every))
            found = solved([Rounded(bits, group, step) for _ in uppers])
        else:
            found = solved([Kept() for _ in uppers])
        left = matrix - found
        error = float((left @ hessian * left).sum())
        values = found.reshape(plain.shape)
        weight.copy_((values.T if turned else values).to(weight.dtype))
        return {**row, "seen": seen is not None, "density": _density(weight), "error": error}


def _prices(codes: Tensor, step: float, shape: torch.Size) -> Prices:
    """Of codes (groups, rows, columns), as the smallest file of such codes has them."""
    flat = codes.flatten(0, 1)
    prices = Prices.fitted(flat, _MOST)
    if flat.numel() > _CODED:
        return prices
    values = {"": (codes * step).float().reshape(shape)}
    taken = len(pack_bytes(values, profile="smallest")) - _empty()
    return prices * (8 * taken / max(1.0, float(prices.of(flat).sum())))


@cache
def _empty() -> int:
    return len(pack_bytes({"": torch.zeros(0)}, profile="smallest"))


class _Finished:
    """Layers that are done, kept as files until the stage is: a killed run goes on behind them."""

    def __init__(self, state: State) -> None:
        self._start = state.out / f"{state.name}"
        self.rows: dict[str, dict[str, Any]] = {}
        self._files: dict[str, Path] = {}
        while (path := self._path(len(self.rows))).exists():
            found = load_checkpoint(path)
            self.rows[found["name"]], self._files[found["name"]] = found["row"], path

    def _path(self, number: int) -> Path:
        return self._start.with_name(f"{self._start.name}-{number}.train.pt")

    def add(self, name: str, weight: Tensor, row: dict[str, Any]) -> None:
        """Keep a layer."""
        path = self._path(len(self.rows))
        save_atomic({"name": name, "row": row, "weight": weight.detach().cpu()}, path)
        self.rows[name], self._files[name] = row, path

    @torch.no_grad()
    def put(self, name: str, weight: Tensor) -> dict[str, Any]:
        """Set the weight to what was found; its row."""
        weight.copy_(load_checkpoint(self._files[name])["weight"])
        return self.rows[name]


def _given(moment: Tensor | None) -> Tensor:
    assert moment is not None  # moments() has refused what no batch reaches
    return moment


def _density(weight: Tensor) -> float:
    return float(torch.count_nonzero(weight)) / max(1, weight.numel())
