"""What commands share: options, and how they read and tell things."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.core.errors import ArgumentError

if TYPE_CHECKING:
    from torch import nn

    from gossamer.datasets import Dataset
    from gossamer.training import Evaluation, Task

__all__ = [
    "DATASET",
    "MODEL",
    "AsJson",
    "Data",
    "Examples",
    "Key",
    "Model",
    "Pretrained",
    "Seed",
    "Shape",
    "TaskName",
    "Threads",
    "Weights",
    "example",
    "load",
    "scored",
    "settle",
    "smaller",
]

MODEL = (
    "A network's name, module:function, file.py:function, an exported .pt2, TorchScript, or "
    "hf:FOLDER of transformers."
)
DATASET = (
    "digits, mnist, cifar10, text:NAME, module:function, file.py:function, or a file of inputs: "
    ".npy, .npz, .safetensors, .pt."
)
Model = Annotated[str, typer.Option("--model", "-m", help=MODEL)]
Data = Annotated[str, typer.Option("--dataset", "-d", help=DATASET)]
Weights = Annotated[
    Path | None, typer.Option(help="Trained tensors: .safetensors, .gsm, .pt or .pth.")
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="What the network is for: classification, language-model, regression, multi-label, "
        "embedding, fidelity or fidelity-logits; left out: by the data.",
    ),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="The network's published weights.")]
Key = Annotated[
    str | None,
    typer.Option("--key", help="Where in a checkpoint the tensors are, e.g. ema or state.model."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


Examples = Annotated[
    str | None, typer.Option("--dataset", "--data", "-d", help=f"Example inputs: {DATASET}")
]
Shape = Annotated[
    str | None,
    typer.Option(help="Of one random example where there is no data, without batch: 3,32,32."),
]


def _threads(count: int | None) -> int | None:
    if count is not None:
        import torch

        torch.set_num_threads(count)
    return count


Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        callback=_threads,
        help="torch threads; left out: $OMP_NUM_THREADS, else one for a small network, and for "
        "others as many as cores are idle.",
    ),
]


def settle(threads: int | None, model: nn.Module, data: Dataset) -> None:
    """Take so many torch threads that they cannot hurt, where nobody named a number."""
    import torch

    from gossamer.compression import threads as choice

    if threads is None and not choice.asked_for():
        torch.set_num_threads(choice.chosen(model, data))


def load(
    model: str,
    dataset: str,
    weights: Path | None,
    pretrained: bool,
    key: str | None = None,
    task: str | None = None,
) -> tuple[nn.Module, Dataset, Task]:
    """The network, data and task that options name, tried on two examples."""
    from gossamer import datasets
    from gossamer.compression import door, inputs
    from gossamer.training.tasks import chosen

    data = datasets.load(dataset)
    aim, _ = chosen(task, data)
    if not aim.labelled:
        raise ArgumentError(
            f"dataset {data.name!r} has no labels, so one network on its own has no score; give "
            "labels, or compress it: a run compares with the network before"
        )
    network = inputs.network(model, data, pretrained=pretrained, weights=weights, key=key)
    door.check_fit(network, data, aim)
    return network, data, aim


def smaller(dense: int, size: int) -> str:
    """How much smaller a file is, in words.

    >>> smaller(1000, 400), smaller(1000, 1010)
    ('2.5x smaller', 'not smaller')
    """
    return f"{dense / size:.1f}x smaller" if dense > size else "not smaller"


def scored(found: Evaluation, split: str) -> str:
    """A score with its interval, in words."""
    metric, ends = found.metric, found.interval()
    counted = "" if found.correct is None else f"{found.correct:,}/"
    between = ""
    if ends is not None:
        low, high = (metric.show(end).partition(" ")[0] for end in ends)
        between = f", 95 %: {low} to {high}"
    return f"{metric.show(found.score)} {split} {metric.name} ({counted}{found.total:,}{between})"


def example(data: Dataset | None, shape: str | None, count: int = 2) -> Any:
    """Example inputs: of the data, or random ones of a shape; None for neither."""
    import torch

    if shape is None:
        return None if data is None else data.test.batch(slice(0, count))[0]
    try:
        sizes = [int(part) for part in shape.replace("x", ",").split(",")]
        return torch.randn(count, *sizes, generator=torch.Generator().manual_seed(0))
    except (ValueError, RuntimeError) as e:
        raise ArgumentError(f"--shape {shape!r} is no shape of an example, such as 3,32,32") from e
