"""Deep Compression of the LeNets on MNIST: sizes, errors, tables and initial centroids.

Han, Mao, Dally, ICLR 2016, tables 1-3 and figure 8. See :mod:`gossamer.experiments.shared.lenets`
for the
runs, which are those of the library's recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gossamer import nets
from gossamer.compression import fresh
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.codebook import Quantized
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import (
    NETS,
    after,
    compressed,
    error,
    lenets_folder,
    recipe,
)
from gossamer.pack import Archive, pack, unpack
from gossamer.quantize import SharedWeights
from gossamer.report import tables
from gossamer.training import evaluate

__all__ = ["inits", "lenets"]

# published whole-file sizes, KB of 1000 bytes
PUBLISHED = {"lenet-300-100": 27.0, "lenet-5": 44.0}
# what Huffman coding saves by the paper's own tables, percent, at its densities
SAVED = {"lenet-300-100": (25.8, "8/9/26 %"), "lenet-5": (10.8, "66/12/8/19 %")}


def stages(net: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Errors after each stage (percent of the test set) and real file bytes, of one seed."""
    dense, pruned, shared = (
        after(stage, net, seed, work, quick) for stage in ("train", "prune", "share")
    )
    out, test = compressed(net, seed, work, quick), dense.data.test
    figures: dict[str, Any] = {
        "net": net,
        "seed": seed,
        "weights_kept": pruned.masks.kept,
        "error_dense": error(evaluate(dense.model, test)),
        "error_pruned": error(evaluate(pruned.model, test)),
        "error_shared": error(evaluate(shared.model, test)),
        "files": {"huffman": checked(shared.model, out / "model.gsm")},
    }
    for profile in ("fast", "smallest"):
        path = out / f"{profile}.gsm"
        pack(shared.model, path, profile=profile)
        figures["files"][profile] = checked(shared.model, path)
    with Archive(path) as archive:
        decoded = archive.tensors()
        figures["layers"] = tables.layer_rows(archive.rows(), decoded)
    for layer in figures["layers"]:
        layer.pop("codebook"), layer.pop("histogram")
    back = nets.build(net)
    back.load_state_dict(decoded)
    figures["error_decoded"] = error(evaluate(back, test))
    figures["centroid_gradient"] = centroid_gradient(shared)
    return figures


def checked(model: nn.Module, path: Path) -> dict[str, Any]:
    """A file's bytes, and whether it gives the network's bits, here and in a fresh process."""
    back, state = unpack(path), model.state_dict()
    same = all(torch.equal(back[name], value) for name, value in state.items())
    return {
        "bytes": path.stat().st_size,
        "identical": same and set(back) == set(state),
        "fresh_digest_equal": fresh.check(path)["digest"] == fresh.digest(state),
    }


def centroid_gradient(state: State) -> float:
    """Largest relative difference of a centroid's gradient from the grouped sum, in float64."""
    tuned = {name: Quantized.of(w.detach()) for name, w in names.weights(state.model).items()}
    model, train = state.model.double(), state.data.train
    inputs, targets = train.inputs[:256].double(), train.targets[:256]
    F.cross_entropy(model(inputs), targets).backward()
    grouped = {}
    for name, p in model.named_parameters():
        if name in tuned:
            assert p.grad is not None  # every weight is in the graph
            codes = tuned[name].codes.long().reshape(-1)
            sums = torch.zeros(tuned[name].codebook.numel(), dtype=torch.float64)
            grouped[name] = sums.index_add(0, codes, p.grad.reshape(-1))[1:]
    model.zero_grad()
    SharedWeights({n: type(q)(q.codes, q.codebook.double()) for n, q in tuned.items()}).attach(
        model
    )
    F.cross_entropy(model(inputs), targets).backward()
    worst = 0.0
    latents = names.parameters(model)
    for name in tuned:
        latent = latents[name]
        assert latent.grad is not None  # a code book is in the graph through its weight
        scale = float(grouped[name].abs().max())
        worst = max(worst, float((latent.grad - grouped[name]).abs().max()) / scale)
    return worst


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(float(r[key]) for r in rows) / len(rows)


def _judge_lenets(raw: Mapping[str, Any]) -> list[Claim]:
    claims: list[Claim] = []
    for net in NETS:
        rows = [r for r in raw["runs"] if r["net"] == net]
        size = [r["files"]["huffman"]["bytes"] / 1000 for r in rows]
        increase = _mean(rows, "error_decoded") - _mean(rows, "error_dense")
        same = all(
            f["identical"] and f["fresh_digest_equal"] for r in rows for f in r["files"].values()
        )
        claims += [
            Claim(
                "deep-compression.1",
                f"{net}: largest file of the paper's own coding, KB",
                max(size),
                "<=",
                PUBLISHED[net],
            ),
            Claim(
                "deep-compression.1",
                f"{net}: error increase, mean over seeds, points",
                increase,
                "<=",
                0.1,
            ),
            Claim(
                "deep-compression.1",
                f"{net}: files that decode to the same bits, fraction",
                float(same),
                "==",
                1.0,
            ),
            Claim(
                "deep-compression.1",
                f"{net}: best coder's file over the paper's coding",
                max(r["files"]["smallest"]["bytes"] / r["files"]["huffman"]["bytes"] for r in rows),
                "<",
                1.0,
            ),
            Claim(
                "deep-compression.2",
                f"{net}: centroid gradient against the grouped sum, relative",
                max(r["centroid_gradient"] for r in rows),
                "<=",
                1e-6,
            ),
        ]
        claims += _coding_claims(
            net, [[x["paper"] for x in r["layers"] if x["paper"]] for r in rows]
        )
    return claims


