"""Networks whose layers become factors: what is the same, what is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.structure.fit_network import KINDS, approximate, replace, survey
from gossamer.structure.low_rank import energies
from gossamer.structure.responses import Positions, followers


class Net(nn.Module):
    """Batch-norm, a residual add, a layer called twice, and functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.bn2 = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 8, 3, stride=2)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        x = torch.relu(self.grouped(self.down(x)).relu())
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(torch.relu(self.first(x)))))


def seeded(net: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if t.is_floating_point():
                value = torch.randn(t.shape, generator=g) * 0.4
                t.copy_(value.abs() + 0.5 if name.endswith("running_var") else value)
    return net.eval()


def inputs(*shape: int, batches: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(*shape, generator=g) for _ in range(batches)]


def looked(net: nn.Module, batches: list[Any]) -> Any:
    found = [f"{n}.weight" for n, m in names.modules(net).items() if hasattr(m, "weight")]
    found = [n for n in found if ".bn" not in f".{n}"]
    return survey(net, batches, found, generator=torch.Generator().manual_seed(3))


def fitted(net: nn.Module, batches: list[Any], ranks: Any, **options: Any) -> Any:
    seen = looked(net, batches)
    given = {n: ranks(n, layer) for n, layer in seen.layers.items()}
    generator = torch.Generator().manual_seed(4)
    done = approximate(net, batches, seen, given, generator=generator, **options)
    made = copy.deepcopy(net)
    replace(made, done.made)
    return made, done


def test_what_follows_is_read_from_the_graph() -> None:
    net, x = seeded(Net()), inputs(4, 2, 8, 8)
    found, note = followers(net, x[0])
    assert note == ""
    relus = {n: f.relu for n, f in found.items()}
    assert relus == {
        "conv1": True, "conv2": False, "down": False, "grouped": True, "fc1": True, "fc2": False,
    }  # fmt: skip
    conv, norm = net.conv1, net.bn1
    out = norm(conv(x[0]))
    expected = found["conv1"].scale.float().view(1, -1, 1, 1) * conv(x[0])
    torch.testing.assert_close(out, expected + found["conv1"].shift.float().view(1, -1, 1, 1))
    seen = looked(net, x)
    assert seen.left == {"grouped": "it has 2 groups"}
    assert seen.fixed == (8 * 4 * 9 * 9, 8 * 4 * 9 + 8)


@pytest.mark.parametrize("kind", ["nonlinear", "linear", "spatial", "svd"])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_full_rank_is_the_network(kind: str, asymmetric: bool) -> None:
    net, x = seeded(Net()), inputs(16, 2, 8, 8)

    def full(name: str, layer: Any) -> tuple[int, ...]:
        d, c, *k = layer.module.weight.shape
        if kind == "svd":
            return (min(d, layer.module.weight[0].numel()),)
        return (min(c * k[0], d * k[1]), d) if k and kind == "spatial" else (d,)

    made, done = fitted(net, x, full, kind=kind, asymmetric=asymmetric)
    assert isinstance(made.conv1, nn.Sequential)
    fresh = inputs(5, 2, 8, 8, batches=1)[0] * 1.5
    torch.testing.assert_close(made(fresh), net(fresh), rtol=1e-5, atol=1e-5)
    for row in done.rows:
        assert kind == "svd" or row["error"] < 1e-9


def test_symmetric_needs_nothing_of_the_layers_before_and_asymmetric_mends_them() -> None:
    net, x = seeded(Net()), inputs(32, 2, 8, 8)

    def few(name: str, layer: Any) -> tuple[int, ...]:
        return (2,)

    together, _ = fitted(net, x, few, asymmetric=False)
    seen = looked(net, x)
    alone = approximate(
        net, x, seen, {"fc1": (2,)}, asymmetric=False, generator=torch.Generator().manual_seed(4)
    )
    torch.testing.assert_close(
        alone.made["fc1"][1].bias, together.fc1[1].bias, rtol=1e-4, atol=1e-5
    )
    mended, _ = fitted(net, x, few)

    def off(other: nn.Module) -> float:
        return sum(float((other(b) - net(b)).detach().square().sum()) for b in x)

    assert off(mended) < off(together)


def test_dead_channels_of_a_batch_norm_stay_what_they_were() -> None:
    net, x = seeded(Net()), inputs(16, 2, 8, 8)
    with torch.no_grad():
        net.bn1.weight[1] = 0.0
    made, _ = fitted(net, x, lambda n, layer: (len(layer.module.weight),))
    torch.testing.assert_close(made(x[0]), net(x[0]), rtol=1e-5, atol=1e-5)
    assert bool(torch.isfinite(made.conv1[1].weight).all())


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (
            nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 3)),
            (2, 9),
        ),
        (
            nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
            (2, 3, 3, 3),
        ),
        (nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)), (4, 6)),
        (Twice(), (6,)),
    ],
)
def test_other_networks(net: nn.Module, shape: tuple[int, ...]) -> None:
    net, x = seeded(net), inputs(40, *shape)
    made, done = fitted(net, x, lambda n, layer: (len(layer.module.weight),))
    torch.testing.assert_close(made(x[0]), net(x[0]), rtol=1e-5, atol=2e-5)
    assert len(done.rows) == 2
    less, rows = fitted(net, x, lambda n, layer: (2,))
    assert all(row["error"] > 0 for row in rows.rows)
    assert not torch.equal(less(x[0]), net(x[0]))


