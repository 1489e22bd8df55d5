"""Decode and evaluate a packed file in a process of its own.

``python -m gossamer.compression.fresh``.

A file proves itself only where nothing of the run that wrote it is left: in another process, with
a network that is built anew by its name or function. Of a network that only exists as an object,
the modules travel and no value does: parameters, buffers of both kinds, extra state that is a
tensor and tensors that are plain attributes are zeroed before the file is loaded, and what comes
out is compared with what the packed network gave on the same examples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import datasets, nets
from gossamer.compression import template
from gossamer.compression.records import load
from gossamer.core import nest
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.core.modes import device_of, evaluating
from gossamer.core.names import clean
from gossamer.core.plain import copied, plain
from gossamer.datasets import Split
from gossamer.pack import Archive
from gossamer.training import Task, evaluate
from gossamer.training.tasks import Classification

__all__ = ["Skeleton", "check", "digest", "outputs", "prove", "skeleton"]

_COMPARED = 64  # examples whose outputs are compared
# Of the largest output: other kernels for other memory layouts round otherwise, and no more.
_ROUNDING = 1e-4


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


@dataclass(frozen=True)
class Skeleton:
    """A network without its values.

    Attributes:
        model: the modules, every tensor zeroed.
        others: clean name -> value of the tensors that no file of it holds: buffers that are not
            persistent, and plain attributes of its modules.
    """

    model: nn.Module
    others: dict[str, Tensor]


def outputs(model: nn.Module, split: Split, task: Task) -> list[Tensor]:
    """What the network gives in evaluation mode on the split's first examples, on the CPU.

    Raises :class:`ArgumentError` where no tensor is among it.
    """
    inputs = nest.moved(split.batch(slice(0, _COMPARED))[0], device_of(model))
    with evaluating(model), torch.no_grad():
        given = task.feed(model, inputs)
    found = [t.detach().cpu() for t in nest.leaves(given)]
    if not found:
        raise ArgumentError(
            f"the network gives {nest.shown(given)}, no tensor; return tensors, alone or in a "
            "tuple or mapping"
        )
    return found


def skeleton(model: nn.Module) -> Skeleton:
    """The network's modules with every tensor zeroed, and what a file of it will not hold.

    Raises :class:`ArgumentError` where it cannot be copied, or holds extra state that is no tensor.
    """
    empty = copied(model)
    stored = {id(t) for t in empty.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    others: dict[str, Tensor] = {}
    with torch.no_grad():
        for prefix, module in empty.named_modules():
            loose = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
            for key, value in {**module._buffers, **loose}.items():
                if value is not None and id(value) not in stored:
                    others[clean(f"{prefix}.{key}".lstrip("."))] = value.detach().clone()
                    value.detach().zero_()
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                _forget(prefix, module)
        for tensor in empty.state_dict(keep_vars=True).values():
            if isinstance(tensor, Tensor):
                tensor.detach().zero_()
    return Skeleton(empty, others)


def _forget(prefix: str, module: nn.Module) -> None:
    """Zero a module's extra state, which its own attributes would carry along."""
    state = module.get_extra_state()
    if state is None:
        return
    if not isinstance(state, Tensor):
        raise ArgumentError(
            f"{prefix or 'the network'} ({type(module).__name__}) keeps extra state of type "
            f"{type(state).__name__} (get_extra_state), which a file of tensors cannot hold; keep "
            "it in a buffer (register_buffer)"
        )
    module.set_extra_state(torch.zeros_like(state))


def prove(
    path: Path | Archive,
    empty: Skeleton,
    split: Split,
    task: Task,
    expected: list[Tensor] | None = None,
) -> dict[str, Any]:
    """Load a file into a network without values and evaluate it.

    Returns ``test`` (:meth:`gossamer.training.Evaluation.as_dict`) and, with ``expected``
    (:func:`outputs` of the packed network), ``same``: whether the outputs agree to rounding,
    ``difference``: the largest one, and ``carried``: the tensors beside the file that had to be
    put back for that, by name.

    Raises what loading and evaluating raise.
    """
    # Values first: a change of structure may make other modules of these.
    model = load(path, empty.model, max_bytes=1 << 62)  # an archive has a bound of its own
    figures: dict[str, Any] = {}
    if expected is not None:
        same, difference = _compare(model, split, task, expected)
        figures["carried"] = []
        if not same and empty.others:
            _put_back(model, empty.others)
            same, difference = _compare(model, split, task, expected)
            figures["carried"] = sorted(empty.others)
        figures |= {"same": same, "difference": difference}
    figures["test"] = evaluate(model, split, task=task).as_dict()
    return figures


def _compare(
    model: nn.Module, split: Split, task: Task, expected: list[Tensor]
) -> tuple[bool, float | None]:
    """Whether outputs agree to rounding, and their largest difference (None: none was taken)."""
    try:
        found = outputs(model, split, task)
    except (ArithmeticError, LookupError, RuntimeError, ValueError):
        return False, None  # zeros where a constant should be may be no valid input
    if [t.shape for t in found] != [t.shape for t in expected]:
        return False, None
    same, most = True, 0.0
    for one, other in zip(found, expected, strict=True):
        a, b = one.double(), other.double()
        if not b.numel():
            continue
        largest = float(torch.nan_to_num(b).abs().max())
        same = same and torch.allclose(
            a, b, rtol=_ROUNDING, atol=_ROUNDING * largest, equal_nan=True
        )
        most = max(most, float(torch.nan_to_num(a - b, nan=0.0).abs().max()))
    return same, most


