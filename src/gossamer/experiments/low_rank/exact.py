"""The fit of responses against brute force, on layers of the published ResNet-20; exact counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.low_rank.network import calibration, looked
from gossamer.structure.factors import build, composed, decompose, macs, parameters
from gossamer.structure.low_rank import (
    Pairs,
    energies,
    fit_linear,
    fit_nonlinear,
    objective,
    relu_error,
    solve_targets,
)
from gossamer.structure.rank_selection import Ladder, choose_ranks
from gossamer.structure.responses import Positions, Sample
from gossamer.training.layer_inputs import Use, inputs_of

__all__ = ["exact"]

_STARTS = 500
_RATIOS = (1.5, 2.0, 3.0, 4.0)


def _responses(quick: bool, seed: int) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """Of each layer of ResNet-20: sampled responses to fit, others to judge by, and whether a ReLU
    follows.
    """
    net = nets.build("resnet-20", pretrained=True)
    fit, judged = (calibration(64 if quick else 600, quick, part=p) for p in (0, 1))
    found: list[dict[str, Tensor]] = []
    seen = looked(net, fit, seed)
    if quick:
        seen.layers = dict([*seen.layers.items()][:4])
    for batches in (fit, judged):
        picks = Positions(batches, 10, torch.Generator().manual_seed(seed))
        samples = {n: Sample(layer) for n, layer in seen.layers.items()}
        weights = {f"{n}.weight": names.parameters(net)[f"{n}.weight"] for n in samples}

        def see(use: Use, samples: Mapping[str, Sample] = samples) -> None:
            samples[use.name.removesuffix(".weight")].add(use, use, use.rows[1])

        for number, batch in enumerate(batches):
            inputs_of(net, batch, weights, see, pick=picks(number))
        found.append({n: s.pairs()[0] for n, s in samples.items()})
    return {n: (found[0][n], found[1][n], layer.follower.relu) for n, layer in seen.layers.items()}


def _solver(seed: int, quick: bool) -> dict[str, Any]:
    """Points 1, 2 and the layers' part of 3, layer by layer."""
    rows = []
    for name, (fit, judged, relu) in _responses(quick, seed).items():
        d = fit.shape[1]
        rank = max(1, d // 4)
        target = fit.clamp_min(0)
        most, gap = -math.inf, -math.inf
        found = fit_linear(Pairs.of(fit, fit), rank)
        for weight, count in ((0.1, 10), (1.0, 10)):
            last = math.inf
            for _ in range(count):
                given = found(fit)
                z = solve_targets(target, given, weight)
                between = objective(target, z, given, weight)
                found = fit_linear(Pairs.of(fit, z), rank)
                after = objective(target, z, found(fit), weight)
                most = max(most, between / last - 1, after / between - 1)
                last = after
            gap = max(gap, _against_grid(target[:200], given[:200], weight))
        z = solve_targets(target, found(fit), 1.0)
        errors = [
            relu_error(way, judged, judged.clamp_min(0)) / float(judged.clamp_min(0).square().sum())
            for way in (fit_linear(Pairs.of(fit, fit), rank), fit_nonlinear(fit, fit, rank))
        ]
        mine, plain, random = _starts(fit, z, rank, 20 if quick else _STARTS, seed)
        rows.append(
            {
                "name": name, "relu": relu, "rank": rank, "outputs": d, "rise": most, "gap": gap,
                "gsvd": mine, "plain": plain, "random": random,
                "linear": errors[0], "nonlinear": errors[1],
                "energy": (lambda e: (e.cumsum(0) / e.sum()).tolist())(
                    energies(Pairs.of(fit, fit))
                ),
            }
        )  # fmt: skip
    return {"seed": seed, "layers": rows}


def _against_grid(target: Tensor, given: Tensor, weight: float) -> float:
    """How much a fine grid of z is ahead of the closed form, at most; negative: never."""
    z = solve_targets(target, given, weight)
    mine = (target - z.clamp_min(0)).square() + weight * (z - given).square()
    reach = float(torch.maximum(target.max(), given.abs().max()))
    best = torch.full_like(mine, math.inf)
    for value in torch.linspace(-reach, reach, 4001, dtype=torch.float64):
        cost = (target - value.clamp_min(0)).square() + weight * (value - given).square()
        best = torch.minimum(best, cost)
    return float((mine - best).max() / target.square().mean())


def _starts(y: Tensor, z: Tensor, rank: int, starts: int, seed: int) -> tuple[float, float, float]:
    """|Z - M Y| of the generalised decomposition, of a plain one of M^, and of the best of random
    starts, each with the best second factor for it; parts of |Z|.
    """
    mine = fit_linear(Pairs.of(y, z), rank)
    yc, zc = y - y.mean(0), z - z.mean(0)
    gram, cross = yc.T @ yc, zc.T @ yc
    whole = torch.linalg.lstsq(yc, zc).solution.T
    u, s, v = torch.linalg.svd(whole)
    power = float(zc.square().sum())

    def left(m: Tensor) -> float:
        return (power - 2 * float((m * cross).sum()) + float(((m @ gram) * m).sum())) / power

    best, g = math.inf, torch.Generator().manual_seed(seed)
    for _ in range(starts):
        q = torch.randn(rank, y.shape[1], generator=g, dtype=torch.float64)
        p = torch.linalg.solve(q @ gram @ q.T, q @ cross.T).T
        best = min(best, left(p @ q))
    root = math.sqrt
    return (
        root(left(mine.second @ mine.first)),
        root(left(u[:, :rank] * s[:rank] @ v[:rank])),
        root(best),
    )


def _toy(seed: int) -> dict[str, Any]:
    """Greedy ranks of three layers against all combinations."""
    g = torch.Generator().manual_seed(seed)
    ladders = []
    for number in range(3):
        d = int(torch.randint(16, 33, (1,), generator=g))
        values = torch.rand(d, generator=g, dtype=torch.float64).mul(-0.5).exp().cumprod(0)
        unit = float(torch.randint(20, 200, (1,), generator=g))
        kept = (values.cumsum(0) / values.sum()).clamp(max=1.0).tolist()
        ladders.append(
            Ladder(str(number), kept, [unit * (i + 1) for i in range(d)], 0.8 * unit * d)
        )
    whole, rows = sum(ladder.whole for ladder in ladders), []
    for ratio in _RATIOS:
        loss, cost = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for a in ladders:
            every = [None, *range(len(a.costs))]
            loss = (
                loss[:, None] + torch.tensor([a.loss(b) for b in every], dtype=torch.float64)
            ).flatten()
            cost = (
                cost[:, None] + torch.tensor([a.cost(b) for b in every], dtype=torch.float64)
            ).flatten()
        at = choose_ranks(ladders, whole / ratio)
        mine = sum(a.loss(at[a.name]) for a in ladders)
        spent = sum(a.cost(at[a.name]) for a in ladders)
        # what one filter more would cost at least
        filter_ = min(a.costs[0] for a in ladders if at[a.name] is not None)
        rows.append(
            {
                "ratio": ratio,
                "behind": 100 * (1 - math.exp(float(loss[cost <= whole / ratio].min()) - mine)),
                "over": spent / (whole / ratio),
                "unused": (whole / ratio - spent) / filter_,
            }
        )
    return {"seed": seed, "rows": rows}


_KERNELS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(48, 32), (48,)),
    "line": (lambda: nn.Conv1d(6, 12, 5, stride=2, padding=2), (6, 32)),
    "image": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (16, 14, 15)),
    "volume": (lambda: nn.Conv3d(4, 8, 3, padding=1, dilation=1), (4, 6, 7, 5)),
}


