"""A network's layers as factors of low rank, fitted to their responses from the bottom up.

:mod:`gossamer.structure.low_rank` has the paper and the fit of one layer,
:mod:`gossamer.structure.factors` the forms, :mod:`gossamer.structure.rank_selection` the ranks.
Here they meet a network: its responses behind batch-norm are sampled at the same random positions
in the original and in the network as it becomes, all layers in one pass
(:mod:`gossamer.training.layer_stream`); what batch-norm does is taken back out of the factors, so
that it stays where it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core import access, names
from gossamer.core.errors import ArgumentError
from gossamer.core.graph import check_same
from gossamer.structure.factors import (
    CONVOLUTIONS,
    build,
    check_layer,
    composed,
    decompose,
    fill,
    macs,
    matrix,
    parameters,
)
from gossamer.structure.low_rank import Pairs, Reconstruction, fit_linear, fit_nonlinear
from gossamer.structure.responses import Follower, Layer, Positions, Sample, followers, geometry
from gossamer.training.layer_inputs import Use, inputs_of, readers
from gossamer.training.layer_stream import stream, streamed
from gossamer.training.moments import gathered

__all__ = ["KINDS", "Factorized", "Kind", "Survey", "approximate", "form_of", "replace", "survey"]

Kind = Literal["nonlinear", "linear", "spatial", "tucker", "cp", "svd"]
KINDS: tuple[Kind, ...] = ("nonlinear", "linear", "spatial", "tucker", "cp", "svd")


def form_of(kind: str, layer: nn.Module) -> str | None:
    """The form (:data:`~gossamer.structure.factors.FORMS`) that a kind gives a layer, if any."""
    linear = type(layer) is nn.Linear
    if kind in ("nonlinear", "linear", "svd"):
        return "channel"
    if kind == "spatial":
        if type(layer) is nn.Conv2d and max(layer.kernel_size) > 1:
            return "spatial"
        return "channel"  # nothing to split along; the same fit
    return None if linear else kind


@dataclass
class Survey:
    """What :func:`survey` saw of a network.

    Attributes:
        layers: by clean name, in the order of their use.
        pairs: sums of each layer's responses in the network as it is.
        left: layers that cannot be factorized, and why.
        note: why what follows the layers is not known; empty where it is.
        fixed: multiply-adds and parameters of the convolutions and linear layers that were not
            surveyed.
    """

    layers: dict[str, Layer]
    pairs: dict[str, Pairs]
    left: dict[str, str]
    note: str
    fixed: tuple[int, int]


def survey(
    model: nn.Module,
    batches: Sequence[Any],
    chosen: Sequence[str],
    *,
    positions: int = 10,
    generator: torch.Generator,
) -> Survey:
    """Look at layers and the energies of their responses; the network stays as it is.

    Args:
        batches: inputs, as :func:`gossamer.training.layer_inputs.inputs_of` takes them.
        chosen: clean names of layers' weights.
        positions: sampled of each example's responses.

    Raises :class:`ArgumentError` for no batches, a chosen weight that is tied to another or
    computed from others, and values that are not finite.
    """
    if not batches:
        raise ArgumentError("batches is empty; give calibration inputs")
    met, every = geometry(model, batches[0]), names.parameters(model)
    wanted = {n.removesuffix(".weight") for n in chosen}
    tied = names.tied(model)
    for alias, name in tied.items():
        for one in (alias, name):
            if one.rpartition(".")[0] in wanted:
                raise ArgumentError(f"{alias} is tied to {name}; exclude it, or untie the two")
    access.check_weights(model, {n: every[n] for n in chosen})
    example = batches[0] if not isinstance(batches[0], tuple) else (batches[0],)
    behind, note = followers(model, example)
    layers: dict[str, Layer] = {}
    left = dict.fromkeys(sorted(wanted - set(met)), "no batch reaches it")
    fixed = [0, 0]
    for name, (module, seen) in met.items():
        this: Any = module
        known = type(module) is nn.Linear or type(module) in CONVOLUTIONS
        if name not in wanted or not known or getattr(module, "groups", 1) != 1:
            where = (
                seen.before if isinstance(module, nn.modules.conv._ConvTransposeNd) else seen.after
            )
            fixed[0] += seen.calls * macs(this, None, (), seen.before, where)
            fixed[1] += sum(p.numel() for p in this.parameters())
            if name in wanted:
                groups = getattr(module, "groups", 1)
                why = f"it has {groups} groups" if known else f"it is {type(module).__name__}"
                left[name] = why
            continue
        check_layer(module, name)
        plain = Follower(torch.ones(len(this.weight)).to(this.weight).double(),
                         torch.zeros(len(this.weight)).to(this.weight).double(), False)  # fmt: skip
        layers[name] = Layer(name, module, seen, behind.get(name, plain))
    pairs: dict[str, Pairs] = {}
    weights = {f"{n}.weight": every[f"{n}.weight"] for n in layers}
    picks = Positions(batches, positions, generator)
    for number, batch in enumerate(batches):
        samples = {n: Sample(layer) for n, layer in layers.items()}

        def see(use: Use, samples: Mapping[str, Sample] = samples) -> None:
            samples[use.name.removesuffix(".weight")].add(use, use, len(weights[use.name]))

        inputs_of(model, batch, weights, see, pick=picks(number))
        for name, sample in samples.items():
            found = Pairs.of(*sample.pairs())
            pairs[name] = pairs[name] + found if name in pairs else found
    return Survey(layers, pairs, left, note, (fixed[0], fixed[1]))


@dataclass(frozen=True)
class Factorized:
    """What :func:`approximate` did.

    Attributes:
        made: clean name of a layer -> its factors, in the order of use.
        bias: which of them have one.
        rows: of each, for a report: ``name``, ``form``, ``ranks``, ``response`` (relu, linear, or
            weights: not fitted to any), ``macs`` and ``parameters`` (before, after), ``error``:
            the part of the sampled responses' power that is lost, of ReLU's where one follows;
            None where only weights were looked at.
    """

    made: dict[str, nn.Sequential]
    rows: list[dict[str, Any]]


def approximate(
    model: nn.Module,
    batches: Sequence[Any],
    seen: Survey,
    ranks: Mapping[str, Sequence[int]],
    *,
    kind: Kind = "nonlinear",
    asymmetric: bool = True,
    positions: int = 10,
    generator: torch.Generator,
    progress: Callable[[int, int, str], None] | None = None,
) -> Factorized:
    """Factors of layers; the network stays as it is (:func:`replace` puts them in).

    Args:
        ranks: of each layer, as its form takes them; a layer without is left.
        kind: what the factors are fitted to: responses (``nonlinear``: through ReLU where one
            follows; ``linear``; ``spatial``: k x 1, 1 x k and 1 x 1, through ReLU where one
            follows) or weights (``tucker``, ``cp``, ``svd``).
        asymmetric: layers see the inputs that the layers before give; else the original's.

    Raises :class:`ArgumentError` where the network with the factors does not compute what the fit
    had in mind (weights read elsewhere, hooks), and for responses that are not finite.
    """
    chosen = {n: seen.layers[n] for n in seen.layers if n in ranks}
    work = access.copied(model)
    every = dict(names.modules(work))
    for name, layer in chosen.items():  # a place for what the fit adds
        if every[name].bias is None:
            zero = torch.zeros(len(layer.module.weight)).to(layer.module.weight)
            every[name].bias = nn.Parameter(zero)
    made: dict[str, nn.Sequential] = {}
    rows: list[dict[str, Any]] = []

    def take(name: str, sample: Sample | None) -> None:
        error: float | None
        layer = chosen[name]
        form = form_of(kind, layer.module)
        assert form is not None
        if sample is None:
            made[name] = decompose(layer.module, form, ranks[name])
            error, response = None, "weights"
        else:
            made[name], error = _fitted(layer, form, ranks[name], sample, kind)
            response = "linear" if kind == "linear" else layer.kind
        this: Any = every[name]
        with torch.no_grad():
            this.weight.copy_(composed(made[name]).reshape(this.weight.shape))
            this.bias.copy_(0 if made[name][-1].bias is None else made[name][-1].bias)
        rows.append(_row(layer, form, ranks[name], made[name], error, response))
        if progress is not None:
            progress(len(rows), len(chosen), name)

    if kind in ("tucker", "cp", "svd"):
        for name in chosen:
            take(name, None)
    else:
        kernels = {n: _given(layer.module, form_of(kind, layer.module), ranks[n])
                   for n, layer in chosen.items()}  # fmt: skip

        def gather(weight: str) -> Sample:
            name = weight.removesuffix(".weight")
            return Sample(chosen[name], kernels[name], asymmetric)

        picks = Positions(batches, positions, generator)
        with contextlib.closing(_walk(work, batches, chosen, gather, picks)) as walk:
            for name, sample in walk:
                take(name, sample)
    done = access.copied(model)
    replace(done, made)
    example = batches[0] if not isinstance(batches[0], tuple) else (batches[0],)
    check_same(work, done, example, "the network with factors")
    return Factorized(made, rows)


def replace(model: nn.Module, made: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of others, by clean name."""
    raw = {clean: name for name, clean in names.cleaned(model).items()}
    for name, module in made.items():
        parent, _, attribute = raw[name].rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)


