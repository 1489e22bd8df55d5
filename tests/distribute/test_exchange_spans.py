"""Spans: where a bucket is cut, what travels meanwhile, and that no bit depends on either."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.errors import ArgumentError
from gossamer.distribute import ErrorFeedback, Key, SQm, TernGrad
from gossamer.distribute import simulate as simulated
from gossamer.distribute.codecs.qsgd import QSGD
from gossamer.distribute.exchange import spans, topology
from gossamer.distribute.exchange.group import AllGather, Start, Wait, lockstep
from gossamer.distribute.exchange.spans import Flights, Piece
from gossamer.distribute.wire.message import Slot


def piece(name, n, decoded=False):
    g = torch.arange(float(n))
    zero = torch.zeros(())
    slot = Slot(name, (n,), torch.float32, True)
    return Piece(slot, 0, g, -g, zero, 0.0, 2 * g if decoded else None)


@given(st.lists(st.integers(0, 700), max_size=6), st.sampled_from([64, 192]), st.integers(64, 500))
def test_spans_hold_everything_once_in_order(sizes, grain, size):
    pieces = [piece(str(i), n, decoded=True) for i, n in enumerate(sizes)]
    found = list(spans.spans(pieces, grain, size))
    for i, n in enumerate(sizes):
        parts = [p for span in found for p in span if p.slot.name == str(i)]
        assert torch.equal(torch.cat([p.gradient for p in parts]), torch.arange(float(n)))
        assert all(torch.equal(p.target, -p.gradient) for p in parts)
        assert all(torch.equal(p.decoded, 2 * p.gradient) for p in parts)
        assert all(p.start % grain == 0 for p in parts)
        assert [p.start for p in parts] == [int(p.gradient[0]) if p.numel else 0 for p in parts]
    lengths = [sum(p.numel for p in span) for span in found]
    assert all(n < size + grain for n in lengths)
    assert all(n >= size - grain for n in lengths[:-1])


def test_a_piece_has_its_part_of_the_stream():
    g, codec = torch.randn(1000, generator=torch.Generator().manual_seed(0)), SQm(4)
    scale = codec.scale(g)
    whole = codec.decode(codec.encode(g, scale, Key(1, 2, 3, 4)), scale, 1000)
    for start, stop in ((0, 64), (64, 1000), (640, 700)):
        payload = codec.encode(g[start:stop], scale, Key(1, 2, 3, 4, start))
        assert torch.equal(codec.decode(payload, scale, stop - start), whole[start:stop])
    for start in (-64, 32, 1.5):
        with pytest.raises(ArgumentError, match="start="):
            Key(1, 2, 3, 4, start)


@pytest.mark.parametrize("way", ["all_gather", "two_phase", "server", "again"])
@pytest.mark.parametrize("codec", [TernGrad(), SQm(3), QSGD(4), QSGD(4, bucket=128)], ids=repr)
def test_cuts_change_no_bit(way, codec, monkeypatch):
    if way != "all_gather" and not codec.sums:
        pytest.skip("has no sums")
    options = {"topology": way}
    if way == "again":
        options = {"topology": "two_phase", "requantize": True}
    draw = torch.Generator().manual_seed(0)
    sizes = {"a": 3000, "b": 7, "c": 1500, "d": 0, "e": 5001}
    every = [{n: torch.randn(s, generator=draw) for n, s in sizes.items()} for _ in range(3)]
    found, errors = [], []
    for size, agreed in ((spans.SPAN, (2, 8)), (1024, (2, 8)), (200, (1, 3))):
        monkeypatch.setattr(topology, "SPAN", size)
        monkeypatch.setattr(topology, "AGREED", agreed)
        kept = [ErrorFeedback() for _ in every]
        for step in range(2):
            got = simulated(every, codec, step=step, feedback=kept, **options)
        found.append(got)
        errors.append([k.errors for k in kept])
    for other, theirs in zip(found[1:], errors[1:], strict=True):
        assert all(torch.equal(other[n], found[0][n]) for n in sizes)
        for mine, first in zip(theirs, errors[0], strict=True):
            assert mine.keys() == first.keys() == {"a", "c", "e"}
            assert all(torch.equal(mine[n], first[n]) for n in mine)


def test_flights_overlap_in_one_order():
    """Three starts before the first answer is waited for; answers come in order; all end."""
    log = []

    def program(i, rounds):
        for turn in range(rounds):
            log.append(f"{i} asks {turn}")
            found = yield Start(AllGather(torch.tensor([i]), last=turn == rounds - 1))
            log.append(f"{i} has {int(found[0])}")

    def all_of_them():
        flights = Flights()
        for i, rounds in enumerate((1, 2, 1, 0)):
            yield from flights.start(program(i, rounds))
        yield from flights.land()

    def told(inner):
        answer = None
        while True:
            try:
                request = inner.send(answer)
            except StopIteration:
                return
            log.append(type(request).__name__)
            answer = yield request

    lockstep([told(all_of_them())])
    start, wait = Start.__name__, Wait.__name__
    assert log == [
        "0 asks 0", start, "1 asks 0", start, "2 asks 0", start,
        wait, "0 has 0",
        wait, "1 has 1", "1 asks 1", start,
        wait, "2 has 2",
        wait, "1 has 1",
    ]  # fmt: skip


def test_the_last_answer_is_rank_0s_alone():
    ended = []

    def program(rank):
        flights = Flights()

        def one():
            found = yield Start(AllGather(torch.tensor([rank])))
            assert [int(f) for f in found] == [0, 1]
            yield Start(AllGather(torch.tensor([rank]), last=True))
            ended.append(rank)

        yield from flights.start(one())
        yield from flights.land()

    lockstep([program(0), program(1)])
    assert ended == [0]