def _counts(seed: int) -> dict[str, Any]:
    """Full rank, and counts against modules that ran."""
    torch.manual_seed(seed)
    rows = []
    for name, (make, shape) in _KERNELS.items():
        layer, x = make(), torch.randn(2, *shape)
        d, c, *k = layer.weight.shape
        forms: dict[str, tuple[int, ...]] = {"channel": (min(d, layer.weight[0].numel()),)}
        if k:
            forms |= {"tucker": (d, c), "cp": (7,)}
        if len(k) == 2:
            forms["spatial"] = (min(c * k[0], d * k[1]), d)
        for form, full in forms.items():
            row: dict[str, Any] = {"layer": name, "form": form, "off": math.nan}
            try:
                made = decompose(layer, form, full, seed=seed)
                if form != "cp":
                    off = float((made(x) - layer(x)).detach().abs().max())
                    row["off"] = off / float(layer(x).detach().abs().max())
                off = float((composed(made) - composed(nn.Sequential(layer))).norm())
                row["kernel_off"] = off / float(layer.weight.detach().norm())
            except ArgumentError as e:  # tensorly is not there
                row["note"] = str(e)
            wrong = 0
            for part in (1.0, 0.5, 0.25):
                ranks = tuple(max(1, int(part * r)) for r in full)
                some = build(layer, form, ranks, bias=True)
                before, after = tuple(x.shape[2:]), tuple(layer(x).shape[2:])
                wrong += parameters(layer, form, ranks, bias=True) != sum(
                    p.numel() for p in some.parameters()
                )
                wrong += macs(layer, form, ranks, before, after) != _ran(some, x)
            rows.append({**row, "wrong": wrong})
    return {"seed": seed, "rows": rows}


