"""Tasks: what is fed, read, lost and measured; by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gossamer
from gossamer.core.errors import ArgumentError
from gossamer.datasets import Dataset, Split
from gossamer.training import soft_targets
from gossamer.training.metric import Metric, bootstrap, wilson
from gossamer.training.tasks import (
    TASKS,
    Classification,
    Distilled,
    Embedding,
    Fidelity,
    LanguageModel,
    MultiLabel,
    Regression,
    chosen,
    logits,
)


class Fixed(nn.Module):
    """Gives what it was made with, whatever it is fed."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args, **kwargs):
        return self.outputs


def whole(inputs, targets=None, **more):
    split = Split(inputs, targets)
    return Dataset("made", split, split, split, **more)


def test_segmentation_maps_take_the_classes_from_the_second_axis():
    # (1, 2, 1, 2): class 1 wins at the first pixel, class 0 at the second
    outputs = torch.tensor([[[[0.0, 3.0]], [[2.0, 1.0]]]])
    targets = torch.tensor([[[1, 1]]])
    found = gossamer.evaluate(Fixed(outputs), Split(torch.zeros(1, 3), targets))
    assert (found.correct, found.total) == (1, 2)
    assert found.loss == pytest.approx(
        (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2, rel=1e-6
    )


def test_classes_are_found_by_rank_even_where_sizes_agree():
    # (N, C, H, W) with C == H == W: by sizes the last axis would fit as well
    outputs = torch.zeros(2, 2, 2, 2)
    outputs[:, 1] = 1.0
    found = gossamer.evaluate(Fixed(outputs), Split(torch.zeros(2, 1), torch.ones(2, 2, 2).long()))
    assert found.correct == found.total == 8


def test_targets_of_minus_100_do_not_count():
    outputs = torch.tensor([[[5.0, 0.0], [0.0, 5.0], [5.0, 0.0]]])
    targets = torch.tensor([[0, -100, 1]])
    found = gossamer.evaluate(Fixed(outputs), Split(torch.zeros(1, 1), targets))
    assert (found.correct, found.total) == (1, 2)
    with pytest.raises(ArgumentError, match="no target counts"):
        gossamer.evaluate(Fixed(outputs), Split(torch.zeros(1, 1), torch.full((1, 3), -100)))


def test_a_language_model_is_measured_in_nats_and_bits_per_byte():
    outputs = torch.zeros(1, 3, 4)
    task = LanguageModel(bytes_per_token=2.0)
    found = gossamer.evaluate(
        Fixed(outputs), Split(torch.zeros(1, 3).long(), torch.tensor([[0, 1, 2]])), task=task
    )
    assert found.score == found.loss == pytest.approx(math.log(4))
    assert found.more["perplexity"] == pytest.approx(4)
    assert found.more["bits_per_byte"] == pytest.approx(1)  # log2(4) / 2
    assert not found.metric.higher_is_better
    assert found.as_dict()["accuracy"] == pytest.approx(1 / 3)


def test_labels_that_are_the_inputs_are_shifted():
    # a network that knows the next token: position 0 says 2, position 1 says 1
    outputs = torch.full((1, 3, 4), -20.0)
    outputs[0, 0, 2] = outputs[0, 1, 1] = outputs[0, 2, 0] = 20.0
    ids = torch.tensor([[3, 2, 1]])
    data = whole({"input_ids": ids}, ids.clone())
    task, _ = chosen(None, data)
    assert isinstance(task, LanguageModel)
    found = gossamer.evaluate(Fixed({"logits": outputs}), data.test, task=task)
    assert (found.correct, found.total) == (2, 2)
    # masked labels, as a masked language model has them, are not shifted
    masked = torch.tensor([[-100, 2, -100]])
    other = gossamer.evaluate(
        Fixed(outputs), Split({"input_ids": torch.tensor([[3, 0, 1]])}, masked), task=task
    )
    assert (other.correct, other.total) == (0, 1)


def test_regression_does_not_broadcast():
    split = Split(torch.zeros(2, 1), torch.tensor([1.0, 3.0]))
    with pytest.raises(ArgumentError, match="same"):
        gossamer.evaluate(Fixed(torch.zeros(2, 1)), split)
    found = gossamer.evaluate(Fixed(torch.tensor([1.0, 1.0])), split)
    assert found.score == found.loss == 2.0
    assert found.more["worst_squared error"] == 4.0
    with pytest.raises(ArgumentError, match="no accuracy"):
        _ = found.accuracy


def test_several_labels_are_counted_one_by_one():
    outputs = torch.tensor([[2.0, -1.0], [1.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = gossamer.evaluate(Fixed(outputs), Split(torch.zeros(2, 1), targets), task="multi-label")
    assert (found.correct, found.total) == (3, 4)
    want = F.binary_cross_entropy_with_logits(outputs, targets)
    assert found.loss == pytest.approx(float(want))


def test_embeddings_are_judged_by_their_cosine():
    split = Split(torch.zeros(2, 1), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    found = gossamer.evaluate(
        Fixed(torch.tensor([[3.0, 0.0], [1.0, 1.0]])), split, task=Embedding()
    )
    assert found.score == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert found.more["worst_cosine"] == pytest.approx(math.sqrt(0.5))


def test_fidelity_of_logits_is_the_agreement_of_answers():
    mine = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 4.0]])
    theirs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    task = Fidelity(Fixed(theirs), outputs="logits")
    found = gossamer.evaluate(Fixed(mine), Split(torch.zeros(3, 1)), task=task)
    assert found.score == pytest.approx(2 / 3)
    assert found.metric == Metric("agreement", "%")
    want = F.kl_div(
        F.log_softmax(mine, 1), F.log_softmax(theirs, 1), reduction="batchmean", log_target=True
    )
    assert found.loss == pytest.approx(float(want))


def test_fidelity_of_maps_takes_the_classes_from_the_second_axis():
    # (1, 2, 1, 2): the answers are the classes 1 and 1, and 1 and 0; along the last axis both agree
    mine = torch.tensor([[[[0.0, 3.0]], [[2.0, 4.0]]]])
    theirs = torch.tensor([[[[0.0, 5.0]], [[2.0, 4.0]]]])
    task = Fidelity(Fixed(theirs), outputs="logits")
    found = gossamer.evaluate(Fixed(mine), Split(torch.zeros(1, 3)), task=task)
    assert found.score == 0.5
    flat = [t.movedim(1, -1).reshape(-1, 2).log_softmax(1) for t in (mine, theirs)]
    want = F.kl_div(*flat, reduction="batchmean", log_target=True)
    assert found.loss == pytest.approx(float(want))


def test_fidelity_of_values_takes_all_tensors_of_an_example_together():
    mine = (torch.tensor([[1.0], [0.0]]), {"b": torch.tensor([[0.0], [1.0]])})
    theirs = (torch.tensor([[1.0], [1.0]]), {"b": torch.tensor([[0.0], [1.0]])})
    found = gossamer.evaluate(Fixed(mine), Split(torch.zeros(2, 1)), task=Fidelity(Fixed(theirs)))
    assert found.score == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert found.more["relative_error"] == pytest.approx(math.sqrt(0.5) / 2)


def test_states_that_are_not_one_an_example_count_as_one():
    mine, theirs = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    found = gossamer.evaluate(Fixed(mine), Split(torch.zeros(3, 1)), task=Fidelity(Fixed(theirs)))
    assert found.score == pytest.approx(math.sqrt(0.5))


def test_fidelity_refuses_other_tensors_and_no_reference():
    split = Split(torch.zeros(2, 1))
    with pytest.raises(ArgumentError, match="cannot be compared"):
        gossamer.evaluate(Fixed(torch.zeros(2, 3)), split, task=Fidelity(Fixed(torch.zeros(2, 4))))
    with pytest.raises(ArgumentError, match="no reference"):
        gossamer.evaluate(Fixed(torch.zeros(2, 3)), split, task=Fidelity())


def test_a_reference_is_left_in_its_mode():
    reference = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    reference.train()
    Fidelity(reference).wanted(torch.zeros(1, 2))
    assert all(m.training for m in reference.modules())


@pytest.mark.parametrize("way", ["each", "mean", "object"])
def test_a_metric_of_ones_own(way):
    outputs, targets = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])

    class Object:
        def reset(self):
            self.off = []

        def update(self, found, wanted):
            self.off += (found - wanted).abs().tolist()

        def compute(self):
            return sum(self.off) / len(self.off)

    metric = {
        "each": lambda a, b: (a - b).abs(),
        "mean": lambda a, b: (a - b).abs().mean(),
        "object": Object(),
    }[way]
    task = gossamer.task(F.mse_loss, metric, name="off", unit="m", higher_is_better=False)
    found = gossamer.evaluate(Fixed(outputs), Split(torch.zeros(3, 1), targets), task=task)
    assert found.score == pytest.approx(5 / 3)
    assert found.loss == pytest.approx(float(F.mse_loss(outputs, targets)))
    assert found.metric.relative
    assert found.metric.show(2.5) == "2.5 m"


