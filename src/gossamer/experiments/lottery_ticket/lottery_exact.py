"""Lottery tickets, what must be exact: how a round starts, and a search killed twice.

LeNet-300-100 on 6,000 MNIST images, five rounds of 600 iterations, rewound to the start and to
iteration 50. The search runs once unbroken; then in processes of its own, two of which are killed
(SIGKILL) at random iterations.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import datasets, nets
from gossamer.core import names
from gossamer.core.errors import GossamerError
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.lottery_ticket.lottery import PAGE, off_the_ladder
from gossamer.prune import lottery
from gossamer.prune.tickets import load_tickets
from gossamer.training import Progress, TrainConfig, load_checkpoint

__all__ = ["exact"]

NET = "lenet-300-100"
IMAGES = 6000
CONFIG = TrainConfig(6, batch_size=60, lr=1.2e-3, optimizer="adam")
STEPS = IMAGES // CONFIG.batch_size * CONFIG.epochs  # in a round
ROUNDS = 4
LATE = 50


def short_search(
    folder: Path, seed: int, rewind_step: int, *, check: bool = False, tell: bool = False
) -> dict[str, Any]:
    """One small search; how many weights did not start a round as they should.

    ``tell`` prints a JSON line of round and iteration as training goes.
    """
    torch.set_num_threads(1)
    data = datasets.load("mnist", subset=IMAGES)
    model = nets.build(NET, seed=seed)
    wrong = {"pruned_not_zero": 0, "survivors_not_theta": 0}

    def train(model: nn.Module, round: lottery.Round) -> Mapping[str, Any]:
        theta = load_checkpoint(
            folder / ("theta.pt" if rewind_step and round.number else "theta-0.pt")
        )
        for name, tensor in names.tensors(model).items() if check else ():
            mask = round.masks.get(name, torch.ones_like(tensor) != 0)
            bits = tensor.view(torch.int32)
            wrong["pruned_not_zero"] += int((bits[~mask] != 0).sum())
            other = bits[mask] != theta[name].view(torch.int32)[mask]
            wrong["survivors_not_theta"] += int(other.sum())

        def told(p: Progress) -> None:
            print(json.dumps({"round": round.number, "step": p.step}), flush=True)

        run = lottery.trainer(
            data,
            CONFIG,
            evaluate_every_steps=100,
            checkpoint_every=0.1,
            progress=told if tell else None,
        )
        return run(model, round)

    lottery.search(
        model,
        train,
        rounds=ROUNDS,
        rates=0.2,
        output="ip3",
        folder=folder,
        rewind_step=rewind_step,
    )
    return wrong


def run_killed(folder: Path, seed: int, rewind_step: int, at: int | None) -> dict[str, Any]:
    """The search in a process of its own, killed when iteration ``at`` of all is reached.

    Returns the first and the last round and step it told.
    """
    code = (
        "from pathlib import Path; "
        "from gossamer.experiments.lottery_ticket.lottery_exact import short_search; "
        f"short_search(Path({str(folder)!r}), {seed}, {rewind_step}, tell=True)"
    )
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            last = json.loads(line)
            first = first or last
            if at is not None and last["round"] * STEPS + last["step"] >= at:
                os.kill(process.pid, signal.SIGKILL)
                break
    if process.returncode != (0 if at is None else -signal.SIGKILL):
        raise GossamerError(f"the search in {folder} ended with status {process.returncode}")
    return {"from": first, "to": last}


def killed_twice(seed: int, work: Path) -> dict[str, Any]:
    """Start of every round, and the killed search against the unbroken one, of one seed."""
    found: dict[str, Any] = {"seed": seed}
    for rewind_step in (0, LATE):
        whole, broken = work / f"whole-{rewind_step}-{seed}", work / f"killed-{rewind_step}-{seed}"
        for folder in (whole, broken):  # an earlier run's would have nothing left to kill
            shutil.rmtree(folder, ignore_errors=True)
        wrong = short_search(whole, seed, rewind_step, check=True)
        total = STEPS * (ROUNDS + 1)
        draw = random.Random(f"{seed} {rewind_step}")
        moments = sorted(draw.sample(range(STEPS // 10, total - STEPS // 10), 2))
        lives = [run_killed(broken, seed, rewind_step, at) for at in (*moments, None)]
        last = [load_checkpoint(f / f"round-{ROUNDS}.pt") for f in (whole, broken)]
        found[f"rewind {rewind_step}"] = {
            **wrong,
            "lives": lives,
            "same_tickets_file": (whole / "tickets.gsm").read_bytes()
            == (broken / "tickets.gsm").read_bytes(),
            "weights_that_differ": sum(
                int((last[0]["model"][n] != t).sum()) for n, t in last[1]["model"].items()
            ),
            # a later life starts in the round the one before was killed in, or the next
            "rounds_repeated": sum(
                max(0, a["to"]["round"] - b["from"]["round"]) for a, b in pairwise(lives)
            ),
            "iterations_repeated": [
                max(0, _at(a["to"]) - _at(b["from"])) for a, b in pairwise(lives)
            ],
            "ladder": max(
                off_the_ladder(masks.density, number)
                for number, masks in enumerate(load_tickets(whole / "tickets.gsm").masks)
            ),
        }
    return found


def _at(told: Mapping[str, int]) -> int:
    return told["round"] * STEPS + told["step"]


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    cases = [run[key] for run in raw["runs"] for key in run if key != "seed"]

    def total(key: str) -> float:
        return float(sum(case[key] for case in cases))

    most = max(n for case in cases for n in case["iterations_repeated"])
    ladder = max(case["ladder"] for case in cases)
    what = "other weights, biases and their bits that differ from theta at a start"
    killed = "searches killed twice:"
    return [
        Claim(f"{PAGE}.1", "largest difference from the published ladder, five rounds, points",
              ladder, "<=", 0.05),
        Claim(f"{PAGE}.5", "pruned weights not 0 at a start", total("pruned_not_zero"), "==", 0),
        Claim(f"{PAGE}.5", what, total("survivors_not_theta"), "==", 0),
        Claim(f"{PAGE}.6", f"{killed} weights that differ from the unbroken one's",
              total("weights_that_differ"), "==", 0),
        Claim(f"{PAGE}.6", f"{killed} files of masks and figures that differ",
              sum(not case["same_tickets_file"] for case in cases), "==", 0),
        Claim(f"{PAGE}.6", "rounds begun again after a kill", total("rounds_repeated"), "==", 0),
        Claim(f"{PAGE}.6", "iterations repeated after a kill, the most, of a round's",
              most / raw["iterations_a_round"], "<=", 0.5),
    ]  # fmt: skip


@experiment("lottery-exact", judge=_judge)
def exact(context: Context) -> dict[str, Any]:
    """Lottery tickets 1, 5, 6: the ladder, each round's start to the bit, a search killed twice."""
    runs = context.map(killed_twice, [(seed, context.work) for seed in context.seeds])
    return {"iterations_a_round": STEPS, "runs": runs}
