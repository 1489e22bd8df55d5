import contextlib
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.kernels import kernel
from gossamer.distribute import (
    QSGD,
    DoReFa,
    GradCodec,
    Key,
    SignSGD,
    SQm,
    TernGrad,
    backend,
    by_name,
    clip_slope,
    dither_shift,
    parameter_hash,
)
from gossamer.distribute.codecs import eager
from gossamer.distribute.codecs.backends import statistics
from gossamer.distribute.codecs.random import tie_words, words
from gossamer.distribute.wire import planes

KEY = Key(seed=7, step=3, rank=1, parameter=parameter_hash("fc.weight"))
SIZES = (*range(10), 63, 64, 65, 319, 320, 321, 2559, 2560, 2561, 4095, 4096, 4097, 9000)
CODECS: tuple[GradCodec, ...] = (
    TernGrad(),
    TernGrad(clip=None),
    SQm(2),
    SQm(3, clip=2.0),
    SQm(4, clip=1.0, scaler="sigma"),
    SQm(8),
    QSGD(1),
    QSGD(5),
    QSGD(255),
    QSGD(4, bucket=128),
    SignSGD(),
    SignSGD("mean"),
    DoReFa(1),
    DoReFa(2),
    DoReFa(8),
)
ids = [repr(c) for c in CODECS]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=ids)
WAYS = ["eager", *(["scalar", "avx2", "avx512"] if kernel("exchange") else [])]


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Choose a back end; an instruction set that is not there falls back to a lower one."""

    def choose(name: str) -> None:
        monkeypatch.setenv("GOSSAMER_NATIVE", "0" if name == "eager" else "1")
        monkeypatch.setenv("GOSSAMER_ISA", name)
        assert backend(torch.zeros(1)) == ("eager" if name == "eager" else "native")

    return choose


def randn(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, NaNs and signs of zeros among them."""
    if a.dtype == torch.float32:
        a, b = a.view(torch.int32), b.view(torch.int32)
    if a.dtype == torch.float64:
        a, b = a.view(torch.int64), b.view(torch.int64)
    return a.dtype == b.dtype and torch.equal(a, b)


# ---- by hand ----


@pytest.mark.parametrize("name", WAYS)
def test_by_hand_ternary(name: str, way: Callable[[str], None]) -> None:
    way(name)
    codec = TernGrad(clip=None)
    g = torch.tensor([2.0, -2.0, 0.0, 2.0])
    one = codec.encode(g, 2.0, KEY)
    assert one.tolist() == [0b1011, *[0] * 7, 0b0010, *[0] * 7]
    sparse = codec.encode(g, 2.0, KEY, form="sparse")
    assert sparse.tolist() == [0b1011, *[0] * 7, 0b010, *[0] * 7]
    # four elements in one byte: 2 + 3 * 0 + 9 * 1 + 27 * 2 + 81 * 1
    assert codec.encode(g, 2.0, KEY, form="base3").tolist() == [146]
    assert codec.decode(one, 0.5, 4).tolist() == [0.5, -0.5, 0.0, 0.5]


@pytest.mark.parametrize("name", WAYS)
def test_by_hand_more_bits(name: str, way: Callable[[str], None]) -> None:
    way(name)
    g = torch.tensor([1.0, -2.0, 3.0, 0.0])
    three = SQm(3).encode(g, 3.0, KEY)  # codes 1, -2, 3, 0
    assert three[::8].tolist() == [0b0101, 0b0110, 0b0010]
    assert SQm(3).decode(three, 3.0, 4).tolist() == g.tolist()
    assert SQm(3).encode(g, 3.0, KEY, form="sparse")[::8].tolist() == [0b0101, 0b0110, 0b010]
    qsgd = QSGD(5)
    length = qsgd.scale(torch.tensor([3.0, -4.0]))
    assert float(length) == 5.0
    payload = qsgd.encode(torch.tensor([3.0, -4.0]), length, KEY)
    assert qsgd.decode(payload, length, 2).tolist() == [3.0, -4.0]
    odd = torch.tensor([3.0, 1.0, -1.0, -3.0])  # n = 3, codes 3, 1, -1, -3
    dorefa = DoReFa(2).encode(odd, 3.0, KEY)
    assert dorefa[::8].tolist() == [0b1001, 0b1100]
    assert DoReFa(2).decode(dorefa, 3.0, 4).tolist() == odd.tolist()
    assert SignSGD().encode(odd, 1.0, KEY).tolist() == [0b1100, *[0] * 7]


