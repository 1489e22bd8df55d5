"""Decode and evaluate a packed file in a process of its own: ``python -m gossamer.fresh``.

A file proves itself only where nothing of the run that wrote it is left in memory.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import datasets, nets
from gossamer.datasets import Split
from gossamer.deploy import load
from gossamer.errors import GossamerError
from gossamer.pack import Archive
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
    model: nn.Module | str | None = None,
    dataset: Split | str | None = None,
    *,
    threads: int = 1,
    model_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Decode a file in a fresh process: its digest, and with model and data its test figures.

    Args:
        path: the file.
        model: a network's name for :func:`gossamer.nets.build`; or a module, which is sent over
            with every tensor zeroed, so that all values come from the file.
        dataset: a dataset's name, whose test split is used; or a split.
        model_options: keyword arguments for ``nets.build``.

    Returns ``digest`` (:func:`digest` of the tensors, tied ones once) and, where the network could
    be made again over there, ``test`` (:meth:`gossamer.training.Evaluation.as_dict`). A module
    whose class cannot be imported (defined in a script or a function) gives no ``test``.

    Raises :class:`GossamerError` with the process's last words when it fails.
    """
    command = [sys.executable, "-m", "gossamer.fresh", str(path), "--threads", str(threads)]
    with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
        if isinstance(model, nn.Module):
            skeleton = _skeleton(model)
            if skeleton is not None:
                Path(folder, "model.pkl").write_bytes(skeleton)
                command += ["--skeleton", f"{folder}/model.pkl"]
        elif model is not None:
            command += ["--model", model, "--options", json.dumps(dict(model_options or {}))]
        if isinstance(dataset, Split):
            fields = {"inputs": dataset.stored, "targets": dataset.targets}
            norm = {"mean": dataset.mean, "std": dataset.std} if dataset.mean else {}
            torch.save({**fields, **norm}, f"{folder}/split.pt")
            command += ["--split", f"{folder}/split.pt"]
        elif dataset is not None:
            command += ["--dataset", dataset]
        # The user's own modules are importable there if they are here.
        places = os.pathsep.join(p for p in sys.path if p)
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": places}
        )
    if done.returncode:
        raise GossamerError(f"{path} fails in a fresh process: {done.stderr.strip()[-800:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _skeleton(model: nn.Module) -> bytes | None:
    """The module without its values, pickled; None where the other side could not import it."""
    if any(type(module).__module__ == "__main__" for module in model.modules()):
        return None
    try:
        empty = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in empty.state_dict(keep_vars=True).values():
                if isinstance(tensor, Tensor):
                    tensor.zero_()
        return pickle.dumps(empty)
    except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError):
        return None  # a local class, a lambda, an open file: nothing that travels


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--skeleton", type=Path)
    parser.add_argument("--dataset")
    parser.add_argument("--split", type=Path)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with Archive(given.path, max_bytes=1 << 62) as archive:
        tied = archive.aliases
        state = {name: archive.tensor(name) for name in archive.names if name not in tied}
    figures: dict[str, Any] = {"digest": digest(state)}
    model: nn.Module | None = None
    if given.skeleton:
        # Written a moment ago by the process that started this one.
        model = pickle.loads(given.skeleton.read_bytes())
    elif given.model:
        model = nets.build(given.model, **given.options)
    test: Split | None = None
    if given.split:
        test = Split(**torch.load(given.split, weights_only=True))
    elif given.dataset:
        test = datasets.load(given.dataset).test
    if model is not None and test is not None:
        model = load(given.path, model, max_bytes=1 << 62)
        figures["test"] = evaluate(model, test).as_dict()
    print(json.dumps(figures))


if __name__ == "__main__":
    _main()
