"""What is no dataset, no configuration and no class is told by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.training.tasks import Classification

X, Y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
CONFIG = gossamer.TrainConfig(epochs=1)


@pytest.mark.parametrize(
    ("data", "config", "words"),
    [
        ((X, Y), CONFIG, r"dataset is of type tuple; .*as_dataset"),
        (gossamer.as_dataset((X, Y)), {"epochs": 1}, "config is of type dict; give gossamer"),
    ],
)
def test_train_takes_a_dataset_and_a_configuration(data: Any, config: Any, words: str) -> None:
    with pytest.raises(GossamerError, match=words):
        gossamer.train(nn.Linear(4, 3), data, config)


@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 2, 2)])
def test_a_class_beyond_the_outputs(shape: tuple[int, ...]) -> None:
    targets = torch.tensor([0, 1, -100 if len(shape) > 1 else 1, 2]).view(shape)
    outputs = torch.zeros((*shape, 2) if len(shape) < 3 else (1, 2, 2, 2))
    with pytest.raises(ArgumentError, match="reach from 0 to 2, and the network has 2 outputs"):
        Classification().loss(outputs, targets, None)
    with pytest.raises(ArgumentError, match="the network has 2 outputs"):
        gossamer.train(nn.Linear(4, 2), gossamer.as_dataset((X, Y)), CONFIG)


def test_a_run_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(ArgumentError, match="is a file; name a directory"):
        gossamer.compress(
            nn.Linear(4, 3), gossamer.as_dataset((X, Y)), out=tmp_path / "run", progress=False
        )
    assert (tmp_path / "run").read_text() == "x"
