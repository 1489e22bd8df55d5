"""Post-training compression from inputs alone: Optimal Brain Surgeon, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from gossamer.compression.layers import chosen, per_layer
from gossamer.compression.parts import examples
from gossamer.compression.settings import ByLayer, LayerDensity, Positive, Price
from gossamer.compression.size import Size, priced
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.core import access, names, nest
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.quantize.layerwise import Treatment
from gossamer.quantize.obs import Sparsity
from gossamer.quantize.posttraining import Layers, treat_network
from gossamer.training.layer_inputs import Reading, readers
from gossamer.training.reach import reach

__all__ = ["Obs"]


_PROBES = 16  # examples that a layer's reach is measured on
_LEAP, _GUESSES = 4, 5  # powers at once upwards; trials that are guessed before halves are taken
_MIDDLE, _LOWEST, _HIGHEST = 0.001, -20, 10  # rate: auto begins there; powers of two from there


class Obs(LayerStage):
    """Prune, round or code weights so that each layer's outputs on real inputs change least.

    From inputs alone, without training: each weight's error is carried to those not yet treated
    (:mod:`gossamer.core.obs`), and layers see the inputs that the layers treated before give.

    Attributes:
        density: the fraction kept; one number, or one by layer pattern (a layer that none names
            keeps its weights, and is treated only where ``bits`` or ``rate`` name it).
        sparsity: ``unstructured``, ``2:4``, ``4:8``, or ``1x4``: four neighbours along the inputs.
            Of a convolution they are four input channels at one place of its kernel, which the
            sparse kernels skip together.
        bits: values are -n..n times a step, n = 2^(bits - 1) - 1.
        group: weights that share a step: ``tensor``, ``channel`` (a row), or so many along a row.
        rate: in place of ``bits``: what 1000 bits of the file may cost, as a part of the power of
            the layer's outputs; the step follows from it. ``auto``: the highest, by factors of
            two, at which the validation score keeps the run's floor (``max_drop``); with the run's
            ``max_bytes`` all rates are multiplied by the factor whose file has that size.
        error_at: where ``rate`` counts a layer's error: at the ``layer``'s outputs, or at the
            ``network``'s, as far as it reaches them (:mod:`gossamer.training.reach`). ``auto``: the
            network's where a pass uses a weight again, as recurrent layers do: what their state is
            off grows with their steps.
        damp: added to the Hessian's diagonal, as a part of its mean.
        calibration: how many examples are looked at.
        calibrate_on: of which split; labels are not read, the test split decides nothing.
        embeddings: round or code the tables of embeddings as well.
        correct: move biases, and measure batch-norm statistics anew, where that brings outputs
            nearer on calibration inputs that are held back for it.
    """

    stage: Literal["obs"] = "obs"
    density: LayerDensity | None = None
    sparsity: Sparsity = "unstructured"
    bits: ByLayer[Annotated[int, Field(ge=2, le=16)]] | None = None
    group: Literal["tensor", "channel"] | Annotated[int, Field(ge=8)] = "channel"
    rate: Price | None = None
    error_at: Literal["auto", "layer", "network"] = "auto"
    damp: Positive = 0.01
    calibration: Annotated[int, Field(ge=1)] = 512
    calibrate_on: Literal["train", "validation"] = "train"
    embeddings: bool = False
    correct: bool = True

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
    def aims(self) -> bool:
        """Where bits have a price."""
        return self.rate is not None

    @property
    def shares(self) -> bool:  # type: ignore[override]
        """Where values are few."""
        return self.bits is not None or self.rate is not None

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Those of layers that multiply, and embeddings' tables; or the matrices of ``include``.

        In a network of which no layer is known, every matrix.
        """
        if self.include is not None:
            return {n: p for n, p in super().weights(model).items() if p.ndim >= 2}
        tables, every = _tables(model), names.parameters(model)
        known = names.matrices(model)
        known = known or {n for n, p in every.items() if p.ndim >= 2 and n not in tables}
        if self.embeddings:
            known |= tables
        return chosen(model, [n for n in every if n in known], self.exclude)

    def run(self, state: State) -> None:
        """Layer by layer, in the order in which an input meets them."""
        split = getattr(state.data, self.calibrate_on)
        batches = examples(split, self.calibration, state.generator(97))
        every = names.parameters(state.model)
        read = readers(state.model, batches, [n for n, p in every.items() if p.ndim >= 2])
        weights = self._found(state.model, read)
        given = {
            key: {} if (value := getattr(self, key)) is None
            else per_layer(state.model, weights, value)
            for key in self.by_layer
        }  # fmt: skip
        like = Treatment(sparsity=self.sparsity, group=self.group, damp=self.damp)
        wanted: dict[str, Treatment] = {}
        for name in weights:
            options: Any = {key: found[name] for key, found in given.items() if name in found}
            if options:
                wanted[name] = replace(like, **options)
        if not wanted:
            raise ArgumentError(f"stage {state.name} names no layer; give density, bits or rate")

        def treated(how: Mapping[str, Treatment], label: str) -> Layers:
            return treat_network(
                state.model,
                batches,
                how,
                read,
                masks=state.masks,
                correct=self.correct,
                kept=lambda number: state.out / f"{state.name}{label}-{number}.train.pt",
                progress=lambda *now: state.progress.count(f"{state.name} layers", *now),
            )

        far = self._reach(state, batches[0], [n for n, how in wanted.items() if how.rate], read)

        def at(factor: float) -> dict[str, Treatment]:
            """Each layer's, with its rate times a factor; ``auto`` begins in the middle."""
            own = {n: _MIDDLE if h.rate == "auto" else h.rate for n, h in wanted.items()}
            return {
                n: replace(how, rate=factor * rate / far[n]) if (rate := own[n]) else how
                for n, how in wanted.items()
            }

        rate = None
        if state.size is not None:
            factor, done = _sized(state, state.size, lambda f, label: treated(at(f), label))
            first = _MIDDLE if self.rate == "auto" else self.rate
            rate = factor * first if isinstance(first, float) else None  # by layer: the size's row
        elif self.rate == "auto":
            rate, done = _highest(state, lambda r, label: treated(at(r / _MIDDLE), label))
        else:
            done = treated(at(1.0), "")
        state.fixed -= set(wanted)
        pruned = {n for n in wanted if n in given["density"] or n in state.masks}
        state.masks.update(Masks.of({n: every[n] for n in pruned}))
        if self.shares:
            state.fixed |= {n for n in wanted if n in given["bits"] or n in given["rate"]}
        for row in done.rows:
            if far.get(row["name"], 1.0) != 1:
                row["reach"] = far[row["name"]]
        outside = _outside(state.model, wanted, read)
        for row in (*done.rows, *outside):
            if row["note"]:
                state.progress.say(f"  {row['name']}: {row['note']}")
        state.notes["obs"] = {
            "layers": done.rows,
            "outside": outside,
            "examples": min(self.calibration, len(split)),
            "batch_norm": done.batch_norm,
        } | ({} if rate is None else {"rate": rate})

    def _reach(
        self, state: State, batch: Any, coded: list[str], read: Mapping[str, Reading]
    ) -> dict[str, float]:
        """How much of the error of each rate-coded layer counts."""
        again = any(n in read and max(read[n].uses) > 1 for n in coded)
        if self.error_at == "layer" or (self.error_at == "auto" and not again):
            return dict.fromkeys(coded, 1.0)
        return reach(
            state.model,
            [nest.mapped(lambda t: t[:_PROBES], batch)],
            coded,
            generator=state.generator(96),
            progress=lambda *now: state.progress.count(f"{state.name} reach", *now),
        )

    def _found(self, model: nn.Module, read: Mapping[str, Reading]) -> list[str]:
        """What it acts on; besides the layers that are known, what a batch was multiplied with."""
        known, every = set(self.weights(model)), names.parameters(model)
        if self.include is None:
            left = set(names.select(every, self.exclude, model)) if self.exclude else set[str]()
            more = {n for n, r in read.items() if r.multiplied or self.embeddings}
            more -= known | left | (set() if self.embeddings else _tables(model))
            known |= {n for n in more if id(every[n]) not in access.aliases(model)}
        return [n for n in every if n in known]


