"""What kept and removed weights start from, under masks found in rounds.

Zhou et al., NeurIPS 2019, figure 4, with the tickets that ``lottery-lenet`` finds (large_final,
nine rounds, 13.5 %), as the paper prunes. ``deconstruct-lenet`` prunes once, where the mask says
less and its signs hardly matter. Masked networks train for 12 epochs (the paper's 55).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gossamer import nets
from gossamer.core import names
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.deconstructing.deconstruct import NET, PAGE, retrained
from gossamer.experiments.lottery_ticket.lottery import AT_13, tickets
from gossamer.prune.deconstruct import apply_actions
from gossamer.prune.tickets import load_tickets

__all__ = ["kept_weights"]

QUICK_ROUND = 1
# name -> (mask-1 action, signed, mask-0 action)
VARIANTS: dict[str, tuple[str, bool, str]] = {
    "rewind": ("rewind", True, "zero"),
    **{
        f"{kept}, {'signed' if signed else 'unsigned'}": (kept, signed, "zero")
        for kept in ("reinit", "reshuffle", "constant")
        for signed in (True, False)
    },
    "removed: freeze": ("rewind", True, "freeze"),
}


def one(name: str, seed: int, work: Path, searches: Path, quick: bool) -> dict[str, Any]:
    """Test accuracy of one masked network after training."""
    kept, signed, removed = VARIANTS[name]
    masks = load_tickets(searches / f"seed-{seed}" / "tickets.gsm").masks
    initial = {n: w.detach() for n, w in names.weights(nets.build(NET, seed=seed)).items()}
    fresh = names.weights(nets.build(NET, seed=seed + 1_000_003))
    start = apply_actions(
        initial,
        initial,
        masks[QUICK_ROUND if quick else AT_13],
        kept=kept,
        signed=signed,
        removed=removed,
        fresh={n: w.detach() for n, w in fresh.items()},
        generator=torch.Generator().manual_seed(seed),
    )
    return retrained(name, seed, start, work, quick)


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    after = raw["trained"]

    def over(a: str, b: str) -> float:
        return float(after[a]["mean"] - after[b]["mean"])

    at, claims = "13.5 %, found in rounds: accuracy,", []
    for kept in ("reinit", "reshuffle", "constant"):
        signed, unsigned = f"{kept}, signed", f"{kept}, unsigned"
        what = f"{at} distance of {signed} from rewind, points"
        claims.append(Claim(f"{PAGE}.4", what, abs(over(signed, "rewind")), "<=", 0.3))
        what = f"{at} {signed} over {unsigned}, points"
        claims.append(Claim(f"{PAGE}.4", what, over(signed, unsigned), ">=", 0.2))
    what = f"{at} freeze over zero, points"
    claims.append(Claim(f"{PAGE}.5", what, over("removed: freeze", "rewind"), "<", 0.0))
    return claims


@experiment("deconstruct-tickets", judge=_judge)
def kept_weights(context: Context) -> dict[str, Any]:
    """Deconstructing 4, 5: kept and removed weights under the lottery's own masks."""
    work, quick = context.work, context.quick
    searches = context.beside("lottery-lenet", tickets.__module__)
    # those that lottery-lenet has finished are only read
    context.map(tickets, [(NET, seed, searches, quick) for seed in context.seeds])
    jobs = [(name, seed, work, searches, quick) for name in VARIANTS for seed in context.seeds]
    rows = context.map(one, jobs)
    after = {
        name: spread([100 * r["early_accuracy"] for r in rows if r["name"] == name])
        for name in VARIANTS
    }
    return {"trained": after, "runs": rows}
