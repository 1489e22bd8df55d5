import dataclasses
import json
import math
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gossamer.core.errors import ArgumentError, FormatError, GossamerError
from gossamer.core.masks import Masks
from gossamer.core.method import Masked, Method
from gossamer.datasets import Dataset, Split
from gossamer.training import (
    Evaluation,
    History,
    TrainConfig,
    evaluate,
    load_checkpoint,
    save_atomic,
    soft_targets,
    train,
)


def jitter(x, generator):
    return x + 0.05 * torch.randn(x.shape, generator=generator)


def blobs(n=120, seed=0, augment=None, validation=30):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n + validation + 30) % 3
    x = torch.randn(len(y), 4, generator=g) + 2 * F.one_hot(y, 4)
    cut = [n, n + validation]
    return Dataset(
        "blobs",
        Split(x[: cut[0]], y[: cut[0]]),
        Split(x[cut[0] : cut[1]], y[cut[0] : cut[1]]),
        Split(x[cut[1] :], y[cut[1] :]),
        3,
        augment=augment,
    )


def net(seed=0, dropout=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
        )


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        x.numpy().tobytes() == y.numpy().tobytes()
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def rows(path, drop=("seconds",)):
    lines = path.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]


class Noisy(Method):
    """A method with state of its own: random noise, and a count of steps."""

    def __init__(self):
        super().__init__()
        self.steps = 0
        self.generator = torch.Generator().manual_seed(5)

    def _setup(self):
        pass

    @torch.no_grad()
    def after_step(self):
        self.steps += 1
        weight = self.model[0].weight
        weight.add_(torch.randn(weight.shape, generator=self.generator), alpha=1e-3)

    def state_dict(self):
        return {"steps": self.steps, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        self.generator.set_state(state["generator"])


class Killed(Exception):
    pass


def killed_at(step):
    """A progress callback that stops the run where a kill might."""

    def tell(progress):
        if progress.step >= step:
            raise Killed

    return tell


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_run_is_the_plain_loop(optimizer, nesterov):
    data = blobs()
    config = TrainConfig(
        epochs=3, batch_size=50, lr=0.05, optimizer=optimizer, nesterov=nesterov, weight_decay=0.01
    )
    model, mine = net(), net()
    history = train(model, data, config)
    if optimizer == "sgd":
        made = torch.optim.SGD(
            mine.parameters(), lr=0.05, momentum=0.9, nesterov=nesterov, weight_decay=0.01
        )
    else:
        made = torch.optim.Adam(mine.parameters(), lr=0.05, weight_decay=0.01)
    mine.train()
    for epoch in range(3):
        g = torch.Generator().manual_seed(epoch)
        order = torch.randperm(120, generator=g)
        total = 0.0
        for i in range(0, 120, 50):
            x, y = data.train.inputs[order[i : i + 50]], data.train.targets[order[i : i + 50]]
            made.zero_grad()
            loss = F.cross_entropy(mine(x), y)
            loss.backward()
            made.step()
            total += loss.item() * len(y)
        assert history.epochs[epoch]["train_loss"] == pytest.approx(total / 120, rel=1e-5)
    for a, b in zip(model.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert history.epochs[-1]["step"] == 9


def test_evaluation_counts_and_restores_modes():
    data = blobs()
    model = net(dropout=0.5).train()
    model[1].eval()
    found = evaluate(model, data.test, batch_size=7)
    assert [m.training for m in model] == [True, False, True, True, True]
    model.eval()
    with torch.no_grad():
        out = model(data.test.inputs)
    assert found.correct == int((out.argmax(1) == data.test.targets).sum())
    assert found.total == 30
    assert found.loss == pytest.approx(float(F.cross_entropy(out, data.test.targets)), rel=1e-6)
    assert found.error == 1 - found.accuracy
    with pytest.raises(ArgumentError, match="empty"):
        evaluate(model, data.test.take(slice(0, 0)))


def test_evaluation_restores_modes_after_an_error():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, blobs().test)
    assert model.training


def test_language_models_are_counted_by_token():
    tokens = torch.arange(12).view(3, 4) % 5
    model = nn.Embedding(5, 5)
    with torch.no_grad():
        model.weight.copy_(4 * torch.eye(5).roll(1, 1))  # always says: the next number
    split = Split(tokens, (tokens + 1) % 5)
    found = evaluate(model, split, batch_size=5)
    assert (found.correct, found.total) == (12, 12)
    assert found.perplexity == pytest.approx(1 + 4 * math.exp(-4), rel=1e-6)
    wrong = evaluate(model, Split(tokens, tokens))
    assert wrong.correct == 0
    data = Dataset("lm", split, split, split, 5)
    history = train(nn.Embedding(5, 5), data, TrainConfig(epochs=30, batch_size=2, lr=1.0))
    assert history.best["validation_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (8, 10, 0.4902, 0.9433),
    ],
)
def test_wilson_interval(correct, total, low, high):
    n, p, z = total, correct / total, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]
    got = Evaluation(correct, total, 0.0).interval()
    assert got == pytest.approx(expected, abs=1e-12)
    assert got == pytest.approx((low, high), abs=5e-5)