@experiment("deep-compression-lenets", judge=_judge_lenets)
def lenets(context: Context) -> dict[str, Any]:
    """Deep Compression 1, 2, 4, 5: LeNet-300-100 and LeNet-5 through the paper's three stages."""
    work = lenets_folder(context)
    jobs = [(net, seed, work, context.quick) for net in NETS for seed in context.seeds]
    found = context.map(stages, jobs)
    summary: dict[str, Any] = {}
    for net in NETS:
        rows = [r for r in found if r["net"] == net]
        size = {p: spread([r["files"][p]["bytes"] / 1000 for r in rows]) for p in rows[0]["files"]}
        summary[net] = {
            "published_kb": PUBLISHED[net],
            "file_kb": size,
            **{
                key: spread([r[key] for r in rows])
                for key in ("error_dense", "error_pruned", "error_shared", "weights_kept")
            },
        }
    return {"summary": summary, "runs": found}


def _coding_claims(net: str, runs: list[list[dict[str, float]]]) -> list[Claim]:
    layers = [layer for run in runs for layer in run]

    # What Huffman codes: weight codes and position differences, not code books and biases.
    def bits(ending: str) -> float:
        return sum(
            (p["weight_bits" + ending] + p["index_bits" + ending])
            * p["weights"]
            * p["kept_percent"]
            for p in layers
        )

    saved = 100 * (1 - bits("_huffman") / bits(""))
    over = max(p["weight_bits_huffman"] - p["weight_entropy"] for p in layers)
    over = max(over, *(p["index_bits_huffman"] - p["index_entropy"] for p in layers))
    least, densities = SAVED[net]
    ours = "/".join(f"{p['kept_percent']:.2g}" for p in runs[0])
    what = f"{net}: saved by Huffman at {ours} %, percent (the paper's table, at {densities})"
    return [
        Claim("deep-compression.4", f"{net}: Huffman over entropy, bits a symbol", over, "<=", 1.0),
        Claim("deep-compression.4", what, saved, ">=", least),
    ]


def by_init(net: str, seed: int, work: Path, quick: bool, bits: int, init: str) -> dict[str, Any]:
    """Test error and loss after the recipe's fine-tuning from one kind of initial centroids."""
    state = after("prune", net, seed, work, quick)
    state.name = f"{init}-{bits}"
    shipped = recipe(net, seed, quick).work[state.number - 1]
    shipped.model_copy(update={"init": init, "bits": bits}).run(state)
    found = evaluate(state.model, state.data.test)
    return {
        "net": net,
        "seed": seed,
        "bits": bits,
        "init": init,
        "error": error(found),
        "loss": found.loss,
    }


INITS = ("linear", "density", "forgy", "optimal")


def _judge_inits(raw: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for bits, found in raw["errors"].items():
        if int(bits) >= 4:
            best = min(found["density"]["mean"], found["forgy"]["mean"])
            what = (
                f"{bits} bits: linear's mean error over the better of density's and Forgy's, points"
            )
            over = found["linear"]["mean"] - best
            claims.append(Claim("deep-compression.3", what, over, "<=", 0.0))
    return claims


@experiment("deep-compression-inits", judge=_judge_inits)
def inits(context: Context) -> dict[str, Any]:
    """Deep Compression 3: linear against density and Forgy centroids, 2 to 8 bits, fine-tuned."""
    work = lenets_folder(context)
    net = NETS[0]
    grid = (4,) if context.quick else (2, 3, 4, 5, 6, 8)
    jobs = [
        (net, seed, work, context.quick, bits, init)
        for seed in context.seeds
        for bits in grid
        for init in INITS
    ]
    # one seed's network must exist before its variants run side by side
    context.map(stages_once, [(net, seed, work, context.quick) for seed in context.seeds])
    found = context.map(by_init, jobs)
    errors = {
        str(bits): {
            init: spread([r["error"] for r in found if (r["bits"], r["init"]) == (bits, init)])
            for init in INITS
        }
        for bits in grid
    }
    return {"net": net, "errors": errors, "runs": found}


def stages_once(net: str, seed: int, work: Path, quick: bool) -> int:
    """Make one seed's pruned network; the weights it keeps."""
    return after("prune", net, seed, work, quick).masks.kept
