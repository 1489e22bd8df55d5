"""What the stages do that change a network's modules: activations, fixed point, factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.compression import schema_fewbits as stages
from gossamer.compression.layers import chosen, per_layer
from gossamer.compression.records import Activations, LowRank, OnGrid, rebuild
from gossamer.compression.state import State, ends_of
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.datasets import Split, batches
from gossamer.quantize import IntegerNetwork, Precision, QuantizedReLU, calibrate, capture
from gossamer.quantize.activations import quantize_activations_
from gossamer.quantize.emulated import Emulated
from gossamer.quantize.network import FixedPoint
from gossamer.structure import factorize, svd_size
from gossamer.structure.fold import fold_batchnorm
from gossamer.training import evaluate

__all__ = ["activations", "fixed_point", "integer_figures", "svd"]

_BATCH = 64  # examples of a calibration batch
_COMPARED = (16, 8, 6, 4)


def _inputs(split: Split, count: int, generator: torch.Generator) -> list[Tensor]:
    """Random examples of a split, in batches."""
    rows = torch.randperm(len(split), generator=generator)[:count]
    return [split.batch(part)[0] for part in rows.split(_BATCH)]


def activations(state: State, stage: stages.Activations) -> None:
    """Quantized ReLUs in the place of ReLUs, and the training through them."""
    _, found = capture.activations(state.model, stage.functional, stage.include, stage.exclude)
    on_data = stage.alpha in ("lloyd", "learned")
    device = next(state.model.parameters()).device
    given = _inputs(state.data.train, 1024, state.generator(98)) if on_data else []
    model = quantize_activations_(
        state.model,
        stage.bits,
        estimator=stage.estimator,
        form=stage.form,
        alpha=stage.alpha if isinstance(stage.alpha, float) else None,
        calibration=[x.to(device) for x in given] if on_data else None,
        learned=stage.alpha == "learned",
        include=list(found),
        functional=stage.functional,
    )
    record = Activations(
        bits=stage.bits,
        estimator=stage.estimator,
        form=stage.form,
        learned=stage.alpha == "learned",
        functional=stage.functional,
        layers=tuple(found),
    )
    state.change(model, record)
    before = _alphas(model, found)
    notes: dict[str, Any] = {"bits": stage.bits, "estimator": stage.estimator}
    if stage.train is not None and stage.train.epochs:
        notes |= ends_of(state.train(stage.train, state.others(())))
    after = _alphas(model, found)
    notes["layers"] = [{"name": n, "start": before[n], "alpha": after[n]} for n in found]
    state.notes["activations"] = notes


def _alphas(model: nn.Module, found: Mapping[str, Any]) -> dict[str, float]:
    alphas = {}
    for name in found:
        module = model.get_submodule(name)
        assert isinstance(module, QuantizedReLU)  # what has just been put there
        alphas[name] = abs(float(module.alpha.detach()))
    return alphas


def fixed_point(state: State, stage: stages.FixedPoint) -> None:
    """Weights, biases and data on power-of-two grids, found by calibration."""
    split = getattr(state.data, stage.calibrate_on)
    given = _inputs(split, stage.calibration, state.generator(98))
    folded = fold_batchnorm(state.model, state.example())
    biases = stage.bias_bits or stage.activation_bits
    base = stage.activation_bits if isinstance(stage.bits, Mapping) else stage.bits
    precision = Precision(base, biases, stage.activation_bits, stage.mode == "dynamic")
    widths = _widths(state.model, stage)
    net = calibrate(folded, given, precision, weight_bits=widths)
    parameters = names.parameters(folded)
    with torch.no_grad():
        for name, value in net.values().items():
            parameters[name].copy_(value)
    codes = {n: t.clone() for n, t in net.named_buffers()}
    model = Emulated(folded, net)
    for name, value in model.net().named_buffers():
        if not torch.equal(value, codes[name]):
            raise ArgumentError(
                f"stage {state.name}: a layer that is used in several places needs one format "
                "for its bias; give bias_bits more bits, or each place its own layer"
            )
    notes: dict[str, Any] = {
        "mode": stage.mode,
        "activation_bits": stage.activation_bits,
        "float_accuracy": evaluate(state.model, state.data.validation).accuracy,
        "input_length": net.formats[net.program.steps[0].name].frac,
        "layers": _lengths(net),
    }
    if stage.compare:
        notes["compare"] = _compared(state, folded, given)
    state.change(model, _record(net))
    state.masks = Masks({n: parameters[n].detach() != 0 for n in state.masks})
    notes["integer"] = integer_figures(model, state.data.validation)
    state.notes["fixed_point"] = notes


def _widths(model: nn.Module, stage: stages.FixedPoint) -> dict[str, int]:
    """Bits of the layers that the recipe names."""
    if not isinstance(stage.bits, Mapping):
        return {}
    found: dict[str, int] = per_layer(model, chosen(model), stage.bits)
    return {name.removesuffix(".weight"): bits for name, bits in found.items()}


def _lengths(net: FixedPoint) -> list[dict[str, Any]]:
    rows = []
    for step in net.program.weights:
        layer = net.layer(step)
        assert layer is not None  # every step of program.weights has one
        rows.append(
            {
                "name": step,
                "bits": layer.form.bits,
                "weight": layer.form.frac,
                "bias": None if layer.bias is None else layer.bias_form.frac,
                "output": net.formats[step].frac,
            }
        )
    return rows


def _record(net: FixedPoint) -> OnGrid:
    layers = {}
    for step in net.program.weights:
        layer = net.layer(step)
        assert layer is not None  # every step of program.weights has one
        form, bias = layer.form, layer.bias_form
        layers[step] = (form.bits, form.frac, bias.bits, bias.frac)
    first = net.program.steps[0].name
    return OnGrid(
        bits=net.formats[first].bits,
        data={step.name: net.formats[step.name].frac for step in net.program.steps},
        layers=layers,
        shape=net.shapes[first],
    )


def _compared(state: State, folded: nn.Module, given: list[Tensor]) -> list[dict[str, Any]]:
    """Validation accuracy of both modes at each width, weights, biases and data alike."""
    rows = []
    for i, bits in enumerate(_COMPARED):
        row: dict[str, Any] = {"bits": bits}
        for j, mode in enumerate(("dynamic", "static")):
            net = calibrate(folded, given, Precision(bits, bits, bits, mode == "dynamic"))
            row[mode] = evaluate(net, state.data.validation).accuracy
            state.progress.count(f"{state.name} compare", 2 * i + j + 1, 2 * len(_COMPARED))
        rows.append(row)
    return rows


@torch.no_grad()
def integer_figures(model: Emulated, split: Split) -> dict[str, Any]:
    """The network on integers alone over a split: right answers, and whether every bit agrees."""
    integers = IntegerNetwork(model.net())
    correct, total, same = 0, 0, True
    for inputs, targets in batches(split, 500, generator=None):
        x, y = inputs.cpu(), targets.cpu()
        found = integers(x)
        same = same and torch.equal(found, model(x))
        correct += int((found.argmax(-1) == y).sum())
        total += len(y)
    return {"identical": same, "correct": correct, "total": total, "accuracy": correct / total}


def svd(state: State, stage: stages.Svd) -> None:
    """Linear layers as two, where that is smaller, and their training."""
    ranks = _ranks(state, stage)
    model, rows, made = state.model, [], {}
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)  # _ranks has looked
        made[name] = factorize(layer, rank)
        size = svd_size(layer.in_features, layer.out_features, rank)
        rows.append({"name": name, "rank": rank, "before": size.before, "after": size.after})
    record = LowRank(ranks=ranks)
    model = rebuild(model, [record])
    for name, pair in made.items():
        model.get_submodule(name).load_state_dict(pair.state_dict())
        state.masks.pop(f"{name}.weight", None)
        state.fixed.discard(f"{name}.weight")
    state.change(model, record)
    notes: dict[str, Any] = {"layers": rows}
    if stage.train is not None and stage.train.epochs:
        notes |= ends_of(state.train(stage.train, state.others(())))
    state.notes["svd"] = notes


def _ranks(state: State, stage: stages.Svd) -> dict[str, int]:
    """The rank of each linear layer that gets smaller."""
    weights = list(chosen(state.model, stage.include, stage.exclude))
    given: Any = stage.energy if stage.rank is None else stage.rank
    tied = names.tied(state.model)
    ranks: dict[str, int] = {}
    for weight, value in per_layer(state.model, weights, given).items():
        name = weight.removesuffix(".weight")
        layer = state.model.get_submodule(name) if weight.endswith(".weight") else None
        if type(layer) is not nn.Linear:
            continue
        if weight in tied.values():
            raise ArgumentError(f"{weight} is tied to another place; exclude it")
        rank = int(value) if stage.energy is None else _rank_of(layer, float(value))
        if rank * (layer.in_features + layer.out_features) < layer.weight.numel():
            ranks[name] = rank
    if not ranks:
        raise ArgumentError(
            f"stage {state.name}: no linear layer gets smaller; give a lower rank or energy, or "
            "leave the stage out"
        )
    return ranks


def _rank_of(layer: nn.Linear, energy: float) -> int:
    squares = torch.linalg.svdvals(layer.weight.detach().double()).square().cumsum(0)
    # the last sum is all of it, whatever rounding says of the others
    return min(len(squares), int((squares < energy * squares[-1]).sum()) + 1)
