"""Tasks on odd batches: labels that do not count, outputs that are no numbers; by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gossamer
from gossamer.core.errors import ArgumentError
from gossamer.datasets import Dataset, Split
from gossamer.training import TrainConfig, soft_targets, train
from gossamer.training.tasks import Classification, Fidelity, MultiLabel


class Fixed(nn.Module):
    """Gives what it was made with, whatever it is fed."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args, **kwargs):
        return self.outputs


def test_a_batch_in_which_nothing_counts_costs_nothing():
    outputs = torch.zeros(2, 3, 4, requires_grad=True)
    targets = torch.full((2, 3), -100)
    loss = Classification().loss(outputs, targets, None)
    assert float(loss.detach()) == 0
    loss.backward()
    assert outputs.grad is not None
    assert not outputs.grad.any()
    teacher = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert float(soft_targets(torch.zeros(2, 3, 4), targets, teacher)) == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_output_that_is_no_number_is_no_right_answer(place):
    # argmax takes NaN for the largest, and NaN > 0 is False: both were counted as right
    nothing = torch.full((4, 3), math.nan)
    labels = torch.zeros(4, dtype=torch.long)
    split = Split(torch.zeros(4, 2), labels)
    assert gossamer.evaluate(Fixed(nothing), split).correct == 0
    one = torch.tensor([[1.0, 0.0, 0.0]]).repeat(4, 1)
    one[0, place] = math.nan
    assert gossamer.evaluate(Fixed(one), split).correct == 3
    several = Split(torch.zeros(4, 2), F.one_hot(labels, 3).float())
    assert gossamer.evaluate(Fixed(nothing), several, task="multi-label").correct == 0
    assert gossamer.evaluate(Fixed(one), several, task="multi-label").correct == 11
    unlabelled, same = Split(torch.zeros(4, 2)), Fidelity(Fixed(one), "logits")
    assert gossamer.evaluate(Fixed(nothing), unlabelled, task=same).score == 0
    whole = Fidelity(Fixed(torch.eye(3)[labels]), "logits")
    assert gossamer.evaluate(Fixed(one), unlabelled, task=whole).score == 0.75


def test_labels_that_are_a_plain_tensor_of_inputs_are_shifted_too():
    g = torch.Generator().manual_seed(0)
    ids, outputs = torch.randint(5, (3, 4), generator=g), torch.randn(3, 4, 5, generator=g)
    found = gossamer.evaluate(Fixed(outputs), Split(ids, ids), task="language-model")
    wanted = F.cross_entropy(outputs[:, :-1].reshape(-1, 5), ids[:, 1:].reshape(-1))
    assert found.loss == pytest.approx(float(wanted), rel=1e-6)
    assert found.total == 9
    # other marks than the inputs' own: next tokens, as they are
    marked = ids.clone()
    marked[:, :3] = -100
    found = gossamer.evaluate(Fixed(outputs), Split(ids, marked), task="language-model")
    assert found.loss == pytest.approx(float(F.cross_entropy(outputs[:, 3], ids[:, 3])), rel=1e-6)


def test_labels_that_do_not_count_are_left_out_one_by_one():
    # -100 was a label, of a loss below zero
    outputs = torch.tensor([[2.0, -1.0, 3.0], [0.5, -2.0, 1.0]])
    targets = torch.tensor([[1, -100, 0], [-100, 0, 1]])
    counted = targets != -100
    found = gossamer.evaluate(Fixed(outputs), Split(torch.zeros(2, 1), targets), task="multi-label")
    wanted = F.binary_cross_entropy_with_logits(outputs[counted], targets[counted].float())
    assert (found.correct, found.total) == (3, 4)
    assert found.loss == pytest.approx(float(wanted), rel=1e-6)
    assert float(MultiLabel().loss(outputs, torch.full((2, 3), -100), None)) == 0


@pytest.mark.parametrize("label", [2.0, -1.0])
def test_what_is_no_label_is_refused(label):
    split = Split(torch.zeros(1, 1), torch.tensor([[0.0, label]]))
    with pytest.raises(ArgumentError, match=f"targets hold {label}"):
        gossamer.evaluate(Fixed(torch.zeros(1, 2)), split, task="multi-label")


def test_numbers_are_no_embeddings():
    with pytest.raises(ArgumentError, match="no vectors"):
        gossamer.evaluate(
            Fixed(torch.ones(2)), Split(torch.zeros(2, 1), torch.ones(2)), task="embedding"
        )


def test_a_last_batch_of_one_is_told_before_the_first_step():
    torch.manual_seed(0)
    split = Split(torch.randn(9, 4), torch.arange(9) % 3)
    data = Dataset("made", split, split, split)
    flat = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = {n: t.clone() for n, t in flat.state_dict().items()}
    with pytest.raises(ArgumentError, match="another batch_size than 8"):
        train(flat, data, TrainConfig(epochs=1, batch_size=8))
    assert all(torch.equal(t, before[n]) for n, t in flat.state_dict().items())
    # enough values of one example
    maps = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Flatten(),
        nn.Linear(12, 3),
    )  # fmt: skip
    train(maps, data, TrainConfig(epochs=1, batch_size=8))
    assert maps[2].num_batches_tracked == 2
