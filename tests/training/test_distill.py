"""Losses against a teacher."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import training
from gossamer.core.errors import ArgumentError
from gossamer.datasets import Dataset, Split
from gossamer.training.distill import Features, attention, attention_transfer, hint, soft_targets


def test_the_old_name_is_the_same_function() -> None:
    assert training.soft_targets is soft_targets


def test_gradient_scale_does_not_depend_on_the_temperature() -> None:
    # zero-mean logits, for which the limit of high temperatures is exact to first order
    g = torch.Generator().manual_seed(0)
    outputs = torch.randn(64, 10, generator=g)
    teacher = torch.randn(64, 10, generator=g)
    norms = []
    for t in (4.0, 8.0, 12.0, 20.0):
        leaf = outputs.clone().requires_grad_()
        targets = torch.zeros(64, dtype=torch.long)
        soft_targets(leaf, targets, teacher, temperature=t, weight=1.0).backward()
        norms.append(float(leaf.grad.norm()))
    assert max(norms) <= 1.1 * min(norms)


def test_soft_targets_of_sequences_and_of_the_teacher_itself() -> None:
    g = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(2, 3, 5, generator=g), torch.arange(6).view(2, 3) % 5
    hard = F.cross_entropy(outputs.view(6, 5), targets.view(6))
    assert float(soft_targets(outputs, targets, outputs, weight=0.25)) == pytest.approx(
        0.75 * float(hard), rel=1e-5
    )


def test_places_that_do_not_count_have_no_soft_target_either() -> None:
    g = torch.Generator().manual_seed(0)
    outputs, teacher = torch.randn(2, 3, 5, generator=g), torch.randn(2, 3, 5, generator=g)
    targets = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    kept = targets != -100
    wanted = soft_targets(outputs[kept], targets[kept], teacher[kept], weight=0.5)
    assert torch.equal(soft_targets(outputs, targets, teacher, weight=0.5), wanted)


@pytest.mark.parametrize(
    ("outputs", "targets", "teacher", "options", "message"),
    [
        ((1, 10), torch.zeros(1).long(), (1, 20), {}, "do not fit"),  # would be broadcast
        ((4, 10), torch.zeros(4).long(), (1, 10), {}, "do not fit"),
        ((2, 5, 5, 5), torch.zeros(2, 5, 5).long(), (2, 5, 4, 5), {}, "do not fit"),
        ((2, 5, 4, 4), torch.zeros(2, 4, 4).long(), (2, 5, 4, 4), {}, "do not fit"),
        ((4, 3), torch.zeros(4), (4, 3), {}, "class indices"),
        ((4, 3), torch.zeros(4).long(), (4, 3), {"temperature": 0.0}, "temperature=0.0"),
        ((4, 3), torch.zeros(4).long(), (4, 3), {"temperature": -1.0}, "temperature=-1.0"),
        ((4, 3), torch.zeros(4).long(), (4, 3), {"weight": 1.5}, "weight=1.5"),
    ],
)
def test_what_does_not_fit_is_refused(outputs, targets, teacher, options, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        soft_targets(torch.zeros(outputs), targets, torch.zeros(teacher), **options)


class Reads(nn.Module):
    """A table of logits, whatever it is called with."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(shape))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("kind", ["labels are the inputs", "maps"])
def test_a_teacher_is_read_as_the_task_reads_the_network(kind: str) -> None:
    # labels were not shifted, and maps of as many columns as classes read by their rows
    torch.manual_seed(0)
    if kind == "maps":
        student, teacher, labels = Reads(1, 4, 4, 4), Reads(1, 4, 4, 4), torch.randint(4, (1, 4, 4))
        split = Split({"input_ids": torch.zeros(1, 1)}, labels)
        mine, theirs = (m.logits.detach().movedim(1, -1) for m in (student, teacher))
        wanted = soft_targets(mine, labels, theirs)
    else:
        student, teacher, labels = Reads(1, 5, 7), Reads(1, 5, 7), torch.randint(7, (1, 5))
        split = Split({"input_ids": labels}, labels)
        mine, theirs = (m.logits.detach()[:, :-1] for m in (student, teacher))
        wanted = soft_targets(mine, labels[:, 1:], theirs)
    config = training.TrainConfig(epochs=1, lr=1e-6)
    data = Dataset("made", split, split, split)
    history = training.train(student, data, config, teacher=teacher)
    assert history.epochs[0]["train_loss"] == pytest.approx(float(wanted), rel=1e-6)


def test_hint_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0], [3.0]])
    regressor = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        regressor.weight.copy_(torch.tensor([[1.0, 1.0]]))
    loss = hint(student, teacher, regressor)
    assert float(loss.detach()) == pytest.approx((2**2 + 3**2) / 2 / 2)
    loss.backward()
    assert regressor.weight.grad is not None
    assert float(hint(teacher, teacher)) == 0
    with pytest.raises(ArgumentError, match="give a regressor"):
        hint(student, teacher)


def test_attention_by_hand() -> None:
    maps = torch.tensor([[[[3.0, 0.0]], [[0.0, 3.0]], [[0.0, 0.0]]]])  # (1, 3, 1, 2)
    assert attention(maps).flatten().tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    other = torch.tensor([[[[2.0, 0.0]]]])
    wanted = ((0.5**0.5 - 1) ** 2 + 0.5) / 2
    assert float(attention_transfer(maps, other)) == pytest.approx(wanted)
    assert float(attention_transfer(maps, 7 * maps)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ArgumentError, match="only the channels may differ"):
        attention_transfer(maps, torch.zeros(1, 3, 2, 2))
    with pytest.raises(ArgumentError, match="attention maps are of"):
        attention(torch.zeros(2, 3))


def test_features_read_layers_and_leave_no_hook() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.ones(1, 3)
    with Features(model, ["0", "re:2"]) as seen:
        with pytest.raises(ArgumentError, match="has no output"):
            seen["0"]
        out = model(x)
        assert torch.equal(seen["2"], out)
        hint(seen["0"], torch.zeros(1, 4)).backward()
        with pytest.raises(ArgumentError, match="chosen are 0, 2"):
            seen["1"]
    assert model[0].weight.grad is not None
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ArgumentError, match="matches nothing"):
        Features(model, "conv")
