"""The penalty by hand, its gradient by autograd, the proximal map in closed form, training."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gossamer
from gossamer import datasets, nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.groups import Family, zero_masks
from gossamer.core.layer_groups import layer_groups
from gossamer.core.method import Masked
from gossamer.structure.group_lasso import FORMS, GroupLasso, gradients, penalty, proximal_


def matrix(rows: list[list[float]]) -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(len(rows[0]), len(rows)))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(rows))
    return net, net[0].weight


def only(net: nn.Module, kind: str, **options: Any) -> Family:
    (family,) = layer_groups(net, kind, **options)
    return family.weights_only()


def test_the_penalty_by_hand() -> None:
    net, w = matrix([[3.0, 4.0], [0.0, 0.0], [5.0, 12.0]])
    weights = {"0.weight": w.detach()}
    assert float(penalty(only(net, "row"), weights)) == pytest.approx(5 + 0 + 13)
    columns = math.sqrt(34) + math.sqrt(160)
    assert float(penalty(only(net, "column"), weights)) == pytest.approx(columns)
    sized = float(penalty(only(net, "row"), weights, sized=True))
    assert sized == pytest.approx(18 * math.sqrt(2))
    smooth = float(penalty(only(net, "row"), weights, form="smooth"))
    assert smooth == pytest.approx(18 + 1e-4, abs=1e-5)  # sqrt(1e-8) of the empty row
    found = gradients(only(net, "row"), weights)["0.weight"]
    wanted = torch.tensor([[0.6, 0.8], [0, 0], [5 / 13, 12 / 13]])
    assert torch.allclose(found, wanted)


def lstm() -> tuple[nn.Module, list[Family]]:
    torch.manual_seed(0)
    net = nets.build("lstm-lm", classes=7, embedding=4, hidden=(3, 2))
    return net, layer_groups(net, "unit", consumers={"rnn.0": "rnn.1", "rnn.1": "output"})


@pytest.mark.parametrize("form", ["sub-gradient", "smooth"])
@pytest.mark.parametrize("sized", [False, True])
def test_the_gradient_is_autograds_of_the_penalty(form: str, sized: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    cases = [(conv, f) for k in ("filter", "channel", "shape", "block-1x4") for f in
             layer_groups(conv, k)]  # fmt: skip
    cases += [(lstm()[0], f) for f in lstm()[1]]
    for net, family in ((n, f.weights_only()) for n, f in cases):
        weights = {n: p.detach().double().requires_grad_() for n, p in names.parameters(net).items()
                   if n in family.parameters}  # fmt: skip
        penalty(family, weights, form=form, sized=sized).backward()
        found = gradients(family, weights, form=form, sized=sized)
        for name, weight in weights.items():
            assert weight.grad is not None
            assert torch.allclose(found[name].double(), weight.grad, atol=1e-6), family


def test_the_units_of_the_paper_by_loops() -> None:
    net, made = lstm()
    w = {n: p.detach() for n, p in names.parameters(net).items()}
    total = 0.0
    for k in range(3):  # weight by weight, the corner of row and column once
        rows = [g * 3 + k for g in range(4)]
        square = float(w["rnn.0.weight_ih_l0"][rows].square().sum())
        for i in range(12):
            for j in range(3):
                if i in rows or j == k:
                    square += float(w["rnn.0.weight_hh_l0"][i, j]) ** 2
        square += float(w["rnn.1.weight_ih_l0"][:, k].square().sum())
        total += math.sqrt(square + 1e-8)
    found = float(penalty(made[0].weights_only(), w, form="smooth"))
    assert found == pytest.approx(total, rel=1e-5)


def test_the_proximal_map_in_closed_form() -> None:
    net, w = matrix([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    proximal_(only(net, "row"), {"0.weight": w}, 1.0)
    assert torch.allclose(w, torch.tensor([[2.4, 3.2], [0, 0], [0, 0]]))
    assert not w[1:].any()
    # it minimises step * norm + half the squared distance: no point around it is lower
    torch.manual_seed(0)
    start = torch.randn(1, 5, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(5, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(start)
    proximal_(only(net, "row"), {"0.weight": net[0].weight}, 0.7)
    best = net[0].weight.detach().clone()

    def objective(v: Tensor) -> float:
        return float(0.7 * v.norm() + 0.5 * (v - start).square().sum())

    for _ in range(50):
        assert objective(best) <= objective(best + 1e-2 * torch.randn_like(best))


def test_overlapping_units_shrink_by_each_group() -> None:
    net, w = matrix([[3.0, 4.0], [6.0, 8.0]])
    family = only(net, "row")
    other = only(net, "column")
    for each in (family, other):  # rows, then columns
        proximal_(each, {"0.weight": w}, 1.0)
    rows = torch.tensor([[2.4, 3.2], [5.4, 7.2]])
    norms = rows.norm(dim=0, keepdim=True)
    assert torch.allclose(w, rows * (1 - 1 / norms))


def step_of(method: GroupLasso, net: nn.Module, lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    method.attach(net, optimizer)
    optimizer.zero_grad()
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_one_step_of_each_form_by_hand() -> None:
    net, w = matrix([[3.0, 4.0], [0.1, 0.0]])
    lasso = GroupLasso(layer_groups(net, "row"), 0.5, threshold=0.0)
    step_of(lasso, net)
    pull = torch.tensor([[0.3, 0.4], [0.5, 0]])
    start = torch.tensor([[3.0, 4.0], [0.1, 0.0]])
    assert torch.allclose(w, start - 0.1 * (1 + pull))
    net, w = matrix([[3.0, 4.0], [0.1, 0.0]])
    step_of(GroupLasso(layer_groups(net, "row"), 2.0, form="proximal", threshold=0), net)
    moved = torch.tensor([[2.9, 3.9], [0.0, -0.1]])
    norms = moved.norm(dim=1, keepdim=True)
    assert torch.allclose(w, moved * (1 - 0.2 / norms).clamp_min(0))
    net, w = matrix([[0.10005, 4.0], [1.0, 1.0]])
    step_of(GroupLasso(layer_groups(net, "row"), 1e-9, threshold=1e-4), net)
    assert w[0, 0] == 0
    assert torch.equal(w == 0, torch.tensor([[True, False], [False, False]]))


def test_strength_by_layer_and_biases_without_penalty() -> None:
    net = nets.build("mlp-6-5-4", seed=0)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    lasso = GroupLasso(layer_groups(net, "row"), {"fc1": 0.3, "fc2": 0.0}, threshold=0)
    lasso.attach(net, optimizer)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    assert lasso.penalty() == pytest.approx(0.3 * float(before["fc1.weight"].norm(dim=1).sum()))
    optimizer.step()
    after = dict(net.named_parameters())
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert changed == ["fc1.weight"]


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_not_trained_stay_and_halves_are_summed_wide(form: str) -> None:
    net = nets.build("mlp-300-5-4", seed=0).to(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    net.get_parameter("fc2.weight").requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.5)
    lasso = GroupLasso(layer_groups(net, "row"), 1.0, form=form).attach(net, optimizer)
    for p in net.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    assert torch.equal(net.get_parameter("fc2.weight"), before["fc2.weight"])
    start, end = (x.float().norm(dim=1) for x in (before["fc1.weight"], net.fc1.weight.detach()))
    assert torch.allclose(end, start - 0.5, rtol=0.01)
    assert lasso.penalty() == pytest.approx(
        float(end.sum() + before["fc2.weight"].float().norm(dim=1).sum()), rel=1e-3
    )


def test_a_gradient_scaler_and_a_closure_give_the_plain_step() -> None:
    def run(way: str) -> Tensor:
        torch.manual_seed(0)
        net = nets.build("mlp-6-5-4", seed=0)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        GroupLasso(layer_groups(net, "row"), 0.05).attach(net, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        x, y = torch.randn(3, 6), torch.tensor([0, 1, 2])
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            if way == "scaler":
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            elif way == "closure":

                def closure() -> float:
                    optimizer.zero_grad()
                    value = F.cross_entropy(net(x), y)
                    value.backward()
                    return float(value.detach())

                optimizer.step(closure)
            else:
                loss.backward()
                optimizer.step()
        return net.get_parameter("fc1.weight").detach()

    plain = run("plain")
    assert torch.equal(run("closure"), plain)
    assert torch.allclose(run("scaler"), plain, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_groups_reach_zero_and_stay_there_in_fine_tuning(form: str) -> None:
    data = datasets.load("digits")
    net = nets.build("mlp-64-24-10", seed=0)
    made = layer_groups(net, "column", include="fc1")
    lasso = GroupLasso(made, 0.2 if form == "proximal" else 0.02, form=form)
    config = gossamer.TrainConfig(epochs=8, lr=0.1, schedule="cosine")
    gossamer.train(net, data, config, methods=[lasso])
    norms = made[0].norms(names.parameters(net))
    dead = int((norms == 0).sum())
    assert 5 <= dead < 64
    masks = zero_masks([f.weights_only() for f in made], names.parameters(net))
    gossamer.train(
        net,
        data,
        gossamer.TrainConfig(epochs=2, lr=0.1, weight_decay=1e-4),
        methods=[Masked(masks)],
    )
    assert torch.equal(made[0].norms(names.parameters(net)) == 0, norms == 0)
    assert gossamer.evaluate(net, data.test).accuracy > 0.8


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strength": -1.0}, r"strength of '0'=-1\.0 must be at least 0"),
        ({"strength": math.nan}, "must be at least 0 and finite"),
        ({"strength": {"1": 0.1}}, "strength names '1', which has no groups; there are: 0"),
        ({"strength": 0.1, "form": "prox"}, "form='prox' is not one of 'sub-gradient'"),
        ({"strength": 0.1, "threshold": -1.0}, r"threshold=-1\.0"),
        ({"strength": 0.1, "groups": []}, "groups is empty"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], told: str) -> None:
    net, _ = matrix([[1.0, 2.0]])
    with pytest.raises(ArgumentError, match=told):
        GroupLasso(**{"groups": layer_groups(net, "row"), **options})


def test_the_proximal_form_needs_one_learning_rate() -> None:
    net = nets.build("mlp-6-5-4", seed=0)
    lasso = GroupLasso(layer_groups(net, "row"), 0.1, form="proximal").attach(net)
    with pytest.raises(ArgumentError, match="needs the optimizer's learning rate"):
        lasso.after_step()
    (family,) = lstm()[1][:1]
    with pytest.raises(ArgumentError, match=r"no parameter 'rnn\.0\.weight_ih_l0'"):
        GroupLasso([family], 0.1).attach(net)