def _walk(
    work: nn.Module,
    batches: Sequence[Any],
    chosen: Mapping[str, Layer],
    gather: Callable[[str], Sample],
    picks: Positions,
) -> Generator[tuple[str, Sample]]:
    """Every layer with its responses, as the layers before it are by now."""
    own = names.parameters(work)
    weights = {f"{n}.weight": own[f"{n}.weight"] for n in chosen}
    biases = {f"{n}.weight": own[f"{n}.bias"] for n in chosen}
    once = streamed(work, batches[:1], weights, biases)
    if once is not None:
        flow = stream(work, batches, once, weights, biases, gather=gather, picks=picks)
        with contextlib.closing(flow):
            for weight, sample in flow:
                assert sample is not None
                yield weight.removesuffix(".weight"), sample
        return
    original = access.copied(work)
    for weight, reading in readers(work, batches, weights).items():
        sample = gather(weight)
        gathered(sample, work, original, batches, weight, reading.uses, picks=picks)
        yield weight.removesuffix(".weight"), sample


def _given(layer: Any, form: str | None, ranks: Sequence[int]) -> Tensor | None:
    """The kernel that the last two factors are fitted to, (d, c * taps): of ``spatial`` that of
    the first two.
    """
    if form != "spatial":
        return None
    return composed(decompose(layer, form, ranks[:1])).flatten(1)


