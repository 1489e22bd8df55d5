"""Whole networks from inputs alone: their function, what of them is treated, and gone on with."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.quantize.layerwise import Treatment
from gossamer.quantize.posttraining import Layers, treat_network
from gossamer.training.layer_inputs import readers
from gossamer.training.renorm import distance


class Encoder(nn.Module):
    """BERT's shape: tables, encoder layers, a head tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(60, 32), nn.Embedding(12, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(32, 60, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.layers(x))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.inner(source, target)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner, self.out = kind(16, 24, 3, batch_first=True), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x)[0][:, -1])


def ladder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 1),
    )  # fmt: skip


def floats(*shape: int) -> list[Any]:
    return [torch.randn(16, *shape) for _ in range(4)]


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], float]] = {
    "encoder": (Encoder, lambda: [torch.randint(0, 60, (8, 12)) for _ in range(4)], 0.95),
    "translator": (
        Translator, lambda: list(zip(floats(7, 32), floats(5, 32), strict=True)), 0.95
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: floats(9, 16), 0.9),
    "gru": (lambda: Recurrent(nn.GRU), lambda: floats(9, 16), 0.9),
    "up and down": (ladder, lambda: floats(3, 8, 8), 0.9),
}  # fmt: skip


def treated(model: nn.Module, batches: list[Any], how: Treatment, **options: Any) -> Layers:
    own = {n: p for n, p in names.parameters(model).items() if p.ndim >= 2}
    read = readers(model, batches, own)
    return treat_network(model, batches, dict.fromkeys(own, how), read, **options)


def nearest(model: nn.Module, bits: int) -> None:
    """Rounding to nearest, by output channel."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                rows = p.reshape(len(p), -1)
                step = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                rows.copy_((rows / step).round() * step)


@pytest.mark.parametrize("name", NETS)
def test_networks_of_every_kind(name: str) -> None:
    make, given, share = NETS[name]
    torch.manual_seed(0)
    net, batches = make().eval(), given()
    fine = copy.deepcopy(net)
    done = treated(fine, batches, Treatment(bits=16))
    assert distance(fine, net, batches) ** 0.5 < 1e-3
    own = names.parameters(net)
    assert all(row["seen"] and not row["note"] for row in done.rows)
    count = sum(own[row["name"]].numel() for row in done.rows)
    assert count >= share * sum(p.numel() for p in own.values())
    coarse, plain = copy.deepcopy(net), copy.deepcopy(net)
    treated(coarse, batches, Treatment(bits=4))
    nearest(plain, 4)
    assert distance(coarse, net, batches) < distance(plain, net, batches)


def test_an_lstm_encoder_keeps_the_direction_of_its_embeddings() -> None:
    torch.manual_seed(0)
    net, batches, fresh = Recurrent(nn.LSTM).eval(), floats(9, 16), torch.randn(64, 9, 16)

    def cosines(other: nn.Module) -> Tensor:
        with torch.no_grad():
            return F.cosine_similarity(other(fresh), net(fresh))

    eight, four, plain = (copy.deepcopy(net) for _ in range(3))
    treated(eight, batches, Treatment(bits=8))
    assert cosines(eight).mean() >= 0.999
    assert cosines(eight).min() >= 0.998
    treated(four, batches, Treatment(bits=4))
    nearest(plain, 4)
    assert cosines(four).mean() > cosines(plain).mean()


def test_a_killed_call_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def stop(done: int, of: int, name: str) -> None:
        if done == 2:
            raise Killed

    torch.manual_seed(0)
    net, batches = Recurrent(nn.GRU).eval(), floats(5, 16)
    whole, broken = copy.deepcopy(net), copy.deepcopy(net)
    how, kept = Treatment(rate=0.01), lambda i: tmp_path / f"{i}.pt"
    first = treated(whole, batches, how)
    with pytest.raises(Killed):
        treated(broken, batches, how, kept=kept, progress=stop)
    assert len(list(tmp_path.iterdir())) == 2
    broken = copy.deepcopy(net)
    second = treated(broken, batches, how, kept=kept)
    assert second == first
    for a, b in zip(whole.parameters(), broken.parameters(), strict=True):
        assert torch.equal(a, b)


def test_half_precision_stays_half() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).bfloat16()
    batches = [b.bfloat16() for b in floats(16)]
    coarse, plain = copy.deepcopy(net), copy.deepcopy(net)
    treated(coarse, batches, Treatment(bits=4))
    nearest(plain, 4)
    assert all(p.dtype == torch.bfloat16 for p in coarse.parameters())
    assert distance(coarse, net, batches) < distance(plain, net, batches)


def test_what_is_no_matrix_is_refused() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(ArgumentError, match="'bias' is no parameter of two"):
        treat_network(net, [torch.ones(1, 3)], {"bias": Treatment(bits=4)}, {})


def test_what_was_not_seen_is_rounded_and_said() -> None:
    net = nn.Bilinear(3, 4, 2)
    batches = [(torch.randn(5, 3), torch.randn(5, 4))]
    (row,) = treated(net, batches, Treatment(bits=3)).rows
    assert not row["seen"]
    assert "not seen" in row["note"]
    assert all(len(w.unique()) <= 7 for w in net.weight)