@pytest.mark.parametrize("metric", [lambda a, b: a * math.nan, lambda a, b: torch.zeros(5)])
def test_a_metric_that_is_none_is_refused(metric):
    task = gossamer.task(F.mse_loss, metric)
    with pytest.raises(ArgumentError, match=r"NaN|5"):
        gossamer.evaluate(
            Fixed(torch.zeros(3)), Split(torch.zeros(3, 1), torch.zeros(3)), task=task
        )


def test_an_object_that_computes_nan_is_refused():
    class Nothing:
        def reset(self):
            pass

        def update(self, outputs, targets):
            pass

        def compute(self):
            return math.nan

    task = gossamer.task(F.mse_loss, Nothing(), name="nothing")
    with pytest.raises(ArgumentError, match="'nothing' computes NaN"):
        gossamer.evaluate(
            Fixed(torch.zeros(3)), Split(torch.zeros(3, 1), torch.zeros(3)), task=task
        )


def test_read_and_feed_of_ones_own():
    class Boxes(nn.Module):
        def forward(self, image, scale):
            return {"boxes": image * scale, "scores": image}

    task = gossamer.task(
        F.mse_loss,
        lambda a, b: (a == b).double(),
        read=lambda outputs: outputs["boxes"],
        feed=lambda model, inputs: model(inputs, scale=2),
    )
    found = gossamer.evaluate(
        Boxes(), Split(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])), task=task
    )
    assert found.score == 0.5


