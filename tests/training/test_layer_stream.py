"""All layers in one pass: the same sums as layer after layer, and stopped where it must be."""

import copy
import threading

import pytest
import torch
from torch import nn

from gossamer.core import names
from gossamer.quantize import posttraining
from gossamer.quantize.layerwise import Treatment
from gossamer.quantize.posttraining import treat_network
from gossamer.training.layer_inputs import readers
from gossamer.training.layer_stream import streamed


def drawn(count: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, *shape, generator=generator) for _ in range(count)]


class Late(nn.Module):
    """Adds the first layer's bias after the second layer's product."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x @ self.a.weight.T
        return self.b(first) + self.a.bias


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.a(torch.relu(self.a(x)))
        return out


NETS = {
    "plain": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (6,), True),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3),
            nn.Flatten(), nn.Linear(24, 4),
        ), (3, 6, 6), True,
    ),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), (4, 8), True
    ),
    "a bias of its own": (Late, (6,), False),
    "used twice": (Twice, (6,), False),
    "recurrent": (lambda: nn.LSTM(6, 5, batch_first=True), (4, 6), False),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_one_pass_gives_what_layer_after_layer_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    threads = set(threading.enumerate())
    make, shape, once = NETS[name]
    one = make().eval()
    other, batches = copy.deepcopy(one), drawn(5, *shape)
    weights = [n for n, p in names.parameters(one).items() if p.ndim >= 2]
    every = names.parameters(one)
    biases = {n: every[n.replace("weight", "bias")] for n in weights
              if n.replace("weight", "bias") in every}  # fmt: skip
    found = streamed(one, batches, {n: every[n] for n in weights}, biases)
    assert (found is not None) == once
    wanted = {n: Treatment(bits=4) for n in weights}
    rows = treat_network(one, batches, wanted, readers(one, batches, weights)).rows
    monkeypatch.setattr(posttraining, "streamed", lambda *_: None)
    apart = treat_network(other, batches, wanted, readers(other, batches, weights)).rows
    assert [r["name"] for r in rows] == [r["name"] for r in apart]
    state = other.state_dict()
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-4, atol=1e-4)
    assert set(threading.enumerate()) <= threads


def test_a_pass_that_fails_ends_all_others() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            if self.broken and float(y.detach().abs().max()) < 1e-3:
                raise RuntimeError("the network refuses small values")
            out: torch.Tensor = self.b(y)
            return out

        broken = True

    torch.manual_seed(0)
    threads = set(threading.enumerate())
    net, batches = Fails(), drawn(3, 6)
    read = readers(net, batches, ["a.weight", "b.weight"])
    wanted = {"a.weight": Treatment(density=0.01), "b.weight": Treatment(bits=4)}
    with torch.no_grad():
        net.a.bias.zero_()
    masks = {"a.weight": torch.zeros(6, 6, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match="refuses small values"):
        treat_network(net, batches, wanted, read, masks=masks)
    assert set(threading.enumerate()) <= threads


def test_a_layer_that_fails_ends_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set(threading.enumerate())
    net, batches = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), drawn(3, 6)
    read = readers(net, batches, ["0.weight", "1.weight"])
    wanted = {n: Treatment(bits=4) for n in read}
    monkeypatch.setattr(posttraining, "treat", lambda *_, **__: 1 / 0)
    try:
        treat_network(net, batches, wanted, read)
    except ZeroDivisionError:  # its traceback is held while we look
        assert set(threading.enumerate()) <= threads
    else:
        pytest.fail("the error was lost")
