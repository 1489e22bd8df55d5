"""Decode and evaluate a packed file in a process of its own: ``python -m gossamer.fresh``.

A file proves itself only where nothing of the run that wrote it is left in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer import datasets, nets
from gossamer.errors import GossamerError
from gossamer.pack import load_into, unpack
from gossamer.training import evaluate

__all__ = ["check", "digest"]


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names.

    >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)})
    True
    >>> digest({"a": torch.zeros(2)}) == digest({"a": -torch.zeros(2)})
    False
    """
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def check(
    path: Path,
    model: str | None = None,
    dataset: str | None = None,
    *,
    threads: int = 1,
    model_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Digest (and test figures, with a model's and a dataset's name) of a file, freshly decoded.

    Raises :class:`GossamerError` with the process's last words when it fails.
    """
    command = [sys.executable, "-m", "gossamer.fresh", str(path), "--threads", str(threads)]
    if model is not None and dataset is not None:
        command += ["--model", model, "--dataset", dataset]
        command += ["--options", json.dumps(dict(model_options or {}))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GossamerError(f"{path} fails in a fresh process: {done.stderr.strip()[-800:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--dataset")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    figures: dict[str, Any] = {"digest": digest(unpack(given.path))}
    if given.model and given.dataset:
        data = datasets.load(given.dataset)
        model = nets.build(given.model, **given.options)
        load_into(given.path, model)
        figures["test"] = evaluate(model, data.test).as_dict()
    print(json.dumps(figures))


if __name__ == "__main__":
    _main()