def _highest(state: State, treated: Callable[[float, str], Layers]) -> tuple[float, Layers]:
    """The network at the highest rate that keeps the floor; the lowest where none does."""
    start = {n: t.detach().clone() for n, t in state.model.state_dict().items()}
    found: dict[int, float] = {}
    best: tuple[int, Layers, dict[str, Any]] | None = None
    while (power := _next(found)) is not None:
        state.model.load_state_dict(start)
        rate = _MIDDLE * 2.0**power
        done = treated(rate, f"{power:+d}")
        judged = state.judge()
        kept, lost = True, 0.0
        if state.floor is not None:
            reference, allowed = state.floor
            kept = judged.metric.keeps(reference, judged.score, allowed)
            lost = judged.metric.drop(reference, judged.score) / max(allowed, 1e-9)
        state.progress.say(
            f"  rate {rate:.3g}: validation {judged.metric.name} "
            f"{judged.metric.show(judged.score)}, {'kept' if kept else 'below the floor'}"
        )
        found[power] = min(lost, 1.0) if kept else lost if lost > 1 else math.inf  # NaN
        if kept or min(found.values()) > 1:
            copies = {n: t.detach().clone() for n, t in state.model.state_dict().items()}
            best = power, done, copies
    assert best is not None  # the first rate was tried
    state.model.load_state_dict(best[2])
    return _MIDDLE * 2.0 ** best[0], best[1]


