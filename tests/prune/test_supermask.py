"""Learned supermasks: the gradient by hand, the draws, attaching, resuming, leaving."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import datasets, nets
from gossamer.core.errors import ArgumentError
from gossamer.core.seeds import init_
from gossamer.datasets import Dataset, Split
from gossamer.experiments.deconstructing.supermask import learned
from gossamer.pack import pack_bytes, unpack
from gossamer.prune import Supermask
from gossamer.prune.supermask import draw, effective, factor
from gossamer.training import TrainConfig, train


def made(seed: int = 0, *, rescale: bool = True, **options: object) -> Supermask:
    return Supermask(
        generator=torch.Generator().manual_seed(seed),
        rescale=rescale,
        **options,  # type: ignore[arg-type]
    )


def test_the_gradient_by_hand() -> None:
    m = torch.tensor([0.0, 2.0, -1.0], requires_grad=True)
    w = torch.tensor([2.0, -3.0, -5.0])
    mask = torch.tensor([True, True, False])
    out = effective(m, w, mask, torch.tensor(1.5))
    assert out.tolist() == [3.0, -4.5, 0.0]
    assert not torch.signbit(out[2])
    (out * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    p = torch.sigmoid(m.detach())
    expected = torch.tensor([1.0, 10.0, 100.0]) * w * 1.5 * p * (1 - p)
    torch.testing.assert_close(m.grad, expected)
    # it is the derivative of the mean of w * Bernoulli(p): of w * p
    again = m.detach().clone().requires_grad_(True)
    (1.5 * w * torch.sigmoid(again) * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    torch.testing.assert_close(m.grad, again.grad)


def test_draws_have_their_probability_and_come_from_the_generator() -> None:
    scores = torch.tensor([-2.0, 0.0, 1.0]).repeat_interleave(20_000)
    g = torch.Generator().manual_seed(1)
    before = torch.get_rng_state()
    mask = draw(scores, g)
    assert torch.equal(torch.get_rng_state(), before)
    for part, score in zip(mask.chunk(3), (-2.0, 0.0, 1.0), strict=True):
        p = float(torch.sigmoid(torch.tensor(score)))
        assert abs(float(part.float().mean()) - p) < 4 * (p * (1 - p) / 20_000) ** 0.5
    assert torch.equal(draw(scores, torch.Generator().manual_seed(1)), mask)
    assert not torch.equal(draw(scores, g), mask)
    assert factor(mask[:0]) == 1.0
    assert factor(torch.zeros(5, dtype=torch.bool)) == 1.0
    assert factor(torch.arange(8) < 3) == 8 / 3


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    F.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
    optimizer.step()


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 2))


def test_only_scores_train_and_the_weights_are_the_initial_ones_masked() -> None:
    model = small()
    initial = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 10.0, momentum=0.9)
    method = made().attach(model, optimizer)
    moved = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    assert [tuple(p.shape) for p in moved] == [(20, 6), (2, 20)]
    assert all((p == 0).all() for p in moved)
    assert 0.3 < method.masks.density < 0.7
    seen = []
    for i in range(5):
        seen.append(torch.cat([m.reshape(-1) for m in method.masks.values()]))
        step(model, optimizer, i)
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))
    assert all((p != 0).any() for p in moved)
    method.finish()
    masks = method.masks
    for name, p in model.named_parameters():
        assert p.requires_grad
        if name.endswith("bias"):
            assert not p.any()
        else:
            by = torch.tensor(factor(masks[name]))
            expected = torch.where(masks[name], initial[name] * by, torch.zeros(()))
            assert torch.equal(p.detach(), expected)


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 100), nn.ReLU(), nn.Linear(100, 2))
    optimizer = torch.optim.SGD(model.parameters(), 10.0, momentum=0.9)
    method = made(rescale=False).attach(model, optimizer)
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(99))

    def right() -> float:
        found = []
        for _ in range(8):
            method.sample()
            found.append(float((model(x).argmax(1) == (x[:, 0] > 0)).float().mean()))
        return sum(found) / len(found)

    before = right()
    for i in range(200):
        step(model, optimizer, i)
    assert before < 0.75
    assert right() > 0.85


def test_threshold_keeps_positive_scores_and_sampling_draws_again() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 10.0)
    method = made().attach(model, optimizer)
    step(model, optimizer, 0)
    scores = {n: p.detach().clone() for n, p in zip(
        method.masks, (p for p in model.parameters() if p.ndim == 2), strict=True)}  # fmt: skip
    masks = method.threshold()
    assert all(torch.equal(masks[n], scores[n] > 0) for n in masks)
    assert torch.equal(method.threshold()["0.weight"], masks["0.weight"])
    one, two = method.sample(), method.sample()
    assert not torch.equal(one["0.weight"], two["0.weight"])
    assert torch.equal(model[0].weight != 0, two["0.weight"])


def test_layers_are_selected_and_the_others_train() -> None:
    model = small()
    first = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = made(include="2").attach(model, optimizer)
    step(model, optimizer, 0)
    assert list(method.masks) == ["2.weight"]
    assert model[0].bias.requires_grad
    assert not torch.equal(model[0].weight, first)
    assert not model[2].bias.requires_grad
    method.finish()
    assert model[2].bias.requires_grad


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_tied_weights_share_a_mask_and_stay_tied() -> None:
    model = Tied()
    method = made().attach(model)
    assert torch.equal(model.one.weight, model.two.weight)
    method.sample()
    assert torch.equal(model.one.weight, model.two.weight)
    method.finish()
    assert model.one.weight is model.two.weight


def test_convolutions_and_recurrent_layers() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 3), "rnn": nn.LSTM(4, 5)})
    optimizer = torch.optim.SGD(model.parameters(), 5.0)
    method = made().attach(model, optimizer)
    x, s = torch.randn(2, 2, 5, 5), torch.randn(3, 2, 4)
    for _ in range(2):
        optimizer.zero_grad()
        (model["conv"](x).square().mean() + model["rnn"](s)[0].square().mean()).backward()
        optimizer.step()
    before = model["rnn"](s)[0]
    masks = method.masks
    assert set(masks) == {"conv.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    method.finish()
    assert torch.equal(model["rnn"](s)[0], before)
    for name, mask in masks.items():
        assert torch.equal(dict(model.named_parameters())[name] != 0, mask)


def test_bad_models_are_left_as_they_were() -> None:
    model = small()
    state = copy.deepcopy(model.state_dict())
    elsewhere = torch.optim.SGD(small().parameters(), 0.1)
    with pytest.raises(ArgumentError, match="optimizer holds none of the weights"):
        made().attach(model, elsewhere)
    with pytest.raises(ArgumentError, match="'fc9' matches nothing"):
        made(include="fc9").attach(model)
    with pytest.raises(ArgumentError, match="no weight to mask"):
        made().attach(nn.ReLU())
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    made().attach(model)
    with pytest.raises(ArgumentError, match=r"0\.weight is parametrized already"):
        made().attach(model)
    broken = small()
    with torch.no_grad():
        broken[2].weight[0, 0] = torch.nan
    with pytest.raises(ArgumentError, match=r"2\.weight holds NaN"):
        made().attach(broken)
    assert broken[2].bias.requires_grad
    assert broken[0].bias.any()


def data() -> Dataset:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=g)
    y = (x[:, 0] > 0).long()
    parts = [Split(x[a:b], y[a:b]) for a, b in ((0, 200), (200, 250), (250, 300))]
    return Dataset("toy", *parts, 2)


def test_a_killed_run_ends_in_the_same_bits_and_the_same_file(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def ended(kill_at: int | None, path: Path) -> bytes:
        model = small()
        seeds = init_(model, 7, scheme="signed_constant")
        method = made(3)
        config = TrainConfig(4, batch_size=20, lr=10.0)

        def watch(progress: object) -> None:
            if progress.row is not None and progress.epoch == kill_at:  # type: ignore[attr-defined]
                raise Killed

        train(
            model, data(), config, methods=[method], checkpoint=path, checkpoint_every=0.0,
            progress=watch,
        )  # fmt: skip
        method.finish()
        return pack_bytes(model, seeds=method.seeds(seeds))

    whole = ended(None, tmp_path / "a.pt")
    with pytest.raises(Killed):
        ended(3, tmp_path / "b.pt")
    assert ended(None, tmp_path / "b.pt") == whole


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("scheme", ["normal", "uniform", "signed_constant"])
def test_what_is_left_packs_as_mask_and_seed(scheme, rescale: bool) -> None:
    model = nets.build("mlp", sizes=(40, 60, 10))
    seeds = init_(model, 5, scheme=scheme)
    method = made(rescale=rescale).attach(model)
    method.finish()
    seeds = method.seeds(seeds)
    for name, mask in method.masks.items():
        by = mask.numel() / int(mask.sum()) if rescale else 1.0
        assert seeds[name].factor == pytest.approx(by, rel=1e-6)
    found = unpack(pack_bytes(model, seeds=seeds))
    assert all(torch.equal(found[n], v) for n, v in model.state_dict().items())
    assert len(pack_bytes(model, seeds=seeds)) < 3000 / 8 + 300


def test_the_experiment_end_to_end_on_few_images(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        "gossamer.experiments.deconstructing.supermask.mnist", lambda quick: datasets.load("digits")
    )
    monkeypatch.setattr("gossamer.experiments.deconstructing.supermask.NET", "mlp")
    found = learned("rescaled, signed constant", 0, tmp_path, True)
    assert found["same_bits_in_a_fresh_process"]
    assert found["same_bits_loaded"]
    assert found["draws"]["n"] == 10
    again, last = found["accuracy_in_a_fresh_process"], found["accuracy_of_the_last_draw"]
    assert again == pytest.approx(last, abs=1e-9)
    assert found["bytes"] < found["dense_bytes"] / 25


@pytest.mark.parametrize("call", ["step", "threshold"])
def test_scores_that_are_no_numbers_are_named(call: str) -> None:
    # NaN compares as False: the masks would empty the network, which then looks whole
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    method = made().attach(net, optimizer)
    net[1].parametrizations.weight.original0.grad = torch.full((2, 4), float("nan"))
    if call == "threshold":
        method.detach()
        optimizer.step()
    with pytest.raises(ArgumentError, match=r"the scores of 1\.weight hold NaN"):
        optimizer.step() if call == "step" else method.threshold()