def _ran(module: nn.Module, x: Tensor) -> int:
    """Multiply-adds of an example, from what the modules put out."""
    total = 0
    for part in module.children():
        x = part(x)
        weight: Any = part.weight
        total += weight.numel() * x[0].numel() // len(weight)
    return total


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    layers = [row for one in raw["solver"] for row in one["layers"]]
    relus = [row for row in layers if row["relu"]]
    toys = [row for one in raw["toys"] for row in one["rows"]]
    counts = [row for one in raw["counts"] for row in one["rows"]]
    exact = [row["off"] for row in counts if row["form"] in ("channel", "spatial")]
    tucker = [row["off"] for row in counts if row["form"] == "tucker"]
    page = "low-rank"
    return [
        Claim(f"{page}.1", "largest relative rise of the objective at a fixed lambda, every turn "
              "and layer of ResNet-20", max(r["rise"] for r in layers), "<=", 1e-9),
        Claim(f"{page}.1", "most that a grid of 4,001 z is ahead of the closed z-step, of the "
              "responses' power", max(r["gap"] for r in layers), "<=", 1e-9),
        Claim(f"{page}.2", "|Z - MY| over that of plain SVD truncation of M^, the worst layer",
              max(r["gsvd"] / r["plain"] for r in layers), "<=", 1 + 1e-9),
        Claim(f"{page}.2", "|Z - MY| over that of the best of 500 random starts, the worst layer",
              max(r["gsvd"] / r["random"] for r in layers), "<=", 1 + 1e-9),
        Claim(f"{page}.3", "ReLU error of the nonlinear over the linear fit at a quarter of the "
              "rank on responses that took no part, the worst layer before a ReLU",
              max(r["nonlinear"] / r["linear"] for r in relus), "<=", 1.0),
        Claim(f"{page}.4", "greedy ranks of three layers: energy below the best of all, %",
              max(r["behind"] for r in toys), "<=", 1.0),
        Claim(f"{page}.4", "greedy ranks: cost over the budget", max(r["over"] for r in toys),
              "<=", 1.0),
        Claim(f"{page}.4", "greedy ranks: budget unused, in the cheapest layer's filters",
              max(r["unused"] for r in toys), "<", 1.0),
        Claim("survey.1", "SVD and separable factors at full rank: largest difference of outputs",
              max(exact), "<=", 1e-5),
        Claim("survey.1", "Tucker-2 at full rank: largest difference of outputs", max(tucker),
              "<=", 1e-5),
        Claim("survey.1", "parameter and multiply-add counts of SVD, separable, Tucker and CP "
              "factors that are not those of the modules that ran",
              sum(r["wrong"] for r in counts), "==", 0),
    ]  # fmt: skip


@experiment("low-rank-exact", seeds=(0, 1), judge=_judge)
def exact(context: Context) -> dict[str, Any]:
    """Low rank 1, 2, 3, 4 and survey 1: the fit against brute force, ranks, full rank, counts."""
    seeds = context.seeds[:1] if context.quick else context.seeds
    return {
        "solver": context.map(_solver, [(seed, context.quick) for seed in seeds]),
        "toys": context.map(_toy, [(seed,) for seed in range(2 if context.quick else 20)]),
        "counts": context.map(_counts, [(seed,) for seed in seeds]),
    }
