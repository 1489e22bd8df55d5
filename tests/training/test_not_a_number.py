"""A network that gives NaN answers nothing: it is never right by chance."""

import torch
from torch import Tensor, nn

from gossamer.datasets import Split
from gossamer.training import evaluate
from gossamer.training.tasks import Fidelity


class Fixed(nn.Module):
    """Gives these logits, whatever comes in."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)]


NAN = float("nan")
LOGITS = torch.tensor([[NAN, NAN], [NAN, 1.0], [0.0, NAN], [2.0, 1.0]])  # argmax: 0, 0, 1, 0


def test_nan_is_no_class() -> None:
    split = Split(torch.zeros(4, 1), torch.tensor([0, 0, 1, 0]))
    assert evaluate(Fixed(LOGITS), split).correct == 1


def test_nan_is_no_class_of_a_pixel() -> None:
    maps = LOGITS.view(4, 2, 1, 1)
    split = Split(torch.zeros(4, 1), torch.tensor([0, 0, 1, 0]).view(4, 1, 1))
    assert evaluate(Fixed(maps), split, task="classification").correct == 1


def test_nan_has_no_sign() -> None:
    split = Split(torch.zeros(4, 1), torch.tensor([[0.0, 0], [0, 1], [0, 0], [1, 1]]))
    assert evaluate(Fixed(LOGITS), split, task="multi-label").correct == 4  # of 4 that are numbers


def test_nan_agrees_with_nothing() -> None:
    split = Split(torch.zeros(4, 1))
    task = Fidelity(Fixed(torch.tensor([[1.0, 0.0], [1, 0], [0, 1], [1, 0]])), "logits")
    assert evaluate(Fixed(LOGITS), split, task=task).score == 0.25
