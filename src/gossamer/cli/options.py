"""What commands share: options, and how they read and tell things."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from gossamer.datasets import Dataset

__all__ = [
    "DATASET",
    "MODEL",
    "AsJson",
    "Data",
    "Key",
    "Model",
    "Pretrained",
    "Seed",
    "Threads",
    "Weights",
    "accuracy",
    "load",
    "settle",
    "smaller",
]

MODEL = (
    "A network's name, module:function, file.py:function, an exported .pt2, TorchScript, or "
    "hf:FOLDER of transformers."
)
DATASET = "digits, mnist, cifar10, text:NAME, module:function or file.py:function."
Model = Annotated[str, typer.Option("--model", "-m", help=MODEL)]
Data = Annotated[str, typer.Option("--dataset", "-d", help=DATASET)]
Weights = Annotated[
    Path | None, typer.Option(help="Trained tensors: .safetensors, .gsm, .pt or .pth.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="The network's published weights.")]
Key = Annotated[
    str | None,
    typer.Option("--key", help="Where in a checkpoint the tensors are, e.g. ema or state.model."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    model: str, dataset: str, weights: Path | None, pretrained: bool, key: str | None = None
) -> tuple[nn.Module, Dataset]:
    """The network and the data that options name, tried on two examples."""
    from gossamer import datasets
    from gossamer.compression import door, inputs

    data = datasets.load(dataset)
    network = inputs.network(model, data, pretrained=pretrained, weights=weights, key=key)
    door.check_fit(network, data)
    return network, data


def smaller(dense: int, size: int) -> str:
    """How much smaller a file is, in words.

    >>> smaller(1000, 400), smaller(1000, 1010)
    ('2.5x smaller', 'not smaller')
    """
    return f"{dense / size:.1f}x smaller" if dense > size else "not smaller"


def accuracy(found: Any, split: str) -> str:
    """An accuracy with its interval, in words."""
    low, high = found.interval()
    return (
        f"{100 * found.accuracy:.2f} % {split} accuracy ({found.correct:,}/{found.total:,}, "
        f"95 %: {100 * low:.2f} to {100 * high:.2f})"
    )