def test_words_by_hand() -> None:
    def mix(c: int, a: int, b: int) -> int:
        x = (c + a) % 2**32
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x ^= b
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    k0, k1, k2, k3 = KEY.words
    hashes = [mix(16 * (e // 32) + e % 16, k0, k1) for e in range(200)]
    expected = [h >> 16 * (e // 16 % 2) & 0xFFFF for e, h in enumerate(hashes)]
    assert words(KEY, 0, 200).tolist() == expected
    assert words(KEY, 77, 100).tolist() == expected[77:177]
    assert tie_words(KEY, 5, 50).tolist() == [mix(e, k2, k3) >> 8 for e in range(5, 55)]
    # kept: other bits would break the replay of checkpoints and mixed versions
    assert [hex(k) for k in Key(1, 2, 3, 4).words] == GOLDEN_WORDS
    payload = TernGrad().encode((torch.arange(64.0) - 32) / 16, 2.5, Key(1, 2, 3, 4))
    assert bytes(payload.tolist()).hex() == GOLDEN_PAYLOAD


GOLDEN_WORDS = ["0x81e3d724", "0xd757bec", "0x63c023b3", "0xcdfd186d"]
GOLDEN_PAYLOAD = "bf9fe3000020dd7bbf9fe30000000000"


# ---- expectation and error ----


@every_codec
def test_unbiased(codec: GradCodec) -> None:
    if not codec.unbiased:
        pytest.skip("biased by design")
    draws, g = 1500, randn(192, 1)
    scale = codec.scale(g)
    values = torch.stack(
        [
            codec.decode(codec.encode(g, scale, Key(0, step, 0, 1)), scale, len(g))
            for step in range(draws)
        ]
    ).double()
    if getattr(codec, "clip", None) is not None:
        g = g.clamp(-scale, scale)
    mean, error = values.mean(0), values.std(0) / math.sqrt(draws)
    step = values.amax(0) - values.amin(0)
    # where the rarer of the two values comes up 30 times, its count is nearly normal
    often = error.square() * draws > 30 / draws * step.square()
    often &= step > 0
    z = ((mean - g) / error)[often]
    assert len(z) > 60
    assert z.abs().max() < 4
    assert 0.7 < z.square().mean() < 1.4
    assert (mean - g)[~often].abs().max() <= 0.05 * step.max() + 1e-5 * scale


def test_length_of_ternary() -> None:
    codec, g = TernGrad(clip=None), randn(100_000)
    scale = codec.scale(g)
    assert scale == g.abs().max()
    found = 0.0
    for step in range(20):
        payload = codec.encode(g, scale, Key(0, step, 0, 1))
        found += float(codec.decode(payload, scale, len(g)).square().sum()) / 20
    assert found == pytest.approx(float(scale * g.abs().sum()), rel=0.01)


@pytest.mark.parametrize("bits", range(2, 9))
def test_variance_bound(bits: int) -> None:
    codec = SQm(bits)
    for seed in range(100):
        g = randn(500, seed) * torch.rand(500, generator=torch.Generator().manual_seed(seed)) ** 4
        scale = codec.scale(g)
        q = [codec.decode(codec.encode(g, scale, Key(1, i, 0, seed)), scale, 500) for i in range(8)]
        error = sum(float((x - g).square().sum()) for x in q) / 8
        assert error <= float(scale * g.abs().sum()) / codec.levels


def test_bias_is_reported() -> None:
    g = randn(200_000)
    for codec in (TernGrad(), SQm(4, clip=1.0)):
        clipped = g.clamp(-codec.scale(g), codec.scale(g))
        assert codec.bias == clip_slope(codec.clip)
        assert float((clipped * g).sum() / g.square().sum()) == pytest.approx(codec.bias, abs=0.005)
    assert TernGrad(clip=None).bias == 1


# ---- the generator ----


def stream(**other: int) -> Tensor:
    names = {"seed": 7, "step": 3, "rank": 1, "parameter": 99, **other}
    return words(Key(**names), 0, 1 << 17).double()


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm())) * math.sqrt(len(a))


def test_words_are_uniform() -> None:
    for key in (KEY, Key(0, 0, 0, 0), Key(0, 0, None, 0), Key(2**64 - 1, 0, 0, 0)):
        x = words(key, 0, 1 << 18)
        for part in (x >> 8, x & 255, x >> 4 & 255):
            expected = len(x) / 256
            chi = float(((torch.bincount(part, minlength=256) - expected) ** 2 / expected).sum())
            assert 150 < chi < 365  # 255 +- 4.6 standard deviations
        assert torch.bincount(x, minlength=65536).max() < 20  # mean 4


def test_no_correlation() -> None:
    base = stream()
    for name, value in (("seed", 7), ("step", 3), ("rank", 1), ("parameter", 99)):
        for by in (1, 2, 16):
            assert abs(correlation(base, stream(**{name: value + by}))) < 4
    for lag in (1, 2, 15, 16, 17, 32, 64, 1024):
        assert abs(correlation(base[lag:], base[:-lag])) < 4
    key = Key(7, 3, 1, 99)
    assert abs(correlation(base, tie_words(key, 0, len(base)).double())) < 4
    assert Key(0, 1, 0, 5).words != Key(1, 0, 0, 5).words
    assert key.shared() == Key(7, 4 - 1, 9, 99).shared() != key


def test_tiny_chances() -> None:
    codec = TernGrad(clip=None)
    size, keys = (1 << 23, 8) if kernel("exchange") else (1 << 20, 4)
    g = torch.full((size,), 2.0**-20)
    out = torch.empty(codec.payload_bytes(size), dtype=torch.uint8)
    ups = 0
    for rank in range(keys):
        payload = codec.encode(g, 1.0, Key(0, 0, rank, 0), out=out)
        ups += int(planes._bits_of(payload[payload > 0]).sum())
    expected = size * keys * 2.0**-20
    # 16 bits alone would give 16 times as many
    assert abs(ups - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("name", WAYS)
def test_ties(name: str, way: Callable[[str], None]) -> None:
    """All elements tie: a quarter above the word, so that a quarter go up."""
    way(name)
    n = 5000
    g = (words(KEY, 0, n) + 0.25).float() / 65536
    up = TernGrad(clip=None).decode(TernGrad(clip=None).encode(g, 1.0, KEY), 1.0, n)
    assert torch.equal(up > 0, tie_words(KEY, 0, n) < 2**22)
    assert 0.22 < float(up.mean()) < 0.28


def test_shifted_dither() -> None:
    workers, n = 8, 20_000
    codec, g = TernGrad(clip=None), randn(n) * 0.3
    scale, noise = 1.5, {}
    g = g.clamp(-scale, scale)
    for kind in ("independent", "shifted"):
        payloads = [
            codec.encode(
                g,
                scale,
                Key(0, 0, r, 0) if kind == "independent" else Key(0, 0, r, 0).shared(),
                shift=0 if kind == "independent" else dither_shift(r, workers),
            )
            for r in range(workers)
        ]
        out = torch.empty(n)
        codec.decode_mean(payloads, [scale] * workers, out, workers)
        noise[kind] = float((out - g).square().sum())
    # equal gradients: the mean of the ranks is g to 1/N
    assert noise["shifted"] < 0.2 * noise["independent"]
    assert float((out - g).abs().max()) <= scale / workers + 1e-6


# ---- round trips and parity ----


@every_codec
def test_forms_agree(codec: GradCodec) -> None:
    for n in SIZES:
        g = randn(n, n)
        scale = codec.scale(g)
        found = []
        for form in codec.forms:
            payload = codec.encode(g, scale, KEY, form=form)
            most = codec.payload_bytes(n, form)
            assert payload.numel() == most or (form == "sparse" and payload.numel() <= most)
            found.append(codec.decode(payload, scale, n, form=form))
        assert all(same(found[0], other) for other in found)
        if isinstance(codec, QSGD) and codec.bucket:
            continue
        code = found[0] / scale * codec.levels if n else found[0]
        if not isinstance(codec, SignSGD):
            assert torch.allclose(code, code.round(), atol=1e-4)
            assert not n or code.abs().max() <= codec.levels + 1e-3


def hard(n: int, kind: str) -> Tensor:
    g = randn(n, n + 1)
    if kind == "zero":
        return torch.zeros(n) * g.sign()  # zeros of both signs
    if kind == "denormal":
        return g * 1e-41
    if kind == "huge":
        return (g * 1e38).clamp(-3.4e38, 3.4e38)
    if kind in ("nan", "inf"):
        g[n // 2] = math.nan if kind == "nan" else -math.inf
    if kind == "spread":
        return g * torch.exp2(-60 * torch.rand(n, generator=torch.Generator().manual_seed(n)))
    return g


def trace(codec: GradCodec, g: Tensor) -> list[Tensor]:
    """All that a back end computes."""
    n = g.numel()
    out = [*statistics(g), *statistics(g, absolute=True), codec.scale(g)]
    for scale, shift in itertools.product((codec.scale(g), 0.7), (0, 50_000)):
        for form in codec.forms:
            pays = [
                codec.encode(x, scale, Key(1, r, 2, 3), form=form, shift=shift)
                for r, x in enumerate((g, -g, g * 0.5))
            ]
            mean = torch.empty(n)
            codec.decode_mean(pays, [float(scale), 0.3, 2.0], mean, 3, forms=form)
            out += [*pays, mean]
            if not codec.sums:
                continue
            sums = codec.sum_codes(pays, n, forms=form)
            out.append(sums)
            bits = codec.sum_bits(3)
            for packing in ("planes", "sparse"):
                packed = codec.pack_sums(sums, bits, form=packing)
                mean = torch.empty(n)
                codec.decode_sums(packed, scale, n, bits, 3, mean, form=packing)
                out += [packed, mean]
    return out


@pytest.mark.skipif(len(WAYS) == 1, reason="no compiled kernel")
@every_codec
@pytest.mark.parametrize("kind", ["plain", "spread", "zero", "denormal", "huge", "nan", "inf"])
def test_back_ends_agree(codec: GradCodec, kind: str, way: Callable[[str], None]) -> None:
    for n in (1, 5, 64, 65, 325, 4097) if kind == "plain" else (325,):
        g = hard(n, kind)
        way("eager")
        oracle = trace(codec, g)
        for name in WAYS[1:]:
            way(name)
            assert all(same(a, b) for a, b in zip(oracle, trace(codec, g), strict=True))


@pytest.mark.skipif(len(WAYS) == 1, reason="no compiled kernel")
@pytest.mark.parametrize("codec", [TernGrad(), SQm(5), DoReFa(3)], ids=repr)
def test_threads_do_not_matter(codec: GradCodec, way: Callable[[str], None]) -> None:
    g = randn(3 * (1 << 17) + 77)
    before = torch.get_num_threads()
    try:
        found = {}
        for threads, name in ((1, "eager"), (1, "avx512"), (3, "avx512"), (2, "scalar")):
            torch.set_num_threads(threads)
            way(name)
            found[threads, name] = trace(codec, g) if name != "eager" else [codec.scale(g)]
    finally:
        torch.set_num_threads(before)
    assert same(found[1, "eager"][0], found[1, "avx512"][6])
    for other in ((3, "avx512"), (2, "scalar")):
        assert all(same(a, b) for a, b in zip(found[1, "avx512"], found[other], strict=True))


@pytest.mark.skipif(len(WAYS) == 1, reason="no compiled kernel")
def test_large_and_misaligned(way: Callable[[str], None]) -> None:
    """Stores past the cache, targets and payloads at odd places."""
    codec, n = TernGrad(), (1 << 21) + 13
    g = randn(n)
    scale = codec.scale(g)
    for form in codec.forms:
        payload = codec.encode(g, scale, KEY, form=form)
        odd = torch.empty(payload.numel() + 3, dtype=torch.uint8)[3:]
        odd.copy_(payload)
        target, aligned = torch.empty(n + 1)[1:], torch.empty(n)
        codec.decode_mean([odd, odd], [scale, 1.0], target, 2, forms=form)
        codec.decode_mean([payload, payload], [scale, 1.0], aligned, 2, forms=form)
        way("eager")
        oracle = torch.empty(n)
        codec.decode_mean([payload, payload], [scale, 1.0], oracle, 2, forms=form)
        way("avx512")
        assert same(oracle, target)
        assert same(oracle, aligned)


def test_statistics_order() -> None:
    g = randn(10_000)
    total, squares, largest = eager.statistics(g)
    assert float(total) == pytest.approx(math.fsum(g.tolist()), abs=1e-9)
    assert float(squares) == pytest.approx(math.fsum(x * x for x in g.tolist()), rel=1e-14)
    assert largest == g.abs().max()
    # one chunk, by hand: lanes in order, folded in halves
    lane = [0.0] * 16
    for e, x in enumerate(g[:4096].tolist()):
        lane[e % 16] += x
    for half in (8, 4, 2, 1):
        lane = [lane[i] + lane[i + half] for i in range(half)]
    assert float(eager.statistics(g[:4096])[0]) == lane[0]


# ---- scales and averages ----


def test_scales() -> None:
    g = torch.tensor([3.0, -1.0, -1.0, -1.0])  # mean 0, sigma sqrt(3)
    assert TernGrad(clip=None).scale(g) == 3
    assert TernGrad(clip=1.0).scale(g) == torch.tensor(math.sqrt(3))
    assert TernGrad(clip=2.5).scale(g) == 3  # max is smaller than 2.5 sigma
    assert TernGrad(clip=2.5, scaler="sigma").scale(g) == torch.tensor(2.5 * math.sqrt(3))
    assert TernGrad(clip=1.0).scale(g + 10) == torch.tensor(math.sqrt(3))  # about the mean
    assert TernGrad(clip=1.0).scale(torch.full((5,), 0.1)) == torch.tensor(0.1)
    assert TernGrad(clip=1.0, scaler="sigma").scale(torch.ones(1)) == 1
    assert SignSGD("mean").scale(g) == 1.5
    assert SignSGD().scale(g) == 1
    assert SignSGD().scale(torch.zeros(3)) == 0
    for codec in CODECS:
        assert codec.scale(torch.tensor([1.0, math.nan])).isnan()
        assert codec.scale(torch.tensor([1.0, math.inf])).isnan()
        assert codec.scale(torch.zeros(0)).isfinite()


@every_codec
def test_not_finite_arrives(codec: GradCodec) -> None:
    g = randn(100)
    fine, bad = codec.scale(g), math.nan
    payload = codec.encode(g, bad, KEY)
    out = torch.zeros(100)
    codec.decode_mean([codec.encode(g, fine, KEY), payload], [fine, bad], out, 2)
    assert out.isnan().all()
    if codec.sums:
        packed = codec.pack_sums(codec.sum_codes([payload], 100), codec.sum_bits(1))
        out.zero_()
        codec.decode_sums(packed, math.inf, 100, codec.sum_bits(1), 1, out)
        assert out.isnan().all()


@every_codec
def test_zero_stays_zero(codec: GradCodec) -> None:
    g = torch.zeros(70)
    assert codec.decode(codec.encode(g, codec.scale(g), KEY), codec.scale(g), 70).eq(0).all()


@every_codec
def test_mean_in_rank_order(codec: GradCodec) -> None:
    if isinstance(codec, SignSGD):
        pytest.skip("votes")
    grads = [randn(200, r) * 10.0**r for r in range(3)]
    scales = [codec.scale(g) for g in grads]
    payloads = [codec.encode(g, s, KEY) for g, s in zip(grads, scales, strict=True)]
    total = torch.zeros(200)
    for payload, scale in zip(payloads, scales, strict=True):
        total += codec.decode(payload, scale, 200)
    out = torch.empty(200)
    codec.decode_mean(payloads, scales, out, 3)
    assert same(out, total * torch.tensor(1 / 3))


@pytest.mark.parametrize("codec", [c for c in CODECS if c.sums], ids=repr)
def test_sums_are_exact(codec: GradCodec) -> None:
    workers, n = 5, 500
    scale = torch.tensor(3.0)
    payloads = [codec.encode(randn(n, r), scale, Key(0, 0, r, 0)) for r in range(workers)]
    sums = codec.sum_codes(payloads, n)
    values = sum(codec.decode(p, scale, n) for p in payloads)
    if not isinstance(codec, SignSGD):
        assert torch.allclose(sums * scale / codec.levels, values, rtol=1e-5, atol=1e-5)
    bits = codec.sum_bits(workers)
    for form in ("planes", "sparse"):
        packed = codec.pack_sums(sums, bits, form=form)
        back = planes.unpack_sums(packed, n, bits, form)
        assert torch.equal(back, sums.sign().int() if isinstance(codec, SignSGD) else sums.int())
        out = torch.empty(n)
        codec.decode_sums(packed, scale, n, bits, workers, out, form=form)
        factor = scale if isinstance(codec, SignSGD) else scale / float(codec.levels * workers)
        assert same(out, back.float() * factor)


def test_bits_of_sums() -> None:
    assert [TernGrad().sum_bits(n) for n in (1, 2, 3, 4, 7, 8)] == [2, 3, 3, 4, 4, 5]
    assert SQm(4).sum_bits(2) == 5
    assert SignSGD().sum_bits(100) == 2
    full = torch.tensor([8, -8], dtype=torch.int8)
    for form in ("planes", "sparse"):
        packed = TernGrad().pack_sums(full, 5, form=form)
        assert planes.unpack_sums(packed, 2, 5, form).tolist() == [8, -8]


def test_sparse_sums_are_small() -> None:
    """Eight independent gradients under one scale: fewer than 4 bits a sum, not 5."""
    grads = [randn(64_000, r) for r in range(8)]
    scale = 2.5
    payloads = [TernGrad().encode(g, scale, Key(0, 0, r, 0)) for r, g in enumerate(grads)]
    packed = TernGrad().pack_sums(TernGrad().sum_codes(payloads, 64_000), 5, form="sparse")
    assert packed.numel() * 8 / 64_000 < 4.2


def test_majority() -> None:
    codec = SignSGD()
    grads = torch.tensor([[1.0, 1.0, -1.0, 1.0], [1.0, -1.0, -1.0, -1.0], [1.0, 1.0, -1.0, -2.0]])
    payloads = [codec.encode(g, 1.0, KEY) for g in grads]
    out = torch.empty(4)
    codec.decode_mean(payloads, [1.0, 1.0, 1.0], out, 3)
    assert out.tolist() == [1.0, 1.0, -1.0, -1.0]
    codec.decode_mean(payloads[:2], [3.0, 1.0], out, 2)  # ties give 0; the scale is the mean
    assert out.tolist() == [2.0, 0.0, -2.0, 0.0]


def test_smallest() -> None:
    codec = TernGrad(clip=None)
    few = torch.zeros(1000)
    few[0] = 1
    payload, form = codec.encode_smallest(few, 1.0, KEY)
    assert (form, payload.numel()) == ("sparse", 8 * 16 + 8)
    many = torch.ones(1024)
    payload, form = codec.encode_smallest(many, 1.0, KEY)
    assert (form, payload.numel()) == ("planes", 16 * 16)
    assert SignSGD().encode_smallest(many, 1.0, KEY)[1] == "planes"


# ---- hostile bytes and arguments ----


def refuses(codec: GradCodec, payload: Tensor, n: int, form: str) -> None:
    out = torch.full((n,), 5.0)
    with pytest.raises(FormatError):
        codec.decode_mean([payload], [1.0], out, 1, forms=form)
    assert out.eq(5).all()


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("codec", [TernGrad(clip=None), SQm(4), DoReFa(3), SignSGD()], ids=repr)
def test_hostile(codec: GradCodec, name: str, way: Callable[[str], None]) -> None:
    way(name)
    n = 70
    for form in codec.forms:
        good = codec.encode(randn(n), 4.0, KEY, form=form)
        refuses(codec, good[:-1], n, form)
        refuses(codec, good[:0], n, form)
        refuses(codec, torch.cat([good, good[:8]]), n, form)
        refuses(codec, torch.cat([good, good]), n, form)
        for spot in range(len(good)):
            bad = good.clone()
            bad[spot] |= 0xF0
            with contextlib.suppress(FormatError):
                codec.decode(bad, 1.0, n, form=form)
        if form != "base3":
            last = good.clone()
            last[-1] |= 128
            refuses(codec, last, n, form)


@pytest.mark.parametrize("name", WAYS)
def test_hostile_base3(name: str, way: Callable[[str], None]) -> None:
    way(name)
    codec = TernGrad(clip=None)
    for n in (1, 4, 321, 640):
        good = codec.encode(randn(n), 4.0, KEY, form="base3")
        bad = good.clone()
        bad[-1] = 243
        refuses(codec, bad, n, "base3")
        if n % 5:
            bad[-1] = 0  # the digits past the end are then -1
            refuses(codec, bad, n, "base3")


@pytest.mark.parametrize("name", WAYS)
@given(data=st.binary(max_size=80), n=st.integers(0, 200), bits=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_any_bytes(name: str, data: bytes, n: int, bits: int) -> None:
    """Bytes of any kind give a result or FormatError, the same from all back ends."""
    payload = torch.tensor(list(data), dtype=torch.uint8)

    def run(one: str) -> list[object]:
        patch = pytest.MonkeyPatch()
        patch.setenv("GOSSAMER_NATIVE", "0" if one == "eager" else "1")
        patch.setenv("GOSSAMER_ISA", one)
        found: list[object] = []
        for codec in (TernGrad(), SQm(3), DoReFa(2)):
            for form in codec.forms:
                try:
                    found.append(codec.decode(payload, 1.0, n, form=form).tolist())
                except FormatError:
                    found.append("refused")
            for form in ("planes", "sparse"):
                out = torch.empty(n)
                try:
                    codec.decode_sums(payload, 1.0, n, bits, 2, out, form=form)
                    found.append(out.tolist())
                except FormatError:
                    found.append("refused")
        patch.undo()
        return found

    assert run(name) == run("eager")


def test_arguments() -> None:
    codec, g = TernGrad(), randn(10)
    for bad in (g.double(), g.half(), randn(20)[::2], torch.ones(10, dtype=torch.int32)):
        with pytest.raises(ArgumentError, match="float32"):
            codec.scale(bad)
        with pytest.raises(ArgumentError, match="float32"):
            codec.encode(bad, 1.0, KEY)
    with pytest.raises(ArgumentError, match="form"):
        SQm(4).encode(g, 1.0, KEY, form="base3")
    with pytest.raises(ArgumentError, match="shift"):
        codec.encode(g, 1.0, KEY, shift=65536)
    with pytest.raises(ArgumentError, match="out"):
        codec.encode(g, 1.0, KEY, out=torch.empty(8, dtype=torch.uint8))
    payload = codec.encode(g, 1.0, KEY)
    with pytest.raises(ArgumentError, match="scale"):
        codec.decode_mean([payload], [1.0, 2.0], torch.empty(10), 1)
    with pytest.raises(ArgumentError, match="payloads is empty"):
        codec.decode_mean([], [], torch.empty(10), 1)
    with pytest.raises(ArgumentError, match="forms"):
        codec.decode_mean([payload], [1.0], torch.empty(10), 1, forms=["planes", "planes"])
    with pytest.raises(ArgumentError, match="uint8"):
        codec.decode(payload.int(), 1.0, 10)
    with pytest.raises(ArgumentError, match="no exact sums"):
        QSGD(4, bucket=64).sum_codes([payload], 10)
    for make in (
        lambda: TernGrad(clip=0.0),
        lambda: TernGrad(clip=None, scaler="sigma"),
        lambda: TernGrad(scaler="mean"),
        lambda: SQm(1),
        lambda: SQm(9),
        lambda: QSGD(0),
        lambda: QSGD(4, bucket=100),
        lambda: SignSGD("sum"),
        lambda: DoReFa(0),
        lambda: Key(-1, 0, 0, 0),
        lambda: Key(0, 0, 0, 2**64),
        lambda: dither_shift(4, 4),
        lambda: by_name("sq9"),
        lambda: by_name("top-k"),
        lambda: planes.payload_bytes(5, 1, "gzip"),
    ):
        with pytest.raises(ArgumentError):
            make()


def test_names() -> None:
    for codec in CODECS:
        assert type(by_name(codec.name)) is type(codec)
    assert len({type(c).id for c in CODECS}) == len({type(c) for c in CODECS})


@pytest.mark.parametrize("clip", [-1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "codec", [lambda clip: SQm(4, clip=clip), lambda clip: TernGrad(clip=clip)]
)
def test_a_clip_that_keeps_nothing_is_refused(codec, clip):
    with pytest.raises(ArgumentError, match="clip"):
        codec(clip)


def test_the_default_clip_is_the_papers_two_and_a_half_deviations():
    # 99 zeros and a 1: mean .01, variance .01 - .0001, so the scale is 2.5 sqrt(.0099), below 1
    g = torch.zeros(100)
    g[7] = 1.0
    assert TernGrad().clip == 2.5
    assert TernGrad().scale(g) == pytest.approx(2.5 * math.sqrt(0.0099), rel=1e-6)
    assert SQm(4).clip is None
    assert SQm(4).scale(g) == 1