def test_interval_refuses_percentages():
    with pytest.raises(ArgumentError, match="confidence=95"):
        Evaluation(1, 2, 0.0).interval(95)


def test_learning_rates_by_step():
    config = TrainConfig(epochs=10, lr=1.0, warmup=2, schedule="linear", lr_end=0.2)
    at = config.rate(5)
    assert [at(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert at(10) == 1.0
    assert at(30) == pytest.approx(0.6)
    assert at(50) == pytest.approx(0.2)
    steps = TrainConfig(epochs=4, lr=1.0, schedule="step", lr_steps=[0.25], lr_factor=0.5).rate(1)
    assert [steps(s) for s in range(4)] == [1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs=-1"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"optimizer": "rmsprop"}, "'sgd', 'adam'"),
        ({"schedule": "sine"}, "cosine"),
        ({"l1": -1e-3}, "l1=-0.001"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"grad_clip": 0.0}, "grad_clip"),
        ({"warmup": 3, "epochs": 3}, "warmup=3"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov"),
        ({"schedule": "step", "lr_steps": (30, 60)}, "lr_steps"),
        ({"precision": "float16"}, "'float32', 'bfloat16'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        TrainConfig(**{"epochs": 5, **options})


def test_l1_enters_the_gradients_of_weights_alone():
    data = blobs(n=8)
    model, plain = net(), net()
    config = {"epochs": 1, "batch_size": 8, "lr": 0.1, "momentum": 0.0}
    train(plain, data, TrainConfig(**config))
    start = net()[0].weight.detach()
    train(model, data, TrainConfig(**config, l1=0.02))
    assert torch.allclose(plain[0].weight - model[0].weight, 0.1 * 0.02 * start.sign(), atol=1e-7)
    assert torch.equal(plain[0].bias, model[0].bias)
    assert torch.equal(plain[1].weight, model[1].weight)


def test_gradients_are_clipped():
    data = blobs(n=8)
    model, start = net(), net()
    train(
        model,
        data,
        TrainConfig(epochs=1, batch_size=8, lr=1.0, momentum=0.0, grad_clip=1e-3),
    )
    moved = sum(
        float((a - b).detach().square().sum())
        for a, b in zip(model.parameters(), start.parameters(), strict=True)
    )
    assert math.sqrt(moved) == pytest.approx(1e-3, rel=1e-2)


def test_a_teacher_guides_in_evaluation_mode():
    data, teacher = blobs(), net(seed=9, dropout=0.5)
    teacher.train()
    seen = []

    def loss(outputs, targets, soft):
        seen.append((teacher.training, soft.requires_grad))
        return F.mse_loss(outputs, soft)

    model = net()
    history = train(model, data, TrainConfig(epochs=20, lr=0.05), loss=loss, teacher=teacher)
    assert set(seen) == {(False, False)}
    assert teacher.training
    assert history.epochs[-1]["train_loss"] < 0.2 * history.epochs[0]["train_loss"]
    train(net(), data, TrainConfig(epochs=1), teacher=teacher)


def test_soft_targets_by_hand():
    outputs, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    targets = torch.tensor([1])
    p = torch.tensor([0.0, 1.0]).softmax(0)
    q = torch.tensor([0.5, 0.0]).softmax(0)
    kl = float((p * (p / q).log()).sum())
    hard = math.log(1 + math.e)
    got = soft_targets(outputs, targets, teacher, temperature=2.0, weight=0.3)
    assert float(got) == pytest.approx(0.3 * 4 * kl + 0.7 * hard, rel=1e-6)


def test_history_finds_the_best_and_the_early_stop():
    made = [(0.5, 0.8), (0.3, 0.9), (0.4, 0.9), (0.3, 0.7)]
    history = History(
        [
            {"step": i, "validation_loss": a, "validation_accuracy": b}
            for i, (a, b) in enumerate(made)
        ]
    )
    assert history.best["step"] == 1
    assert history.early_stop["step"] == 1
    history.steps = [{"step": 7, "validation_loss": 0.35, "validation_accuracy": 0.95}]
    assert history.early_stop["step"] == 7
    assert history.best["step"] == 7
    assert History().best == {}
    json.dumps(history.as_dict())


def test_rows_by_step_and_monitors(tmp_path):
    data = blobs()
    history = train(
        net(),
        data,
        TrainConfig(epochs=3, batch_size=40),
        evaluate_every=2,
        evaluate_every_steps=4,
        monitor={"test": data.test},
        metrics=tmp_path / "new" / "metrics.jsonl",
    )
    assert [r["step"] for r in history.steps] == [4, 8]
    assert [r["epoch"] for r in history.epochs] == [2, 3]
    assert history.steps[0]["test_accuracy"] <= 1
    written = rows(tmp_path / "new" / "metrics.jsonl", drop=())
    assert written == [history.steps[0], history.epochs[0], history.steps[1], history.epochs[1]]


def test_training_without_a_validation_split():
    history = train(net(), blobs(validation=0), TrainConfig(epochs=1))
    assert "validation_loss" not in history.epochs[0]
    assert history.best == {}


def test_methods_are_attached_and_detached_but_not_finished():
    class Finishing(Noisy):
        finished = False

        def finish(self):
            self.finished = True

    model, method = net(), Finishing()
    masks = Masks({"4.weight": torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.5})
    train(
        model,
        blobs(),
        TrainConfig(epochs=2, batch_size=40, weight_decay=1e-3),
        methods=[method, Masked(masks)],
    )
    assert method.steps == 6
    assert not method.finished
    assert not method._attached
    assert not model[4].weight.detach()[~masks["4.weight"]].any()
    # attached without an optimizer: its hooks are called, and it stays attached
    method.attach(model)
    train(model, blobs(), TrainConfig(epochs=1, batch_size=40), methods=[method])
    assert method.steps == 9
    assert method._attached
    assert method.optimizer is None
    other = Noisy().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ArgumentError, match="attached to another"):
        train(model, blobs(), TrainConfig(epochs=1), methods=[other])


def test_own_optimizer_keeps_its_groups():
    model = net()
    frozen = model[0].weight.detach().clone()
    made = torch.optim.SGD(
        [{"params": model[4].parameters(), "lr": 0.2}, {"params": model[1].parameters()}], lr=0.1
    )
    rates = []
    made.register_step_pre_hook(lambda o, *_: rates.append([g["lr"] for g in o.param_groups]))
    train(
        model,
        blobs(),
        TrainConfig(epochs=2, batch_size=120, lr=0.1, schedule="linear"),
        optimizer=made,
    )
    assert rates == [[0.2, 0.1], [pytest.approx(0.1), pytest.approx(0.05)]]
    assert [g["lr"] for g in made.param_groups] == [0.2, 0.1]
    assert torch.equal(frozen, model[0].weight)


def test_the_global_generator_and_the_modes_are_left_alone():
    model = net(dropout=0.5).eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a = train(model, blobs(), TrainConfig(epochs=1))
    assert torch.equal(before, torch.get_rng_state())
    assert not any(m.training for m in model.modules())
    torch.manual_seed(4)
    again = net(dropout=0.5)
    b = train(again, blobs(), TrainConfig(epochs=1))
    assert same(model, again)
    assert a.epochs[0]["train_loss"] == b.epochs[0]["train_loss"]
    other = net(dropout=0.5)
    train(other, blobs(), TrainConfig(epochs=1, seed=1))
    assert not same(model, other)


FULL = {
    "epochs": 4,
    "batch_size": 16,
    "lr": 0.05,
    "schedule": "cosine",
    "warmup": 1,
    "weight_decay": 1e-3,
    "l1": 1e-4,
}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stop", [1, 3, 8, 9, 21, 31])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, monkeypatch, stop, optimizer):
    # a millisecond a look at the clock, so that saves fall on the same steps on any machine
    monkeypatch.setattr(
        "gossamer.training.run.time.monotonic", map((1e-3).__mul__, count()).__next__
    )
    data = blobs(augment=jitter)
    config = TrainConfig(**FULL, optimizer=optimizer)

    def go(folder, progress=None, every=0.0, seed=0):
        model, method = net(seed, dropout=0.3), Noisy()
        history = train(
            model,
            data,
            config,
            methods=[method],
            checkpoint=folder / "c.pt",
            checkpoint_every=every,
            metrics=folder / "m.jsonl",
            progress=progress,
            evaluate_every_steps=3,
        )
        return model, method, history

    (tmp_path / "m.jsonl").write_text('{"stage": "before"}\n')
    whole, method, history = go(tmp_path / "whole", every=1e9)
    with pytest.raises(Killed):
        # progress speaks with every row: stop there, some rows after the last save
        go(tmp_path, killed_at(stop), every=0.0 if stop % 2 else 0.002)
    resumed, again, continued = go(tmp_path, seed=1)
    assert same(whole, resumed)
    assert again.steps == method.steps == 32
    assert rows(tmp_path / "m.jsonl") == [{"stage": "before"}, *rows(tmp_path / "whole/m.jsonl")]
    strip = [{k: v for k, v in r.items() if k != "seconds"} for r in continued.epochs]
    assert strip == [{k: v for k, v in r.items() if k != "seconds"} for r in history.epochs]
    # completed: returns at once, with the weights; later rows of others are not touched
    with open(tmp_path / "m.jsonl", "a") as f:
        f.write('{"stage": "after"}\n')
    written = (tmp_path / "c.pt").stat().st_mtime_ns
    loaded, _, _ = go(tmp_path, killed_at(0), seed=2)
    assert same(whole, loaded)
    assert (tmp_path / "c.pt").stat().st_mtime_ns == written
    assert rows(tmp_path / "m.jsonl")[-1] == {"stage": "after"}


def test_lost_metrics_are_written_again(tmp_path):
    data, config = blobs(), TrainConfig(epochs=3, batch_size=40)
    paths = {"checkpoint": tmp_path / "c.pt", "metrics": tmp_path / "m.jsonl"}
    (tmp_path / "m.jsonl").write_text("{}\n")
    with pytest.raises(Killed):
        train(net(), data, config, **paths, checkpoint_every=0.0, progress=killed_at(7))
    (tmp_path / "m.jsonl").unlink()
    train(net(), data, config, **paths)
    assert [r["epoch"] for r in rows(tmp_path / "m.jsonl")] == [1, 2, 3]


KILLED = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from test_training import Noisy, blobs, jitter, net
from itertools import count
from pathlib import Path
from gossamer.training import TrainConfig, run, train

def dies_at(function, number, after=False):
    calls = count(1)
    def called(*args, **options):
        last = next(calls) == number
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **options)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return called

def work(kill):
    # five milliseconds a look at the clock: a save every few steps, the same on any machine
    run.time.monotonic = map(5e-3.__mul__, count()).__next__
    step = lambda p: None
    if kill and kill[0] == "step":
        step = dies_at(step, kill[1])
    elif kill:
        os.replace = dies_at(os.replace, kill[1], after=kill[0] == "saved")
    model = net(dropout=0.3)
    train(model, blobs(augment=jitter), TrainConfig(epochs=80, batch_size=8, lr=0.02),
          methods=[Noisy()], checkpoint=Path("c.pt"), checkpoint_every=0.03,
          metrics=Path("m.jsonl"), progress=step)
    torch.save(model.state_dict(), "end.pt")

for line in sys.stdin:  # each line is a process of its own; forking spares it the imports
    pid = os.fork()
    if pid == 0:
        work(json.loads(line))
        os._exit(0)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.mark.usefixtures("one_thread")
def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    whole = net(dropout=0.3)
    train(
        whole,
        blobs(augment=jitter),
        TrainConfig(epochs=80, batch_size=8, lr=0.02),
        methods=[Noisy()],
        metrics=tmp_path / "whole.jsonl",
    )
    code = KILLED.format(here=str(Path(__file__).parent))
    # Before anything is saved, between two saves, inside a save, just after one, at an epoch's end.
    kills = [["step", 1], ["step", 50], ["saving", 9], ["saved", 7], ["step", 75], None]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        input="".join(json.dumps(kill) + "\n" for kill in kills),
        capture_output=True,
        text=True,
        check=True,
    )
    statuses = [int(line) for line in done.stdout.split()]
    assert statuses[:-1] == [signal.SIGKILL] * 5, done.stderr
    assert statuses[-1] == 0, done.stderr
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert end[name].numpy().tobytes() == value.numpy().tobytes(), name
    assert rows(tmp_path / "m.jsonl") == rows(tmp_path / "whole.jsonl")


def test_a_checkpoint_of_another_run_names_the_field(tmp_path):
    data, config = blobs(), TrainConfig(epochs=1, batch_size=40)
    path = tmp_path / "c.pt"
    train(net(), data, config, checkpoint=path)
    for options, message in (
        ({"config": TrainConfig(epochs=2, batch_size=40)}, r"config\.epochs was 1, now it is 2"),
        ({"config": TrainConfig(epochs=1, batch_size=40, lr=0.3)}, r"config\.lr was 0\.01"),
        ({"model": nn.Linear(4, 3)}, "model was"),
        ({"data": blobs(n=60)}, r"dataset\.train was \[120, 4\], now it is \[60, 4\]"),
        ({"methods": [Noisy()]}, "methods was"),
    ):
        given = {"model": net(), "data": data, "config": config, "methods": (), **options}
        with pytest.raises(ArgumentError, match=message) as e:
            train(
                given["model"],
                given["data"],
                given["config"],
                methods=given["methods"],
                checkpoint=path,
            )
        assert f"delete {path}" in str(e.value)
    moved = data.train.take(torch.arange(119, -1, -1))
    other = Dataset("blobs", moved, data.validation, data.test, 3)
    with pytest.raises(ArgumentError, match=r"dataset\.targets"):
        train(net(), other, config, checkpoint=path)


def test_bfloat16_trains_and_keeps_float32_weights(tmp_path):
    config = TrainConfig(epochs=6, batch_size=30, lr=0.1)
    half = dataclasses.replace(config, precision="bfloat16")
    model, plain, path = net(), net(), tmp_path / "c.pt"
    found, wanted = train(model, blobs(), half, checkpoint=path), train(plain, blobs(), config)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert found.epochs[-1]["train_loss"] == pytest.approx(wanted.epochs[-1]["train_loss"], rel=0.1)
    assert not same(model, plain)
    with pytest.raises(ArgumentError, match=r"config\.precision was 'bfloat16'"):
        train(net(), blobs(), config, checkpoint=path)
    # a checkpoint from before there was a choice is one of float32
    train(net(), blobs(), config, checkpoint=path.with_name("old.pt"))
    state = load_checkpoint(path.with_name("old.pt"))
    del state["fingerprint"]["config.precision"]
    save_atomic(state, path.with_name("old.pt"))
    train(net(), blobs(), config, checkpoint=path.with_name("old.pt"))
    with pytest.raises(ArgumentError, match=r"config\.precision was 'float32'"):
        train(net(), blobs(), half, checkpoint=path.with_name("old.pt"))


def test_maps_of_bfloat16_lie_channels_last():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.seen = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), set()

        def forward(self, x):
            if self.training:
                self.seen.add(x.is_contiguous(memory_format=torch.channels_last))
            return self.head(self.conv(x).mean((2, 3)))

    g = torch.Generator().manual_seed(0)
    split = Split(torch.randn(20, 3, 6, 6, generator=g), torch.arange(20) % 3)
    for precision, last in (("float32", False), ("bfloat16", True)):
        model = Looks()
        train(model, Dataset("maps", split, split, split, 3), TrainConfig(2, precision=precision))
        assert model.seen == {last}