def test_a_layer_called_twice_counts_twice() -> None:
    net, x = seeded(Twice()), inputs(20, 6)
    seen = looked(net, x)
    assert seen.layers["first"].geometry.calls == 2
    assert seen.pairs["first"].count == 2 * seen.pairs["last"].count == 120
    assert seen.layers["first"].whole == (72, 42)
    assert not seen.layers["first"].follower.relu  # each call might be followed by another thing


def test_positions_are_the_same_in_both_networks_and_enough() -> None:
    batches = inputs(4, 2, 8, 8)
    one = Positions(batches, 10, torch.Generator().manual_seed(5))
    other = Positions(batches, 10, torch.Generator().manual_seed(5))
    chosen = one(1)("a.weight", 4 * 64)
    assert torch.equal(chosen, other(1)("a.weight", 4 * 64))
    assert not torch.equal(chosen, one(1)("b.weight", 4 * 64))
    assert not torch.equal(chosen, one(2)("a.weight", 4 * 64))
    assert chosen.shape == (40,)
    assert len(set(chosen.tolist())) == 40
    assert (chosen // 64).bincount().tolist() == [10] * 4
    assert one(0)("a.weight", 4).tolist() == [0, 1, 2, 3]
    net = seeded(Net())
    seen = looked(net, batches)
    assert {n: p.count for n, p in seen.pairs.items()} == {
        "conv1": 120, "conv2": 120, "down": 108, "fc1": 12, "fc2": 12,
    }  # fmt: skip
    # of all positions, where there are fewer than were asked for
    with torch.no_grad():
        x = net.conv2(torch.relu(net.bn1(net.conv1(torch.cat(batches)))))
        x = torch.relu(net.bn2(x) + torch.relu(net.bn1(net.conv1(torch.cat(batches)))))
        y = net.down(x).permute(0, 2, 3, 1).reshape(-1, 8)
    values = torch.linalg.eigvalsh((y - y.mean(0)).double().T @ (y - y.mean(0)).double()).flip(0)
    torch.testing.assert_close(energies(seen.pairs["down"]), values, rtol=1e-4, atol=1e-4)


def test_refused_with_the_network_untouched() -> None:
    net, x = seeded(Twice()), inputs(8, 6)
    net.last = nn.Linear(6, 6)
    net.last.weight = net.first.weight
    with pytest.raises(ArgumentError, match=r"last\.weight is tied to first\.weight"):
        looked(net, x)
    net = seeded(Twice())
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        looked(net, [x[0] * float("nan")])
    with pytest.raises(ArgumentError, match="batches is empty"):
        looked(net, [])
    with torch.no_grad():
        net.last.bias[0] = float("inf")
    with pytest.raises(ArgumentError, match="last holds NaN or infinity"):
        looked(net, x)
    hooked = seeded(Twice())
    hooked.last.register_forward_hook(lambda module, args, out: 2 * out)
    seen = looked(hooked, x)
    before = copy.deepcopy(hooked.state_dict())
    with pytest.raises(ArgumentError, match="the network with factors differs"):
        approximate(hooked, x, seen, {"last": (2,)}, generator=torch.Generator().manual_seed(0))
    assert type(hooked.last) is nn.Linear
    assert all(torch.equal(v, before[n]) for n, v in hooked.state_dict().items())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) if float(x.sum()) < 1e9 else x


def test_what_cannot_be_traced_is_fitted_linearly_and_said() -> None:
    net, x = seeded(Branching()), inputs(8, 4)
    seen = looked(net, x)
    assert "fitted linearly" in seen.note
    assert seen.layers["fc"].kind == "linear"


def test_kinds_are_those_of_the_stage() -> None:
    assert set(KINDS) == {"nonlinear", "linear", "spatial", "tucker", "cp", "svd"}
