"""Networks and data of any kind through a run: labels or none, one tensor or many."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gossamer
from gossamer.compression import door
from gossamer.core.errors import ArgumentError, RecipeError
from gossamer.datasets import as_dataset
from gossamer.training.tasks import chosen

FEW = {"name": "few", "max_drop": 1, "stages": [{"obs": {"bits": 6, "calibration": 16}}]}


def made(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class Speaker(nn.Module):
    """A small recurrent encoder: one vector a sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(5, 8, 2, batch_first=True)
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Tokens(nn.Module):
    """A dictionary in, an object with logits out."""

    class Output(dict):
        @property
        def logits(self):
            return self["logits"]

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.out = nn.Linear(8, 12)

    def forward(self, input_ids, attention_mask=None):
        return self.Output(logits=self.out(self.embed(input_ids)))


class Cascade(nn.Module):
    """A tuple of outputs, as detectors give."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.box, self.score = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x):
        h = torch.relu(self.body(x))
        return self.box(h), self.score(h).softmax(-1)


X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(12, (40, 7), generator=torch.Generator().manual_seed(0))


def test_inputs_alone_end_in_a_proved_file_and_a_page(tmp_path):
    result = gossamer.compress(
        Speaker(), torch.randn(40, 3, 5), recipe=FEW, out=tmp_path / "run", progress=False
    )
    assert result.problems == []
    assert result.before.score == pytest.approx(1)
    assert 0.99 < result.after.score < 1
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["task"]["name"] == "fidelity"
    assert run["evaluation"]["after"]["worst_cosine"] <= run["evaluation"]["after"]["score"]
    assert any("no labels" in note for note in run["notes"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Cosine before and after" in page
    assert "ccuracy" not in page
    assert "test cosine" in repr(result)


def test_without_labels_training_learns_from_the_network_before(tmp_path):
    network = made()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(3)  # answers that are worth learning
    recipe = {
        "name": "p",
        "max_drop": 1,
        "stages": [{"prune": {"density": 0.7, "retrain": {"epochs": 60, "lr": 0.1}}}],
    }
    bare = {"name": "p", "max_drop": 1, "stages": [{"prune": {"density": 0.7}}]}
    data = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    trained = gossamer.compress(
        network, as_dataset(data, classes=4), recipe=recipe, out=tmp_path / "t", progress=False
    )
    plain = gossamer.compress(
        network, as_dataset(data, classes=4), recipe=bare, out=tmp_path / "b", progress=False
    )
    assert trained.after.metric.name == "agreement"
    assert trained.after.loss < 0.7 * plain.after.loss


def test_a_floor_of_fidelity_is_kept_or_said(tmp_path):
    recipe = {"name": "p", "max_drop": 0.001, "stages": [{"prune": {"density": 0.1}}]}
    with pytest.warns(UserWarning, match="FLOOR NOT KEPT: validation cosine"):
        result = gossamer.compress(made(), X, recipe=recipe, out=tmp_path / "r", progress=False)
    assert not result.run["floor"]["kept"]
    assert result.run["floor"]["drop"] > 0.001


def test_no_recipe_is_post_training_and_says_why(tmp_path, capsys):
    result = gossamer.compress(made(), X, out=tmp_path / "r", progress=True, max_drop=1)
    assert result.run["name"] == "post-training"
    assert "no recipe was named" in capsys.readouterr().err


def test_a_metric_of_ones_own_is_what_the_run_speaks_of(tmp_path):
    task = gossamer.task(
        nn.functional.mse_loss,
        lambda a, b: (a - b).abs().mean(1),
        name="distance",
        unit="mm",
        higher_is_better=False,
    )
    result = gossamer.compress(
        made(), [(X, torch.zeros(40, 4))], recipe=FEW, out=tmp_path / "r", progress=False, task=task
    )
    assert result.after.metric.name == "distance"
    assert result.run["bytes"]["reloaded"]["not_proved"] is None
    assert "mm" in result.report.read_text()
    # a lambda cannot be sent to another process: evaluated here, and that is said
    assert result.run["bytes"]["reloaded"]["evaluated_in"] == "this process"


def test_another_task_is_another_run(tmp_path):
    data = as_dataset([(X, torch.zeros(40).long())], classes=4)
    gossamer.compress(made(), data, recipe=FEW, out=tmp_path / "r", progress=False)
    with pytest.raises(ArgumentError, match="task"):
        gossamer.compress(
            made(), data, recipe=FEW, out=tmp_path / "r", progress=False, task="fidelity"
        )


@pytest.mark.parametrize("method", ["snip", "obd"])
def test_scores_that_read_labels_are_refused_without_them(tmp_path, method):
    recipe = {"name": "p", "stages": [{"prune": {"density": 0.5, "method": method}}]}
    with pytest.raises(RecipeError, match="has no labels"):
        gossamer.compress(made(), X, recipe=recipe, out=tmp_path / "r", progress=False)


def test_nothing_to_learn_from_is_refused(tmp_path):
    recipe = {"name": "p", "stages": [{"train": {"epochs": 1}}, {"prune": {"density": 0.5}}]}
    with pytest.raises(RecipeError, match="nothing to learn from"):
        gossamer.compress(made(), X, recipe=recipe, out=tmp_path / "r", progress=False)


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor


class Answering(nn.Module):
    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(X.shape[1], 8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = torch.relu(self.below(x))
        return Answer(self.above(hidden), hidden)


KINDS = {
    "tensor": (made, X),
    "dataclass": (Answering, X),
    "dataclass with labels": (Answering, [(X, torch.arange(40) % 4)]),
    "labels": (made, [(X, torch.arange(40) % 4)]),
    "float targets": (made, [(X, torch.randn(40, 4))]),
    "dictionary": (Tokens, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
    "dictionary with labels": (Tokens, {"input_ids": IDS, "labels": IDS}),
    "token labels": (Tokens, {"input_ids": IDS, "labels": (IDS + 1) % 12}),
    "tuple of outputs": (Cascade, X),
    "recurrent": (Speaker, torch.randn(40, 3, 5)),
    "data parallel": (lambda: nn.DataParallel(made()), X),
    "compiled": (lambda: torch.compile(made(), backend="eager"), X),
    "half": (lambda: made().half(), X.half()),
    "bfloat16": (lambda: made().bfloat16(), X.bfloat16()),
    "batches": (made, [X[:20], X[20:]]),
    "generator": (made, (X[i : i + 10] for i in range(0, 40, 10))),
    "loader": (made, DataLoader(TensorDataset(X), batch_size=8)),
    "loader with labels": (made, DataLoader(TensorDataset(X, torch.arange(40) % 4))),
    "parts": (made, {"train": [X], "validation": [X[:9]], "test": [X[:9]]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_input_are_fed_read_and_compressed(kind, tmp_path):
    make, data = KINDS[kind]
    recipe = {**FEW, "stages": [{"obs": {"bits": 8, "calibration": 16}}]}
    network = make()
    before = copy.deepcopy(dict(network.state_dict()))
    result = gossamer.compress(network, data, recipe=recipe, out=tmp_path / "run", progress=False)
    assert result.problems == []
    assert result.after.metric.drop(result.before.score, result.after.score) < 0.1
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(4)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "data", "said"),
    [
        (made, torch.randn(40, 5), "6"),  # the shape it wants and the one it gets
        (made, [(X, torch.eye(40)[:, :4])], "'multi-label' or 'regression'"),
        (made, [(X, torch.arange(40))], "4 outputs"),
        (made, [(X, torch.randn(40, 5))], "do not fit"),
        (made, X.half(), "float16"),
        (lambda: torch.jit.trace(made(), X), X, "TorchScript"),
        (lambda: nn.Sequential(nn.Flatten(0)), X, "no parameter|no weight|nothing"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence_before_any_work(make, data, said, tmp_path):
    with pytest.raises(gossamer.GossamerError, match=said):
        gossamer.compress(make(), data, recipe=FEW, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "stage-1.pt").exists()


def test_the_door_names_shapes_of_mappings():
    data = as_dataset({"wrong": IDS})
    task, _ = chosen(None, data)
    with pytest.raises(ArgumentError, match=r"wrong: \(7,\) int64"):
        door.check_fit(Tokens(), data, task)