def _put_back(model: nn.Module, others: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for key, value in {**vars(module), **module._buffers}.items():
                known = others.get(clean(f"{prefix}.{key}".lstrip(".")))
                if isinstance(value, Tensor) and known is not None:
                    value.detach().copy_(known)


def check(
    path: Path,
    model: nn.Module | str | None = None,
    dataset: Split | str | None = None,
    *,
    threads: int = 1,
    task: Task | None = None,
    model_options: Mapping[str, Any] | None = None,
    expected: list[Tensor] | None = None,
) -> dict[str, Any]:
    """Decode a file in a fresh process: its digest, and with model and data its test figures.

    Args:
        path: the file.
        model: what :func:`gossamer.nets.build` makes there by name or function; or a module, which
            is sent over as its :func:`skeleton`, so that all values come from the file.
        dataset: a dataset's name, whose test split is used; or a split.
        task: by which it is evaluated; None: class indices.
        model_options: keyword arguments for ``nets.build``.
        expected: :func:`outputs` of the packed network, to compare with.

    Returns ``digest`` (:func:`digest` of the tensors, tied ones once) and either what
    :func:`prove` gives or, under ``unbuilt`` or ``failed``, in words, why the network could not
    be made there (its class cannot be imported, say) or why it could not be evaluated.

    Raises :class:`GossamerError` with the process's last words when the file cannot be decoded,
    :class:`ArgumentError` as :func:`skeleton` does.
    """
    command = [str(path), "--threads", str(threads)]
    unbuilt = unsent = ""
    with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
        if isinstance(model, nn.Module):
            try:
                Path(folder, "model.pkl").write_bytes(_pickled(skeleton(model)))
                command += ["--skeleton", f"{folder}/model.pkl"]
            except _Stays as e:
                unbuilt = str(e)
        elif model is not None:
            command += ["--model", model, "--options", json.dumps(dict(model_options or {}))]
        try:
            if isinstance(dataset, Split):
                _sent(dataset, f"{folder}/split.pkl", "the data")
                command += ["--split", f"{folder}/split.pkl"]
            elif dataset is not None:
                command += ["--dataset", dataset]
            _sent(task or Classification(), f"{folder}/task.pkl", "the task")
            command += ["--task", f"{folder}/task.pkl"]
        except _Stays as e:
            unsent = str(e)
        if expected is not None:
            torch.save(expected, f"{folder}/expected.pt")
            command += ["--expected", f"{folder}/expected.pt"]
        done = template.run(command)
    if done.returncode:
        raise GossamerError(f"{path} fails in a fresh process: {done.stderr.strip()[-800:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures | {k: v for k, v in (("unbuilt", unbuilt), ("unsent", unsent)) if v}


class _Stays(Exception):
    """A network that cannot be sent to another process; says why."""


def _pickled(empty: Skeleton) -> bytes:
    """The skeleton as bytes; raises :class:`_Stays` where the other side could not read them."""
    for module in empty.model.modules():
        if type(module).__module__ == "__main__":
            name = type(module).__qualname__
            raise _Stays(f"{name} is defined in the script itself; move it into a module")
    try:
        return pickle.dumps((empty.model, empty.others))
    except Exception as e:  # a local class, a lambda, an open file, a user's own __reduce__
        raise _Stays(f"it cannot be pickled ({_words(e)})") from e


def _sent(thing: Split | Task, path: str, what: str) -> None:
    """Write it for the other process; raises :class:`_Stays` where it could not be read there."""
    parts = [thing, *vars(thing).values()]
    if any(getattr(part, "__module__", "") == "__main__" for part in parts) or any(
        type(part).__module__ == "__main__" for part in parts
    ):
        raise _Stays(
            f"{what} is made with a class or function of the script itself; move it into a module"
        )
    try:
        Path(path).write_bytes(pickle.dumps(thing))
    except Exception as e:  # a lambda, a local function, an open file
        raise _Stays(f"{what} cannot be pickled ({_words(e)})") from e


def _words(e: BaseException) -> str:
    told = (str(e).strip().splitlines() or [""])[0][:200]
    return f"{type(e).__name__}: {told}" if told else type(e).__name__


def main() -> None:
    """What the process does; its last line of output holds the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--skeleton", type=Path)
    parser.add_argument("--dataset")
    parser.add_argument("--split", type=Path)
    parser.add_argument("--task", type=Path)
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    archive = Archive(given.path, max_bytes=1 << 62, keep=True)  # for the digest and the network
    tied = archive.aliases
    state = {name: archive.tensor(name) for name in archive.names if name not in tied}
    figures: dict[str, Any] = {"digest": digest(state)}
    try:
        empty = _built(given)
    except Exception as e:  # whatever a user's module or function raises when it is made here
        empty = None
        figures["unbuilt"] = _words(e)
    if empty is not None and given.task and (given.split or given.dataset):
        try:
            # Written a moment ago by the process that started this one.
            test = pickle.loads(given.split.read_bytes()) if given.split else None
            task = pickle.loads(given.task.read_bytes())
        except Exception as e:  # whatever a user's own class raises when it is imported here
            print(json.dumps(figures | {"unsent": _words(e)}))
            return
        try:
            if test is None:
                test = datasets.load(given.dataset).test
            expected = torch.load(given.expected, weights_only=True) if given.expected else None
            figures |= prove(archive, empty, test, task, expected)
        except Exception as e:  # and when it is loaded or called
            figures["failed"] = _words(e)
    print(json.dumps(figures))


def _built(given: argparse.Namespace) -> Skeleton | None:
    """The network without values, as it came or by its name; None where none was named."""
    if given.skeleton:
        # Written a moment ago by the process that started this one.
        return Skeleton(*pickle.loads(given.skeleton.read_bytes()))
    if not given.model:
        return None
    model, _ = plain(nets.build(given.model, **given.options))
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if isinstance(tensor, Tensor):
                tensor.detach().zero_()
    return Skeleton(model, {})  # its own code made whatever no file holds


if __name__ == "__main__":
    main()
