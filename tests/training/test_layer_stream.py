"""Layers' inputs in one pass: the same sums as from the start for each layer."""

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.training import layer_stream
from gossamer.training.layer_inputs import Moments
from gossamer.training.layer_stream import layer_by_layer, streamed

pytestmark = pytest.mark.usefixtures("one_thread")


def convolutions() -> tuple[nn.Module, list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    net = nets.build("resnet-8", width=0.25, seed=0)
    return net, [torch.randn(5, 3, 8, 8, generator=g) for _ in range(3)]


def transformer() -> tuple[nn.Module, list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    net = nets.build("gpt", classes=11, context=6, width=8, layers=2, heads=2, tied=False, seed=0)
    return net, [torch.randint(11, (2, 6), generator=g) for _ in range(2)]


def sums(seen: Moments | None) -> tuple[Tensor, Tensor]:
    assert seen is not None
    assert seen.hessian is not None
    assert seen.cross is not None
    return seen.hessian, seen.cross


def followed(
    net: nn.Module, batches: Sequence[Any], include: Sequence[str], known: Sequence[str] = ()
) -> list[tuple[str, Moments | None]]:
    """All layers halved, one after the other."""
    found = []
    own = names.parameters(net)
    for name, seen in layer_by_layer(net, batches, include, known):
        found.append((name, seen))
        with torch.no_grad():
            own[name] *= 0.5
    return found


@pytest.mark.parametrize("made", [convolutions, transformer])
def test_one_pass_gives_the_sums_of_many(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, batches = made()
    include = list(names.weights(net))
    assert streamed(net, batches, names.weights(net)) == include
    one = followed(net, batches, include)
    net, batches = made()
    monkeypatch.setattr(layer_stream, "streamed", lambda *_: None)
    many = followed(net, batches, include)
    assert [n for n, _ in one] == [n for n, _ in many] == include
    for (_, a), (_, b) in zip(one, many, strict=True):
        assert all(map(torch.equal, sums(a), sums(b)))
        assert (a.count, a.turned) == (b.count, b.turned)  # type: ignore[union-attr]
    assert threading.active_count() == 1


def test_layers_that_are_known_bring_no_sums_and_the_rest_the_same() -> None:
    net, batches = transformer()
    include = list(names.weights(net))
    whole = dict(followed(net, batches, include))
    net, batches = transformer()
    rest = followed(net, batches, include, include[:3])
    assert all(seen is None for _, seen in rest[:3])
    for name, seen in rest[3:]:
        assert all(map(torch.equal, sums(seen), sums(whole[name])))


def test_what_is_read_elsewhere_or_twice_is_not_streamed() -> None:
    g = torch.Generator().manual_seed(1)
    tied = nets.build("gpt", classes=11, context=6, width=8, layers=1, heads=2, seed=0)
    tokens = [torch.randint(11, (2, 6), generator=g)]
    weights = names.weights(tied)
    assert streamed(tied, tokens, weights) is None  # the embedding reads the output's weight
    assert len(followed(tied, tokens, list(weights))) == len(weights)
    lstm = nn.LSTM(3, 4)
    sequences = [torch.randn(5, 2, 3, generator=g)]
    assert streamed(lstm, sequences, names.weights(lstm)) is None  # a step, a use

    class Penalty(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.weight.square().sum()

    penalty = Penalty(3, 2)
    assert streamed(penalty, [torch.ones(1, 3)], names.weights(penalty)) is None


class Routed(nn.Module):
    """Which layer comes first hangs on the input, or on the first layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(2, 2, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.b, self.c) if float(self.a(x).sum()) > 1 else (self.c, self.b)
        out: Tensor = second(first(x))
        return out


def test_a_way_that_changes_is_refused_and_no_thread_stays() -> None:
    net = Routed()
    with torch.no_grad():
        net.a.weight.fill_(1.0)
    assert streamed(net, [torch.ones(1, 2), -torch.ones(1, 2)], names.weights(net)) is None
    with pytest.raises(ArgumentError, match="used otherwise"):
        followed(net, [torch.full((1, 2), 0.3)], ["a.weight", "b.weight", "c.weight"])
    assert threading.active_count() == 1


def test_an_error_inside_the_network_is_told_and_leaving_early_ends_all() -> None:
    net, batches = transformer()
    with pytest.raises(ArgumentError, match="longer than context"):
        followed(net, [torch.zeros(1, 9, dtype=torch.int64)], list(names.weights(net)))
    net.train()
    with contextlib.closing(layer_by_layer(net, batches, list(names.weights(net)))) as layers:
        next(layers)
        assert threading.active_count() > 1
    assert threading.active_count() == 1
    assert net.training
