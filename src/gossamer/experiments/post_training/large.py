"""GPT-2's shape, 124 M parameters, through the stage: memory, seconds, and a kill.

The weights are random: what the stage costs does not hang on them. It runs in processes of their
own. One goes to its end; one is killed when half of the layers are done, and another goes on from
what it left. Peak memory is the most that the system held for a process from its start to its end
(resident: Python, torch and the network included).
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gossamer import nets
from gossamer.compression.progress import Reporter
from gossamer.compression.stages.obs import Obs
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.errors import GossamerError
from gossamer.datasets import Dataset, Split
from gossamer.experiments import Claim, Context, experiment
from gossamer.training.tasks import chosen

__all__ = ["large", "session"]

_SMALL: dict[str, Any] = {"classes": 64, "context": 16, "width": 32, "layers": 2, "heads": 2}
SETTINGS: dict[str, Any] = {"bits": 4, "group": 64, "include": ["block.*.weight"]}
_WINDOWS, _TOKENS = 16, 128


class _Killed(Reporter):
    """Ends the process, as the system would, when so many layers are done."""

    def __init__(self, after: int | None) -> None:
        super().__init__()
        self._after = after

    def count(self, name: str, done: int, total: int, figures: str = "") -> None:
        """Count layers."""
        if done == self._after:
            os.kill(os.getpid(), signal.SIGKILL)


def session(folder: Path, quick: bool, kill_after: int | None) -> None:
    """The stage, in this process; its figures are printed as JSON."""
    torch.set_num_threads(1)
    model = nets.build("gpt", seed=0, **(_SMALL if quick else {}))
    g = torch.Generator().manual_seed(1)
    windows = (4, 16) if quick else (_WINDOWS, _TOKENS)
    vocabulary = names.parameters(model)["embedding.weight"].shape[0]
    tokens = torch.randint(vocabulary, windows, generator=g)
    split = Split(tokens, tokens)
    data = Dataset("random tokens", split, split, split, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    # nothing rebuilds the network here, so its origin needs no copy
    state = State(model, model, data, folder, 0, _Killed(kill_after), chosen(None, data)[0])
    state.number, state.name = 1, "1-obs"
    resumed = len(list(folder.glob("1-obs-*.train.pt")))
    busy, began = time.process_time(), time.monotonic()
    Obs(calibration=windows[0], **SETTINGS).run(state)
    digests = {
        name: hashlib.sha256(w.detach().numpy().tobytes()).hexdigest()
        for name, w in model.named_parameters()
    }
    size = sum(p.numel() for p in model.parameters())
    print(
        json.dumps(
            {
                "parameters": size,
                "network_bytes": 4 * size,
                "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "processor_seconds": time.process_time() - busy,
                "seconds": time.monotonic() - began,
                "layers": len(state.notes["obs"]["layers"]),
                "layers_found": resumed,
                "digests": digests,
            }
        )
    )


def _session(folder: Path, quick: bool, kill_after: int | None) -> subprocess.CompletedProcess[str]:
    code = (
        "import pathlib; from gossamer.experiments.post_training.large import session; "
        f"session(pathlib.Path({str(folder)!r}), {quick}, {kill_after})"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def _ran(folder: Path, quick: bool) -> dict[str, Any]:
    done = _session(folder, quick, None)
    if done.returncode:
        raise GossamerError(f"the stage failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _unbroken(work: Path, quick: bool) -> dict[str, Any]:
    """The stage from its start to its end; where this part is begun again it goes on."""
    return _ran(work / "unbroken", quick)


def _broken(after: int, work: Path, quick: bool) -> dict[str, Any]:
    """The stage killed when ``after`` layers are done, and gone on with."""
    folder = work / "broken"
    killed = 0
    if len(list(folder.glob("1-obs-*.train.pt"))) < after:
        killed = _session(folder, quick, after).returncode
        if killed != -signal.SIGKILL:
            raise GossamerError(f"the process ended with {killed}, not by the kill")
    return {**_ran(folder, quick), "killed_after": after}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    page = "post-training.5"
    one, other = raw["unbroken"], raw["broken"]
    differ = sum(one["digests"][n] != d for n, d in other["digests"].items())
    peak = max(one["peak_bytes"], other["peak_bytes"]) / one["network_bytes"]
    return [
        Claim(page, "parameters, millions", one["parameters"] / 1e6, ">=", 124.0),
        Claim(page, "peak memory of the process over the network's size", peak, "<=", 2.5),
        Claim(page, "tensors that a kill and a restart change", differ, "==", 0),
        Claim(page, "layers found done by the restart", other["layers_found"], ">=", 1),
    ]


@experiment("post-training-large", seeds=(0,), judge=_judge)
def large(context: Context) -> dict[str, Any]:
    """Post-training 5: a transformer of 124 M parameters, its memory and seconds, killed once."""
    work, quick = context.work, context.quick
    (unbroken,) = context.map(_unbroken, [(work, quick)])
    (broken,) = context.map(_broken, [(unbroken["layers"] // 2, work, quick)])
    return {"unbroken": unbroken, "broken": broken}
