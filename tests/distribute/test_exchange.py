"""The exchange in one process: messages, averages by hand, error feedback, settings, state."""

import struct
import warnings
import zlib
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.distribute import (
    ErrorFeedback,
    GradientExchange,
    Key,
    Plan,
    SignSGD,
    SQm,
    TernGrad,
    by_name,
    dither_shift,
    exchange,
    parameter_hash,
    simulate,
)
from gossamer.distribute.codecs.qsgd import QSGD
from gossamer.distribute.exchange.agreement import difference
from gossamer.distribute.exchange.average import THRESHOLD
from gossamer.distribute.wire.message import CODES, SUMS, Layout, Slot, Writer, read

WAYS = ("all_gather", "two_phase", "server")


def workers(size, n=2000):
    g = torch.Generator().manual_seed(size)
    return [
        {"w": torch.randn(n, generator=g), "b": torch.randn(5, generator=g)} for _ in range(size)
    ]


# Messages


PARTS = st.lists(
    st.tuples(
        st.floats(width=32),
        st.sampled_from(["planes", "sparse", "base3", None]),
        st.binary(max_size=40),
    ),
    max_size=6,
)


def written(parts, kind=CODES, checksum=False):
    writer = Writer([len(data) for _, _, data in parts])
    for scale, form, data in parts:
        if data:
            writer.space[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        writer.add(len(data), form, scale)
    return writer.finish(kind, 3, 5, 99, checksum=checksum)


EXPECTED = {"kind": CODES, "codec": 3, "step": 5, "fingerprint": 99}


@given(PARTS, st.integers(0, 40))
def test_messages_round_trip(parts, extra):
    message = written(parts)
    assert message.numel() % 8 == 0
    padded = torch.cat([message, torch.full((extra,), 255, dtype=torch.uint8)])
    found = read(padded, count=len(parts), **EXPECTED)
    for (scale, form, data), part in zip(parts, found, strict=True):
        assert struct.pack("<f", part.scale) == struct.pack("<f", scale) or scale != scale
        assert (part.form, bytes(part.payload.tolist())) == (form, data)
        assert part.payload.storage_offset() % 8 == 0


def test_message_layout():
    message = bytes(written([(1.5, "sparse", b"abc"), (0.0, None, b"12345678")], SUMS).tolist())
    assert message == (
        b"GSMX\x02\x03\x01\x00"
        + struct.pack("<QQII", 5, 99, 2, 0)
        + struct.pack("<fIQ", 1.5, 1, 3)
        + struct.pack("<fIQ", 0.0, 255, 8)
        + b"abc\0\0\0\0\0"
        + b"12345678"
    )


def test_messages_refuse_what_is_not_expected():
    message = written([(1.0, "planes", bytes(16))])
    for change in ({"kind": SUMS}, {"codec": 4}, {"step": 6}, {"fingerprint": 98}, {"count": 2}):
        with pytest.raises(FormatError):
            read(message, **{**EXPECTED, "count": 1, **change})
    for at, value in ((0, 0), (4, 1), (36, 3), (40, 17), (47, 255)):
        bad = message.clone()
        bad[at] = value
        with pytest.raises(FormatError):
            read(bad, count=1, **EXPECTED)
    for length in range(message.numel()):
        with pytest.raises(FormatError):
            read(message[:length], count=1, **EXPECTED)


def test_a_checksum_sees_every_changed_bit():
    parts = [(1.5, "sparse", b"abc"), (0.0, None, b"12345678")]
    message = written(parts, checksum=True)
    plain = written(parts)
    # in the place that is zero without: the bytes are as many
    assert torch.equal(message[:28], plain[:28])
    assert torch.equal(message[32:], plain[32:])
    assert int.from_bytes(message[28:32].tolist(), "little") == zlib.crc32(bytes(plain.tolist()))
    padding = torch.full((8,), 255, dtype=torch.uint8)
    assert len(read(torch.cat([message, padding]), count=2, checksum=True, **EXPECTED)) == 2
    for bit in range(8 * message.numel()):
        bad = message.clone()
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            read(bad, count=2, checksum=True, **EXPECTED)


def test_layouts_tell_apart():
    slots = (Slot("a", (2, 3), torch.float32, True), Slot("b", (), torch.bfloat16, False))
    settings = (("codec", "c"), ("seed", "0"))
    layout = Layout(settings, slots)
    assert layout.text == "codec = c\nseed = 0\na 2x3 float32 coded\nb scalar bfloat16 exact"
    assert 0 <= layout.fingerprint < 1 << 63
    assert layout.fingerprint != Layout(settings, slots[::-1]).fingerprint
    other = Layout((("codec", "d"), ("seed", "4")), slots[:1])
    fewer = Layout(settings, slots[:1])
    assert difference([layout.text, layout.text, fewer.text]) == (
        "'b scalar bfloat16 exact' on ranks 0, 1 and nothing on rank 2"
    )
    assert difference([layout.text, other.text, layout.text, fewer.text]) == (
        "codec is c on ranks 0, 2, 3 and d on rank 1; seed is 0 on ranks 0, 2, 3 and 4 on rank 1"
    )
    assert difference([other.text, layout.text]).startswith("codec is d on rank 0 and c on rank 1;")


# Averages


@pytest.mark.parametrize("dither", ["independent", "shifted"])
@pytest.mark.parametrize("shared", [False, True])
def test_all_gather_by_hand(shared, dither):
    """What each rank decodes of each, ranks in order, scales and random numbers as said."""
    codec, every = SQm(4, clip=2.0), workers(3)
    found = simulate(
        every, codec, step=4, seed=9, topology="all_gather", shared_scale=shared, dither=dither
    )
    scales = [codec.scale(g["w"]) for g in every]
    if shared:
        scales = [max(scales)] * 3
    total = torch.zeros(2000)
    for rank, (g, scale) in enumerate(zip(every, scales, strict=True)):
        key, shift = Key(9, 4, rank, parameter_hash("w")), 0
        if dither == "shifted":
            key, shift = Key(9, 4, None, parameter_hash("w")), dither_shift(rank, 3)
        payload = codec.encode(g["w"], scale, key, shift=shift)
        code = (codec.decode(payload, 1.0, 2000) * codec.levels).round()
        total += code * (scale / codec.levels)
    assert torch.equal(found["w"], total * torch.tensor(1 / 3))
    assert torch.equal(found["b"], (every[0]["b"] + every[1]["b"] + every[2]["b"]) / 3)


@pytest.mark.parametrize("topology", ["two_phase", "server"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_sums_are_exact(topology, size):
    """Every value is the largest scale times one of 2 N + 1 levels, next to the true mean."""
    every = workers(size)
    codec = TernGrad(clip=None)
    found = simulate(every, codec, step=0, topology=topology)["w"]
    scale = max(float(codec.scale(g["w"])) for g in every)
    level = found * (size / scale)
    assert (level - level.round()).abs().max() < 1e-4
    assert level.abs().max() <= size
    # each rank's code is one of the two next to its gradient, so the mean is within one scale
    mean = sum(g["w"] for g in every) / size
    assert (found - mean).abs().max() <= scale
    steps = torch.stack(
        [simulate(every, codec, step=s, topology=topology)["w"] for s in range(200)]
    )
    # unbiased: what is left after 200 steps is what 200 independent steps of this variance leave
    variance = sum(g["w"].abs() * (scale - g["w"].abs()) for g in every) / size**2
    ratio = float((steps.mean(0) - mean).square().sum() / (variance.sum() / 200))
    assert 0.85 < ratio < 1.15


@pytest.mark.parametrize("topology", ["two_phase", "server"])
def test_means_that_are_quantized_again(topology):
    """One of three values, unbiased; exactly what the codec makes of the exact mean."""
    size = 4
    every = workers(size)
    codec = TernGrad(clip=None)
    options = {"topology": topology, "requantize": True}
    found = simulate(every, codec, step=5, seed=2, **options)
    exact = simulate(every, codec, step=5, seed=2, topology=topology)
    scale = max(float(codec.scale(g["w"])) for g in every)
    key = Key(2, 5, None, parameter_hash("w/mean"))
    again = codec.decode(codec.encode(exact["w"], scale, key), scale, 2000)
    assert torch.equal(found["w"], again)
    assert found["w"].unique().tolist() == [-scale, 0, scale]
    assert torch.equal(found["b"], exact["b"])
    mean = sum(g["w"] for g in every) / size
    steps = torch.stack([simulate(every, codec, step=s, **options)["w"] for s in range(300)])
    # unbiased: the mean of 300 steps is off by what steps of their variance leave
    ratio = float((steps.mean(0) - mean).square().sum() / (steps.var(0).sum() / 300))
    assert 0.85 < ratio < 1.15
    nan = [{"w": g["w"].clone()} for g in every]
    nan[2]["w"][7] = float("nan")
    assert simulate(nan, codec, step=0, **options)["w"].isnan().all()


def test_two_phase_does_not_depend_on_the_others_beside():
    """Buckets are rebuilt: a gradient's average is the same whatever it travels with."""
    every = workers(4)
    alone = simulate([{"w": g["w"]} for g in every], TernGrad(), step=0, topology="two_phase")
    turned = [{"b": g["b"], "v": g["w"] * 2, "w": g["w"]} for g in every]
    beside = simulate(turned, TernGrad(), step=0, topology="two_phase")
    assert torch.equal(alone["w"], beside["w"])


@pytest.mark.parametrize("topology", WAYS)
def test_small_and_excluded_gradients_are_exact(topology):
    every = workers(3, n=THRESHOLD - 1)
    whole = {n: (every[0][n] + every[1][n] + every[2][n]) / 3 for n in ("w", "b")}
    found = simulate(every, TernGrad(), step=0, topology=topology)
    assert all(torch.equal(found[n], whole[n]) for n in whole)
    found = simulate(every, TernGrad(), step=0, topology=topology, threshold=0)
    assert not any(torch.equal(found[n], whole[n]) for n in whole)
    found = simulate(every, TernGrad(), step=0, topology=topology, threshold=0, exclude="w")
    assert torch.equal(found["w"], whole["w"])
    assert not torch.equal(found["b"], whole["b"])


def test_auto():
    plan = Plan(TernGrad())
    assert [plan.way(n) for n in (1, 2, 3, 4, 64)] == ["all_gather"] * 3 + ["two_phase"] * 2
    assert Plan(QSGD(4, bucket=64)).way(64) == "all_gather"


def test_simulation_leaves_its_input():
    every = workers(3)
    before = [{n: t.clone() for n, t in g.items()} for g in every]
    simulate(every, TernGrad(), step=0)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(every, before, strict=True) for n in a)


def test_one_process_without_a_group():
    own = workers(1)[0]
    expected = simulate([own], TernGrad(), step=2)
    exchange(own, TernGrad(), step=2)
    assert torch.equal(own["w"], expected["w"])
    assert own["w"].unique().numel() == 3


# Error feedback


def test_feedback_by_hand():
    g = torch.tensor([4.0, -1.0, 0.5])
    kept = ErrorFeedback()
    p = kept.correct("w", g)
    assert torch.equal(p, g)
    kept.record("w", p, torch.tensor([2.0, -2.0, 2.0]))
    assert kept.correct("w", g).tolist() == [6.0, 0.0, -1.0]
    kept.record("w", torch.full((3,), float("nan")), torch.zeros(3))
    assert kept.errors["w"].tolist() == [2.0, 1.0, -1.5]
    other = ErrorFeedback()
    other.load_state_dict(kept.state_dict())
    assert torch.equal(other.errors["w"], kept.errors["w"])
    with pytest.raises(ArgumentError, match="another model"):
        kept.correct("w", torch.zeros(4))


@pytest.mark.parametrize("topology", WAYS)
def test_feedback_sends_everything_in_the_end(topology):
    """The sum of what was sent is the sum of the gradients, but for the last errors."""
    codec = by_name("signsgd", scaler="mean") if topology == "all_gather" else SQm(2)
    every, kept = workers(2), [ErrorFeedback(), ErrorFeedback()]
    sent = torch.zeros(2000)
    for step in range(20):
        sent += simulate(every, codec, step=step, topology=topology, feedback=kept)["w"]
    if topology == "all_gather":  # a vote is no sum; one worker's is
        one, sent = [ErrorFeedback()], torch.zeros(2000)
        for step in range(20):
            sent += simulate(every[:1], codec, step=step, feedback=one)["w"]
        left, mean = one[0].errors["w"], every[0]["w"]
    else:
        left = (kept[0].errors["w"] + kept[1].errors["w"]) / 2
        mean = (every[0]["w"] + every[1]["w"]) / 2
    assert torch.allclose(sent + left, 20 * mean, atol=1e-3)
    assert "b" not in kept[0].errors


# Settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topology": "ring"}, "ring"),
        ({"topology": "server", "shared_scale": False}, "shared_scale=False"),
        ({"codec": QSGD(4, bucket=64), "topology": "two_phase"}, "use topology='all_gather'"),
        ({"codec": "terngrad"}, "by_name"),
        ({"dither": "none"}, "dither"),
        ({"topology": "all_gather", "requantize": True}, "use topology='two_phase'"),
        ({"codec": SignSGD(), "topology": "server", "requantize": True}, "bias signsgd"),
        ({"threshold": -1}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"exclude": "nothing*"}, "matches nothing"),
    ],
)
def test_settings_are_checked(options, words):
    own = {"w": torch.ones(2000)}
    with pytest.raises(ArgumentError, match=words.replace("*", r"\*")):
        exchange(own, **{"codec": TernGrad(), "step": 0, **options})
    with pytest.raises(ArgumentError, match=words.replace("*", r"\*")):
        GradientExchange(nn.Linear(50, 50), **{"codec": TernGrad(), **options})
    assert torch.equal(own["w"], torch.ones(2000))