@pytest.mark.parametrize("kind", ["tensor", "object", "mapping", "tuple"])
def test_logits_are_found(kind):
    wanted = torch.ones(2)

    class Output:
        logits = wanted

    outputs = {
        "tensor": wanted,
        "object": Output(),
        "mapping": {"logits": wanted, "hidden": torch.zeros(1)},
        "tuple": (wanted, None),
    }[kind]
    assert logits(outputs) is wanted


@pytest.mark.parametrize("outputs", [(torch.ones(1), torch.ones(1)), {"a": torch.ones(1)}, None])
def test_no_choice_among_outputs_is_made(outputs):
    with pytest.raises(ArgumentError, match="no one tensor of logits"):
        logits(outputs)


def test_distillation_is_that_of_soft_targets():
    torch.manual_seed(0)
    outputs, wanted = torch.randn(4, 3), torch.randn(4, 3)
    targets = torch.tensor([0, 1, 2, 0])
    aim = Distilled(Classification(), Fixed(wanted), 0.7, 3.0)
    found = aim.loss(outputs, targets, torch.zeros(4, 1))
    assert torch.equal(found, soft_targets(outputs, targets, wanted, temperature=3.0, weight=0.7))


def test_distillation_of_values_and_without_labels():
    outputs, wanted = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    aim = Distilled(Regression(), Fixed(wanted), 0.5, 1.0)
    # squared error over power: 2 / 4; mean squared error to the targets: 1
    assert float(aim.loss(outputs, torch.zeros(1, 2), torch.zeros(1))) == pytest.approx(0.75)
    alone = Distilled(Fidelity(Fixed(wanted)), Fixed(wanted), 0.0, 1.0)
    assert float(alone.loss(outputs, None, torch.zeros(1))) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("inputs", "targets", "more", "kind"),
    [
        (torch.zeros(4, 2), torch.zeros(4).long(), {}, Classification),
        (torch.zeros(4, 2), torch.zeros(4, 1), {}, Regression),
        (torch.zeros(4, 2), torch.rand(4, 3) + 0.1, {}, Regression),
        (torch.zeros(4, 2), None, {}, Fidelity),
        (torch.zeros(4, 2), torch.zeros(4).long(), {"task": "regression"}, Regression),
        (torch.zeros(4, 2), torch.zeros(4, 2), {"task": MultiLabel()}, MultiLabel),
    ],
)
def test_the_task_follows_from_the_data(inputs, targets, more, kind):
    assert type(chosen(None, whole(inputs, targets, **more))[0]) is kind


def test_fidelity_takes_outputs_for_logits_where_classes_are_known():
    found, told = chosen(None, whole(torch.zeros(3, 1), classes=4))
    assert found.outputs == "logits"
    assert "no labels" in told[0]
    found, told = chosen(None, whole(torch.zeros(3, 1)))
    assert found.outputs == "values"
    assert "fidelity-logits" in told[1]


def test_what_more_than_one_task_could_mean_is_asked():
    with pytest.raises(ArgumentError, match="'multi-label' or 'regression'"):
        chosen(None, whole(torch.zeros(4, 2), torch.eye(4)))
    with pytest.raises(ArgumentError, match="no built-in task"):
        chosen(None, whole(torch.zeros(4, 2), {"boxes": torch.zeros(4, 4)}))
    with pytest.raises(ArgumentError, match="reads targets"):
        chosen("classification", whole(torch.zeros(4, 2)))
    with pytest.raises(ArgumentError, match="did you mean 'regression'"):
        chosen("regresion", whole(torch.zeros(4, 2), torch.zeros(4)))


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_tells_itself_apart(name):
    made = TASKS[name](whole(torch.zeros(4, 2), torch.zeros(4).long()))
    assert made.settings()["metric"]["name"] == made.metric.name


def test_a_drop_is_absolute_for_fractions_and_relative_for_losses():
    accuracy, loss = Metric(), Metric("loss", "nats", False, True)
    assert accuracy.keeps(0.9, 0.895, 0.005)
    assert not accuracy.keeps(0.9, 0.894, 0.005)
    assert loss.keeps(2.0, 2.01, 0.005)
    assert not loss.keeps(2.0, 2.02, 0.005)
    assert not loss.keeps(2.0, math.nan, 1.0)
    assert accuracy.better(0.9, 0.8)
    assert loss.better(0.8, 0.9)


def test_the_interval_of_a_mean_is_seeded_and_holds_it():
    values = torch.arange(100, dtype=torch.float64)
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values)
    assert low < 49.5 < high
    # the mean's standard error is 28.9 / 10: the interval is about 4 of them wide
    assert 9 < high - low < 13.5
    assert bootstrap(values[:1]) is None
    assert wilson(90, 100)[0] == pytest.approx(0.8256, abs=1e-4)