def test_corrupt_checkpoints_are_named(tmp_path):
    path = tmp_path / "c.pt"
    data, config = blobs(), TrainConfig(epochs=1)
    train(net(), data, config, checkpoint=path)
    good = path.read_bytes()
    for bad in (b"", b"junk", good[:-200], good[: len(good) // 2], b"PK\x03\x04" + bytes(60)):
        path.write_bytes(bad)
        with pytest.raises(FormatError, match=r"c\.pt is truncated, damaged.*start the run again"):
            train(net(), data, config, checkpoint=path)
    save_atomic({"model": torch.zeros(3)}, path)
    with pytest.raises(FormatError, match="no training checkpoint"):
        train(net(), data, config, checkpoint=path)
    with pytest.raises(ArgumentError, match="is no file"):
        load_checkpoint(tmp_path / "absent.pt")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_executes_nothing(tmp_path, capsys):
    torch.save({"x": Evil()}, tmp_path / "c.pt")
    with pytest.raises(FormatError):
        load_checkpoint(tmp_path / "c.pt")
    assert "executed" not in capsys.readouterr().out


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "c.pt"
    save_atomic({"a": 1}, path)
    with pytest.raises((AttributeError, TypeError, RuntimeError, ValueError)):
        save_atomic({"a": (i for i in [])}, path)
    assert load_checkpoint(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["c.pt"]


def test_divergence_stops_with_step_rate_and_fix():
    data = blobs()
    data.train.inputs[7, 2] = math.nan
    with pytest.raises(GossamerError, match=r"step 6 \(epoch 1, learning rate 0\.05") as e:
        # a loss of one's own may make sense of any values, so the data are not refused
        train(net(), data, TrainConfig(epochs=2, batch_size=20, lr=0.05), loss=F.cross_entropy)
    assert "grad_clip" in str(e.value)
    with pytest.raises(GossamerError, match="no longer finite"):
        train(
            nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3)),
            blobs(),
            TrainConfig(epochs=300, lr=1e9, batch_size=20),
        )


def test_a_diverged_run_saves_no_broken_checkpoint(tmp_path):
    data = blobs()
    data.train.inputs[7, 2] = math.nan
    with pytest.raises(GossamerError, match="finite"):
        train(
            net(),
            data,
            TrainConfig(epochs=9, batch_size=20),
            loss=F.cross_entropy,
            checkpoint=tmp_path / "c.pt",
            checkpoint_every=0.0,
        )
    saved = load_checkpoint(tmp_path / "c.pt")["model"]
    assert all(torch.isfinite(t.float()).all() for t in saved.values())


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(GossamerError, match=r"gossamer\[tensorboard\]"):
        train(net(), blobs(), TrainConfig(epochs=1), tensorboard=tmp_path / "tb")


def test_progress_tells_where_a_run_is():
    told = []
    train(net(), blobs(), TrainConfig(epochs=3, batch_size=50, lr=0.2), progress=told.append)
    ends = [p for p in told if p.row is not None]
    assert [(p.epoch, p.step, p.steps) for p in ends] == [(1, 3, 9), (2, 6, 9), (3, 9, 9)]
    assert ends[-1].loss == pytest.approx(ends[-1].row["train_loss"])
    assert all(p.lr == 0.2 for p in told)


def test_zero_epochs_and_nothing_to_train():
    model = net()
    assert train(model, blobs(), TrainConfig(epochs=0)).epochs == []
    assert same(model, net())
    for p in model.parameters():
        p.requires_grad = False
    with pytest.raises(ArgumentError, match="nothing to train"):
        train(model, blobs(), TrainConfig(epochs=1))


def test_a_checkpoint_of_another_optimizers_settings_is_refused(tmp_path):
    data, config = blobs(), TrainConfig(epochs=1)

    def go(momentum):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
        train(model, data, config, optimizer=optimizer, checkpoint=tmp_path / "c.pt")

    go(0.9)
    go(0.9)
    with pytest.raises(ArgumentError, match=r"optimizer\.settings"):
        go(0.5)
