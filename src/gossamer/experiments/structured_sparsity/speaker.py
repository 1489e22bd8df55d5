"""A trained recurrent network that nobody wrote for the library, at half its units, taken out.

Resemblyzer's 3-layer LSTM speaker encoder with the weights its package ships (``pip install
--no-deps resemblyzer``; without it the experiment says so and ends). Half of the 768 units go by
the norm of all the weights that go with them (Wen et al., ICLR 2018: a unit's row in every gate,
its recurrent column, its column of what reads it), in each layer as many, for the last states of
all lie in one tensor, which the network reads. Nothing is trained afterwards: what the halving
costs is said, not bounded; what is judged is that the small network is the masked one.

Inputs are spectra of tones in noise, drawn by the seed: the equality must hold for any.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import gossamer
from gossamer.core import flops, names
from gossamer.core.access import copied
from gossamer.core.group_budgets import GroupBudget, group_scores, select
from gossamer.core.groups import families
from gossamer.core.timing import paired
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.shared.packages import speaker
from gossamer.pack import pack
from gossamer.structure import coupled_groups, shrink

__all__ = ["halved", "speaker_encoder"]


@torch.no_grad()
def halved(
    network: nn.Module, fresh: nn.Module, inputs: Tensor, file: Path, seconds: float
) -> dict[str, Any]:
    """A network at half its recurrent units: is it its masked self, smaller, faster, loadable?

    Args:
        network: whose outputs are embeddings; stays as it is.
        fresh: another of its class, as it is built; its weights do not count.
        inputs: (count, frames, bands), of which the first two are what the surgery sees.
        seconds: of timing at most, one input a call.
    """
    network.eval()
    example = inputs[:2]
    masked = copied(network)
    units = families(coupled_groups(masked, example, ["unit"]), names.parameters(masked))
    scores = group_scores(units, {n: p.abs() for n, p in names.weights(masked).items()}, "l2")
    select(units, scores, GroupBudget(0.5)).apply_(masked)
    made = shrink(masked, example)
    # shorter and longer than the example, and what no microphone gives
    others = [inputs, inputs[:, : inputs.shape[1] // 3], torch.randn(4, 160, inputs.shape[2])]
    apart = _apart(masked, made.model, others)
    archive = pack(made.model, file, metadata=made.metadata())
    for p in fresh.parameters():
        p.zero_()
    with mock.patch.object(pickle, "Unpickler", _refused), mock.patch("torch.load", _refused):
        again = gossamer.load(file, fresh).eval()
    before, after = network(inputs), made.model(inputs)
    one = inputs[:1]
    seen = paired(lambda: network(one), lambda: made.model(one), pairs=200, seconds=seconds)
    cosines = torch.nn.functional.cosine_similarity(before, after)
    return {
        "units": [[len(f) for f in units], _left(made.model)],
        "parameters": list(made.parameters),
        "macs": [flops.count(m, one).macs for m in (network, made.model)],
        "stays": [str(p) for p in made.pinned],
        "difference": apart,
        "reloaded_difference": _apart(again, made.model, others),
        "bytes": archive.file_bytes,
        "dense_bytes": sum(p.numel() * p.element_size() for p in network.parameters()),
        "ms": [1e3 * seen.first, 1e3 * seen.second],
        "times_as_fast": seen.ratio,
        "interval": seen.interval and list(seen.interval),
        "cosine": float(cosines.mean()),
        "worst_cosine": float(cosines.min()),
    }


def _apart(one: nn.Module, other: nn.Module, batches: list[Tensor]) -> float:
    """The largest difference of their outputs; NaN where there is any."""
    return float(torch.cat([(one(x) - other(x)).abs().flatten() for x in batches]).max())


def _refused(*_: Any, **__: Any) -> Any:
    raise RuntimeError("loading a file needs no pickle")


def _left(network: nn.Module) -> list[int]:
    """Units of each recurrent layer, by the widths of the recurrent weights."""
    found = names.parameters(network)
    return [p.shape[1] for n, p in found.items() if "weight_hh" in n]


def encoder(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """The package's network."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network, inputs = speaker(8 if quick else 64, generator)
    fresh, _ = speaker(1, generator)
    file = work / f"speaker-{seed}.gsm"
    return halved(network, fresh, inputs, file, 1.0 if quick else 10.0)


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    page, claims = "structured-sparsity.beyond", []
    for row in raw["runs"]:
        where = "speaker encoder of 3 LSTM layers at half its units"
        low = (row["interval"] or [0.0])[0]
        claims += [
            Claim(page, f"{where}: largest difference of shrunk and masked embeddings",
                  row["difference"], "<=", 1e-5),
            Claim(page, f"{where}: parameters left, part of before",
                  row["parameters"][1] / row["parameters"][0], "<=", 0.5),
            Claim(page, f"{where}: largest difference once loaded from its file, without pickle",
                  row["reloaded_difference"], "==", 0.0),
            Claim(page, f"{where}: times as fast in torch, batch 1, lower end of 95 %",
                  low, ">", 1.0),
        ]  # fmt: skip
    return claims


@experiment("shrink-speaker-encoder", seeds=(0,), judge=_judge)
def speaker_encoder(context: Context) -> dict[str, Any]:
    """Structured sparsity: a package's trained 3-layer LSTM halved, equal to its masked self."""
    jobs = [(s, context.work, context.quick) for s in context.seeds]
    rows = context.alone(encoder, jobs)
    for row in rows:
        context.say(
            f"{row['units'][1]} units, {row['times_as_fast']:.2f}x as fast, cosine "
            f"{row['cosine']:.3f}"
        )
    return {"runs": rows}