def _sized(
    state: State, size: Size, treated: Callable[[float, str], Layers]
) -> tuple[float, Layers]:
    """The network at the lowest factor of all rates whose file has the size."""
    start = {n: t.detach().clone() for n, t in state.model.state_dict().items()}
    labels: dict[float, str] = {}

    def measured(factor: float) -> int:
        """Bytes of the file at this factor."""
        labels[factor] = f"@{len(labels)}"
        state.model.load_state_dict(start)
        treated(factor, labels[factor])
        found = size.of(state)
        state.progress.say(f"  rates times {factor:.3g}: {found:,} bytes")
        return found

    factor, found = priced(size.most, 1.0, measured)
    state.model.load_state_dict(start)
    state.notes["size"] = {"most": size.most, "factor": factor, "bytes": found}
    return factor, treated(factor, labels[factor])  # its layers are on disk


def _next(found: Mapping[int, float]) -> int | None:
    """The power of two to try next, of those tried with the drop as a part of what is allowed.

    What is lost grows about as the rate does, so one trial says where the floor lies; then the
    power is between the highest that kept it and the lowest that did not, until they are
    neighbours. None: they are, or there is nothing left to try.
    """
    if not found:
        return 0
    good = max((p for p, lost in found.items() if lost <= 1), default=_LOWEST - 1)
    bad = min((p for p, lost in found.items() if lost > 1), default=_HIGHEST + 1)
    if bad - good < 2:
        return None
    logs = {p: math.log2(lost) for p, lost in found.items() if 0 < lost < math.inf}
    if good in logs and bad in logs:
        guess = good - logs[good] * (bad - good) / (logs[bad] - logs[good])
    elif bad not in found:
        guess = good + min(_LEAP, -logs[good] if good in logs else max(1, good + 1))
    elif good not in found:
        guess = bad - logs[bad] if bad in logs else 2 * bad - 1
    else:
        guess = (good + bad) / 2
    if len(found) > _GUESSES:
        guess = (max(good, _LOWEST) + min(bad, _HIGHEST)) / 2
    return min(max(math.floor(guess), good + 1), bad - 1)


def _tables(model: nn.Module) -> set[str]:
    """The weights of embeddings that no layer shares."""
    owners = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    held = {id(m.weight) for m in owners}
    return {n for n, p in names.parameters(model).items() if id(p) in held} - names.matrices(model)


def _outside(
    model: nn.Module, treated: Iterable[str], read: Mapping[str, Reading]
) -> list[dict[str, Any]]:
    """The matrices that were left as they are, by name, with the kind of their module and why."""
    tables, done = _tables(model), set(treated)
    owner = {id(p): type(m).__name__ for m in model.modules()
             for p in m.parameters(recurse=False)}  # fmt: skip
    rows = []
    for name, p in names.parameters(model).items():
        if p.ndim < 2 or name in done:
            continue
        why = "left as it is: the recipe does not name it"
        if name in tables:
            why = "left as it is: a table of an embedding (embeddings: true rounds it)"
        elif name not in read:
            why = "left as it is: nothing is multiplied with it"
        kind, count = owner[id(p)], p.numel()
        rows.append({"name": name, "kind": kind, "parameters": count, "note": why})
    return rows
