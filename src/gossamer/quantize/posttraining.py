"""A trained network compressed from inputs alone, layer by layer, as an input meets them.

Each layer is treated with the inputs that the layers treated before give it
(:mod:`gossamer.quantize.layerwise`); biases and batch-norm statistics follow where inputs that were
held back say that it helps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import access, names
from gossamer.core.errors import ArgumentError
from gossamer.core.memory import give_back
from gossamer.core.plain import copied
from gossamer.quantize.layerwise import Treatment, treat
from gossamer.training.checkpoints import load_checkpoint, save_atomic
from gossamer.training.layer_inputs import Reading
from gossamer.training.layer_stream import stream, streamed
from gossamer.training.moments import Moments, moments
from gossamer.training.renorm import reestimate

__all__ = ["Layers", "treat_network"]

_HOLDING = 4  # from so many batches on, the last is held back for biases and batch-norms


@dataclass(frozen=True)
class Layers:
    """What :func:`treat_network` did.

    Attributes:
        rows: of each layer, in order: ``name``; ``seen``, whether its inputs were; what
            :func:`~gossamer.quantize.layerwise.treat` returns; and ``note``: what is to be said of
            it, mostly nothing.
        batch_norm: whether its statistics were measured anew; None: there are none, or nothing was
            held back.
    """

    rows: list[dict[str, Any]]
    batch_norm: bool | None


def treat_network(
    model: nn.Module,
    batches: Sequence[Any],
    wanted: Mapping[str, Treatment],
    read: Mapping[str, Reading],
    *,
    masks: Mapping[str, Tensor] | None = None,
    correct: bool = True,
    kept: Callable[[int], Path] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Layers:
    """Treat weights of a network in place.

    Args:
        batches: calibration inputs, as :func:`gossamer.training.layer_inputs.inputs_of` takes them;
            of four or more, the last decides over biases and batch-norms and nothing else.
        wanted: clean name of a weight -> what becomes of it.
        read: :func:`gossamer.training.layer_inputs.readers` of this network and these batches.
        masks: clean name -> True where something may stay.
        correct: move biases and batch-norm statistics.
        kept: number of a layer -> the file that keeps it, from which a killed call goes on, to the
            same bits.
        progress: called with layers done, layers, and the layer's name.

    Raises :class:`ArgumentError` for a name that is no matrix of the network.
    """
    every = names.parameters(model)
    for name in wanted:
        if name not in every or every[name].ndim < 2:
            raise ArgumentError(f"{name!r} is no parameter of two or more dimensions")
    held = 1 if correct and len(batches) >= _HOLDING else 0
    biases = {n: b for n, b in _biases(model).items() if n in wanted} if held else {}
    rows: list[dict[str, Any]] = []
    order = [*(n for n in read if n in wanted), *(n for n in wanted if n not in read)]
    once = streamed(model, batches, {n: every[n] for n in order if n in read}, biases)
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    original = copied(model) if once is None or (held and norms) else None
    if once is not None:
        order = [*once, *(n for n in order if n not in once)]
    ready = {n for i, n in enumerate(order) if kept is not None and kept(i).exists()}

    def walk() -> Generator[tuple[str, Moments | None]]:
        """Every layer with its inputs' moments, as the layers before it are by now."""
        if once is not None:
            flow = stream(
                model, batches, once, every, biases,
                gather=lambda _: Moments(), known=ready, held=held,
            )  # fmt: skip
            with contextlib.closing(flow):
                yield from flow
        for name in order if once is None else order[len(once) :]:
            seen = None
            if name in read and name not in ready and original is not None:
                seen = moments(model, original, batches, name, read[name].uses, held=held)
            yield name, seen

    with contextlib.closing(walk()) as layers:  # an error in between ends all passes
        for done, (name, seen) in enumerate(layers):
            weight, bias = every[name], biases.get(name)
            path = None if kept is None else kept(done)
            if path is not None and path.exists():
                rows.append(_restored(path, weight, bias))
            else:
                row = {"name": name, "seen": seen is not None}
                mask = None if masks is None else masks.get(name)
                give_back()
                row |= treat(weight, seen, wanted[name], mask=mask, bias=bias)
                rows.append({**row, "note": _said(row, seen)})
                if path is not None:
                    found = {"weight": weight.detach(), "row": rows[-1]}
                    save_atomic(found | ({} if bias is None else {"bias": bias.detach()}), path)
            give_back()
            if progress is not None:
                progress(done + 1, len(order), name)
    renewed = None
    if held and original is not None:
        renewed = reestimate(model, original, batches[:-held], batches[-held:])
    return Layers(rows, renewed)


def _biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weight -> the bias beside it, where nothing else reads either."""
    every, shared = names.parameters(model), access.aliases(model)
    tied = set(names.tied(model).values())
    found: dict[str, nn.Parameter] = {}
    for name, p in every.items():
        head, dot, leaf = name.rpartition(".")
        beside = f"{head}{dot}{leaf.replace('weight', 'bias')}"
        bias = every.get(beside)
        if p.ndim < 2 or bias is None or bias.ndim != 1 or id(bias) in shared:
            continue
        if not tied & {name, beside}:
            found[name] = bias
    return found


@torch.no_grad()
def _restored(path: Path, weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """A layer that a run which was killed had finished."""
    found = load_checkpoint(path)
    weight.copy_(found["weight"])
    if bias is not None:
        bias.copy_(found["bias"])
    row: dict[str, Any] = found["row"]
    return row


def _said(row: Mapping[str, Any], seen: Moments | None) -> str:
    """What is to be said of how a layer was treated; empty where all is as it should be."""
    told = [row["left"]] if row["left"] else []
    if seen is None:
        return "; ".join(
            [*told, "its products were not seen: treated without regard to its inputs"]
        )
    if seen.mixed:
        told.append("it is read in two ways, of which the first was measured")
    if not seen.paired:
        told.append("its inputs differ in number from the original's: they count as they are now")
    if row["unseen"]:
        told.append(f"{row['unseen']:,} of its rows met no input")
    return "; ".join(told)
