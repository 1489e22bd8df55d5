"""Intrinsic sparse structures: an LSTM language model with fewer units, as accurate and faster.

Wen et al., ICLR 2018, table 1, at a reduced size: War and Peace by words (the 1,000 most
frequent), 128-128 units in place of 1500-1500 on PTB. Deviations: Adam in place of SGD with a
clipped gradient, the proximal step in place of the sub-gradient, and a budget behind the lasso:
under Adam's equal steps units shrink together, and a strength that alone brings half of them to
zero (10 to 34 were tried) ruins the rest. So the lasso only sorts them, the half of each layer
with the larger norms stays (:func:`gossamer.core.group_budgets.select`), and is fine-tuned. The
baseline is trained on for as many epochs as lasso and fine-tuning take, and the better of its two
ends counts, by validation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import datasets, nets
from gossamer.core import names
from gossamer.core.group_budgets import GroupBudget, select
from gossamer.core.groups import Family
from gossamer.core.layer_groups import layer_groups
from gossamer.core.timing import paired
from gossamer.datasets import Dataset, Split
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.nets.language import LSTMLM
from gossamer.structure import GroupLasso, shrink
from gossamer.training import TrainConfig, evaluate, train

__all__ = ["iss_lstm", "units"]

_HIDDEN, _EMBEDDING, _VOCABULARY = 128, 64, 1000
_CONFIG = TrainConfig(1, lr=2e-3, batch_size=32, optimizer="adam", schedule="cosine")
_BASE, _LASSO, _FINE = 5, 3, 4  # epochs
_STRENGTH = 5.0


def _data(quick: bool) -> Dataset:
    options = f"level=word&bptt=35&vocabulary={_VOCABULARY}"
    return datasets.load(f"text:war-and-peace?{options}", subset=320 if quick else None)


def units(model: nn.Module) -> list[Family]:
    """The groups of its two layers, without biases."""
    after = {"rnn.0": "rnn.1", "rnn.1": "output"}
    return [f.weights_only() for f in layer_groups(model, "unit", consumers=after)]


def _sizes(model: LSTMLM) -> list[int]:
    return [layer.hidden_size for layer in model.rnn]  # type: ignore[misc]


def _perplexity(model: nn.Module, split: Split) -> float:
    return math.exp(evaluate(model, split).loss)


def one_seed(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Baseline, lasso, the cut, fine-tuning, the baseline's training on; timings."""
    data = _data(quick)
    example, _ = data.validation.batch(torch.arange(4))
    base, lasso, fine = (1, 1, 1) if quick else (_BASE, _LASSO, _FINE)
    config = replace(_CONFIG, seed=1000 * seed)
    dense = nets.build(
        "lstm-lm", classes=data.classes, embedding=_EMBEDDING, hidden=(_HIDDEN, _HIDDEN),
        dropout=0.2, seed=seed,
    )  # fmt: skip
    assert isinstance(dense, LSTMLM)
    train(dense, data, replace(config, epochs=base), checkpoint=work / f"dense-{seed}.pt")
    sparse = copy.deepcopy(dense)
    train(
        sparse,
        data,
        replace(config, epochs=lasso, seed=config.seed + 1),
        methods=[GroupLasso(units(sparse), _STRENGTH, form="proximal", threshold=0)],
        checkpoint=work / f"lasso-{seed}.pt",
    )
    made = units(sparse)
    norms = [family.norms(names.parameters(sparse)) for family in made]
    quantiles = [n.quantile(torch.linspace(0, 1, 11)).tolist() for n in norms]
    before = _perplexity(sparse, data.validation)
    select(made, norms, GroupBudget(0.5)).apply_(sparse)
    cut = _perplexity(sparse, data.validation)
    smaller = shrink(sparse, example).model
    assert isinstance(smaller, LSTMLM)
    sparse = smaller
    tuned = replace(config, lr=config.lr / 2, seed=config.seed + 100)
    train(sparse, data, replace(tuned, epochs=fine), checkpoint=work / f"tuned-{seed}.pt")
    longer = copy.deepcopy(dense)
    extra = replace(tuned, epochs=lasso + fine)
    train(longer, data, extra, checkpoint=work / f"longer-{seed}.pt")
    ends = [dense, longer]
    validation = [_perplexity(model, data.validation) for model in ends]
    best = ends[validation.index(min(validation))]
    return {
        "seed": seed,
        "norm_deciles": quantiles,
        "validation_on_the_way": {"lasso": before, "cut": cut},
        "hidden": _sizes(sparse),
        "validation": {"baseline": min(validation), "sparse": _perplexity(sparse, data.validation)},
        "test": {
            "baseline": _perplexity(best, data.test),
            "sparse": _perplexity(sparse, data.test),
        },
        "parameters": {
            "baseline": sum(p.numel() for p in dense.parameters()),
            "sparse": sum(p.numel() for p in sparse.parameters()),
        },
        "recurrent_weights": {
            name: sum(p.numel() for n, p in names.parameters(m).items() if "rnn" in n)
            for name, m in (("baseline", dense), ("sparse", sparse))
        },
        "ratio": {str(batch): _timed(best, sparse, batch, data.test) for batch in (1, 20)},
    }


def _timed(dense: nn.Module, sparse: nn.Module, batch: int, split: Split) -> dict[str, Any]:
    """Milliseconds of a window of 35 tokens on one thread, in pairs one right after the other."""
    tokens, _ = split.batch(torch.arange(batch))
    dense.eval(), sparse.eval()
    with torch.no_grad():
        found = paired(lambda: dense(tokens), lambda: sparse(tokens), pairs=200, seconds=20)
    return {
        "dense_ms": 1e3 * found.first,
        "sparse_ms": 1e3 * found.second,
        "ratio": found.ratio,
        "interval": found.interval,
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    rows, page = raw["runs"], "structured-sparsity.7"
    worse = spread([r["test"]["sparse"] - r["test"]["baseline"] for r in rows])
    return [
        Claim(
            page,
            "larger of the two hidden sizes over the baseline's, largest of the seeds",
            max(max(r["hidden"]) for r in rows) / _HIDDEN,
            "<=",
            0.5,
        ),
        Claim(
            page,
            "test perplexity above its own baseline's, mean of the seeds",
            worse["mean"],
            "<=",
            2.0,
        ),
        Claim(
            page,
            "measured speed-up of a window of 35 tokens, batch 20, one thread, least of the seeds",
            min(r["ratio"]["20"]["ratio"] for r in rows),
            ">",
            1.0,
        ),
    ]


@experiment("iss-lstm", judge=_judge, seeds=(0,))
def iss_lstm(context: Context) -> dict[str, Any]:
    """Structured sparsity 7: a two-layer LSTM on War and Peace with its units halved, reduced."""
    return {
        "runs": context.map(one_seed, [(s, context.work, context.quick) for s in context.seeds])
    }