def _fitted(
    layer: Layer, form: str, ranks: Sequence[int], sample: Sample, kind: str
) -> tuple[nn.Sequential, float]:
    """Factors, and the part of the responses' power that is lost."""
    now, wanted = sample.pairs()
    relu = layer.follower.relu and kind != "linear"
    if relu:
        found = fit_nonlinear(now, wanted, ranks[-1])
    else:
        found = fit_linear(Pairs.of(now, wanted), ranks[-1])
    target, got = wanted, found(now)
    if layer.follower.relu:
        target, got = target.clamp_min(0), got.clamp_min(0)
    power = float((target - target.mean(0)).square().sum())
    error = float((target - got).square().sum()) / power if power else 0.0
    made = build(layer.module, form, ranks, bias=True)
    return _unfolded(layer, form, ranks, found, made), error


def _unfolded(
    layer: Layer, form: str, ranks: Sequence[int], found: Reconstruction, made: nn.Sequential
) -> nn.Sequential:
    """The fit behind batch-norm as factors before it.

    ``s u + t ~ P (Q y^) + b`` with ``y^ = s (W x) + o`` (o: bias and t) gives
    ``u = (P / s) ((Q s W) x) + (P Q o + b - t) / s``. An output whose s is zero is t whatever u is.
    """
    s = layer.scale
    live = s.abs() > 1e-12 * s.abs().max()
    inverse = torch.where(live, 1 / s.where(live, torch.ones_like(s)), 0.0)
    before = []
    if form == "spatial":
        vertical, horizontal = decompose(layer.module, form, ranks[:1]).children()
        before, kernel = [matrix(vertical)], matrix(horizontal)
    else:
        kernel = matrix(layer.module)
    first = (found.first * s) @ kernel
    second = inverse[:, None] * found.second
    bias = inverse * (
        found.second @ (found.first @ layer.offset) + found.bias - layer.follower.shift
    )
    # both sides of a component as long as each other: for grids and for training
    ratio = (second.norm(dim=0) / first.norm(dim=1).clamp_min(1e-300)).sqrt()
    ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
    return fill(made, [*before, ratio[:, None] * first, second / ratio], bias)


def _row(
    layer: Layer,
    form: str,
    ranks: Sequence[int],
    made: nn.Sequential,
    error: float | None,
    response: str,
) -> dict[str, Any]:
    this, where = layer.module, layer.geometry
    after = where.calls * macs(this, form, ranks, where.before, where.after)
    return {
        "name": layer.name,
        "form": form,
        "ranks": list(ranks),
        "response": response,
        "macs": [layer.whole[0], after],
        "parameters": [
            layer.whole[1],
            parameters(this, form, ranks, bias=made[-1].bias is not None),
        ],
        "error": error,
    }
