"""Networks and packed files compiled for this machine; a file's plan is kept beside it.

The plan's file is named by the processor and by a hash of what it was made of: the packed file,
the example's shapes, the threads, the engine, and for int8 the calibration inputs. It is used where
its digest is right, it was made of just that and beside the same versions of other engines, and it
gives what the network gives on the example; else it is made anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gossamer.compression.records import load
from gossamer.core import machine, nest
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.plain import copied
from gossamer.datasets import Split
from gossamer.runtime.export import Precision, batches_of
from gossamer.runtime.plan.door import FLOOR, Engine, compile_network, recheck
from gossamer.runtime.plan.forms import form_of, values
from gossamer.runtime.plan.kernels import KERNELS
from gossamer.runtime.plan.plan import Plan

__all__ = ["beside", "compile"]


def compile(
    model_or_file: nn.Module | str | Path,
    example_inputs: Any,
    *,
    model: nn.Module | None = None,
    engine: Engine = "auto",
    precision: Precision = "float32",
    calibration: Iterable[Any] | Split | None = None,
    floor: float = FLOOR,
    threads: int = 1,
    rounds: int = 30,
    seconds: float = 0.2,
    cache: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """A network with the kernels that are fastest here, called as the network is.

    Args:
        model_or_file: the network, or a ``.gsm`` file of its tensors.
        example_inputs: one batch as the network takes it.
        model: of a file: the network that it is of, which is left as it is.
        engine, precision, calibration, floor, threads, rounds, seconds, say:
            as for :func:`gossamer.runtime.plan.door.compile_network`.
        cache: of a file: look for its plan beside it, and leave one there.

    Raises as :func:`gossamer.runtime.plan.door.compile_network` and :func:`gossamer.load`, and
    :class:`ArgumentError` for a file without its network.
    """
    if calibration is not None and not isinstance(calibration, (Tensor, Split)):
        calibration = list(calibration)  # it is read twice
    given: dict[str, Any] = {"engine": engine, "precision": precision, "threads": threads}
    more: dict[str, Any] = {"rounds": rounds, "seconds": seconds, "say": say}
    more |= {"calibration": calibration, "floor": floor}
    if isinstance(model_or_file, nn.Module):
        if model is not None:
            raise ArgumentError("model= is of a file; model_or_file is a network already")
        return compile_network(model_or_file, example_inputs, **given, **more)
    file = Path(model_or_file)
    if model is None:
        raise ArgumentError(f"{file} holds tensors; give the network that they are of: model=")
    network = load(file, copied(model))
    key = _key(file, network, example_inputs, given)
    if precision == "int8" and calibration is not None:
        key["calibration"] = _digest(calibration, example_inputs)
    target = beside(file, key)
    if cache and target.is_file():
        try:
            plan = Plan.load(target, key)
            recheck(plan, network, example_inputs, floor)
        except (FormatError, ArgumentError) as e:
            say(f"the plan beside the file is made anew: {e}")
        else:
            return plan
    plan = compile_network(network, example_inputs, **given, **more)
    if cache:
        try:
            plan.save(target, key)
        except (ArgumentError, OSError) as e:  # parts in torch, or a folder that cannot be written
            plan.facts.notes.append(f"no plan was left beside the file: {e}")
    return plan


def _key(file: Path, network: nn.Module, example: Any, given: dict[str, Any]) -> dict[str, Any]:
    with file.open("rb") as held:
        digest = hashlib.file_digest(held, "sha256").hexdigest()
    return {
        "file": digest,
        "network": type(network).__name__,
        "example": nest.shown(example),
        "values": values(form_of(example)),
        "processor": machine.cpu(),
        "kernels": sorted(KERNELS),
        "engines": {k.package: _version(k.package) for k in KERNELS.values() if k.package},
        **given,
    }


def _version(package: str) -> str:
    """Of an engine; one that comes, goes or changes may turn the choice."""
    try:
        return metadata.version(package) if find_spec(package) else "not installed"
    except (metadata.PackageNotFoundError, ValueError):
        return "of no version"


def _digest(calibration: Any, example: Any) -> str:
    """Of the calibration inputs, which an integer plan is made of too."""
    digest = hashlib.sha256()
    tensors = [t.float() if t.is_floating_point() else t for t in nest.leaves(example)]
    for batch in batches_of(calibration, example, tensors):
        for tensor in batch:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def beside(file: Path, key: dict[str, Any]) -> Path:
    """Where the plan of a file is kept; engines that change leave the place."""
    named = {name: value for name, value in key.items() if name != "engines"}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
    processor = re.sub(r"\W+", "-", key["processor"]).strip("-").lower()
    return file.with_name(f"{file.stem}.{processor[:40]}.{digest}.plan")