def test_gradients_are_checked():
    codec = TernGrad()
    with pytest.raises(ArgumentError, match="empty"):
        exchange({}, codec, step=0)
    with pytest.raises(ArgumentError, match="empty"):
        simulate([], codec, step=0)
    with pytest.raises(ArgumentError, match="one a rank"):
        simulate(workers(2), codec, step=0, feedback=[ErrorFeedback()])
    with pytest.raises(ArgumentError, match=r"w is torch\.int64"):
        exchange({"w": torch.ones(3, dtype=torch.int64)}, codec, step=0)
    with pytest.raises(ArgumentError, match=r"w is sparse.*sparse=False"):
        exchange({"w": torch.eye(3).to_sparse()}, codec, step=0)
    with pytest.raises(ArgumentError, match="timeout"):
        GradientExchange(nn.Linear(2, 2), codec, timeout=0)


# The hook with one rank


@pytest.fixture
def one_rank():
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30)
    )
    yield
    dist.destroy_process_group()


def test_one_rank(one_rank):
    torch.manual_seed(0)
    model = nn.Linear(50, 40)
    with warnings.catch_warnings():  # of torch's own modules that DDP imports
        warnings.simplefilter("ignore")
        ddp = DDP(model)
    state = GradientExchange(model, TernGrad(), seed=3)
    ddp.register_comm_hook(state, GradientExchange.hook)
    x = torch.randn(8, 50)
    with pytest.warns(UserWarning, match="one rank"):
        ddp(x).square().sum().backward()
    other = nn.Linear(50, 40)
    other.load_state_dict(model.state_dict())
    for step in (0, 1):  # the second time without a warning
        other.zero_grad()
        other(x).square().sum().backward()
        own = {n: p.grad for n, p in other.named_parameters()}
        expected = simulate([own], TernGrad(), step=step, seed=3)
        assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters())
        if step == 0:
            model.zero_grad()
            ddp(x).square().sum().backward()
    assert state.state_dict()["step"] == 2

    foreign = GradientExchange(nn.Linear(50, 40), TernGrad())
    ddp = DDP(model)
    ddp.register_comm_hook(foreign, foreign.hook)
    with (
        pytest.warns(UserWarning, match="one rank"),
        pytest.raises(ArgumentError, match="not the model's"),
    ):
        ddp(x).sum().backward()


def test_state_is_checked():
    state = GradientExchange(nn.Linear(50, 40), TernGrad(), feedback=True)
    saved = state.state_dict()
    for bad in ({}, {**saved, "format": 2}, {k: v for k, v in saved.items() if k != "step"}):
        with pytest.raises(FormatError):
            state.load_state_dict(bad)
    with pytest.raises(ArgumentError, match="without errors"):
        state.load_state_dict({**saved, "errors": None})
    state.load_state_dict({**saved, "errors": None, "step": 5}, resize=True)
    assert state.state_dict()["step"] == 5
    # the number of ranks is known only with a process group: it is checked at the first step
    state.load_state_dict({**saved, "size": 3})
    assert state.state_dict()["size"] == 3
