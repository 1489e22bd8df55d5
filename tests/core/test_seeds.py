"""The generator of initial values: known answers, a scalar oracle, statistics, and the pack."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer import nets
from gossamer.core.errors import ArgumentError
from gossamer.core.seeds import SCHEMES, Seed, fill, init_, inverse_normal, philox

# Random123's kat_vectors for philox4x32 10: counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "out"), KNOWN)
def test_philox_gives_the_published_answers(counter: str, key: str, out: str) -> None:
    # beside other counters, so that lanes do not mix
    columns = [np.array([word, 5, word], np.uint64) for word in words(counter)]
    k0, k1 = words(key)
    found = philox(columns, (k0, k1))
    assert found[0].tolist() == found[2].tolist() == words(out)
    assert found[1].tolist() != words(out)


# The oracle: docs/format.md in plain Python, one element at a time -----------------------------


def oracle_word(seed: int, stream: int, i: int) -> int:
    m32 = 0xFFFFFFFF
    c = [(i // 4) & m32, (i // 4) >> 32, stream & m32, stream >> 32]
    k = [seed & m32, seed >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & m32, a >> 32 ^ c[3] ^ k[1], a & m32]
        k = [(k[0] + 0x9E3779B9) & m32, (k[1] + 0xBB67AE85) & m32]
    return c[i % 4]


def horner(text: str, x: float) -> float:
    total = 0.0
    for c in reversed([float(c) for c in text.split()]):
        total = total * x + c
    return total


A = """3.3871328727963666080 133.14166789178437745 1971.5909503065514427 13731.693765509461125
    45921.953931549871457 67265.770927008700853 33430.575583588128105 2509.0809287301226727"""
B = """1 42.313330701600911252 687.18700749205790830 5394.1960214247511077 21213.794301586595867
    39307.895800092710610 28729.085735721942674 5226.4952788528545610"""
C = """1.42343711074968357734 4.63033784615654529590 5.76949722146069140550 3.64784832476320460504
    1.27045825245236838258 .241780725177450611770 .0227238449892691845833
    .000774545014278341407640"""
D = """1 2.05319162663775882187 1.67638483018380384940 .689767334985100004550
    .148103976427480074590 .0151986665636164571966 .000547593808499534494600
    .00000000105075007164441684324"""


def oracle_normal(u: float) -> float:
    q = u - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return q * horner(A, r) / horner(B, r)
    m, e = math.frexp(min(u, 1 - u))
    if m < 0.7071067811865476:
        m, e = 2 * m, e - 1
    s = (m - 1) / (m + 1)
    log = 2 * s * horner(" ".join(repr(1 / (2 * k + 1)) for k in range(12)), s * s)
    r = math.sqrt(-(log + e * 0.6931471805599453)) - 1.6
    return math.copysign(horner(C, r) / horner(D, r), q)


def oracle(seed: Seed, i: int) -> np.float32:
    u = (2 * oracle_word(seed.seed, seed.stream, i) + 1) / 2**33
    by = {"normal": oracle_normal(u), "uniform": 2 * u - 1, "signed_constant": 1 - 2 * (u < 0.5)}
    return np.float32(by[seed.scheme] * seed.scale) * np.float32(seed.factor)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_the_oracles_bit_for_bit(scheme) -> None:
    for seed in (
        Seed(scheme, 0, 0, 0.1),
        Seed(scheme, 2**64 - 1, 2**63 - 1, 2.0**-64, 2.0**-24),
        Seed(scheme, 0x0123456789ABCDEF, 3 << 33, 2.0**64, 1.7),
    ):
        values = seed.values((17_003,)).numpy()  # over a chunk, and no multiple of four
        expected = np.array([oracle(seed, i) for i in range(len(values))])
        assert values.dtype == np.float32
        assert values.tobytes() == expected.tobytes()
        assert np.isfinite(values).all()
        assert (np.abs(values) >= np.finfo(np.float32).tiny).all()


def test_values_never_change() -> None:
    # Bits, written down once: files hold seeds.
    found = {s: Seed(s, 42, 1, 0.05).values((6,)).view(torch.int32).tolist() for s in SCHEMES}
    assert found == FROZEN


FROZEN = {
    "normal": [-1108476394, -1117103560, -1122636545, 1021614405, -1117273895, 1039423434],
    "uniform": [-1119310322, -1122429301, -1126466100, 1017993833, -1122500431, 1028214832],
    "signed_constant": [-1119040307, -1119040307, -1119040307, 1028443341, -1119040307, 1028443341],
}


def test_the_inverse_normal_against_others() -> None:
    scipy = pytest.importorskip("scipy.special")
    rng = np.random.default_rng(0)
    k = np.concatenate(
        [rng.integers(0, 1 << 32, 200_000), np.arange(2000), 2**32 - 1 - np.arange(9)]
    )
    u = (2 * k.astype(np.float64) + 1) / 2**33
    u = np.concatenate([u, np.linspace(0.0749, 0.0751, 501), np.linspace(0.9249, 0.9251, 501)])
    z = inverse_normal(u)
    np.testing.assert_allclose(z, scipy.ndtri(u), rtol=1e-12, atol=1e-15)
    torch_z = math.sqrt(2) * torch.erfinv(2 * torch.from_numpy(u) - 1).numpy()
    middle = np.abs(u - 0.5) < 0.4999  # beyond, 2 u - 1 has no digits to spare
    np.testing.assert_allclose(z[middle], torch_z[middle], rtol=1e-10, atol=1e-12)
    inverse = NormalDist().inv_cdf  # AS 241 too, with the platform's logarithm
    np.testing.assert_allclose(z[::500], [inverse(x) for x in u[::500]], rtol=1e-13)
    # symmetric where 1 - u is exact, as it is for what is drawn
    drawn = u[: len(k)]
    np.testing.assert_array_equal(inverse_normal(1 - drawn), -z[: len(k)])


@pytest.mark.parametrize(
    ("scheme", "variance", "fourth"),
    [("normal", 1.0, 3.0), ("uniform", 1 / 3, 1 / 5), ("signed_constant", 1.0, 1.0)],
)
def test_moments_and_independence(scheme, variance: float, fourth: float) -> None:
    n = 400_000
    x = Seed(scheme, 9, 0, 1.0).values((n,)).double()
    assert abs(float(x.mean())) < 5 / n**0.5
    assert float(x.square().mean()) == pytest.approx(variance, abs=0.01)
    assert float(x.pow(4).mean()) == pytest.approx(fourth, rel=0.03)
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 5 / n**0.5
    for other in (Seed(scheme, 9, 1, 1.0), Seed(scheme, 10, 0, 1.0)):
        assert abs(float((x * other.values((n,)).double()).mean())) < 5 / n**0.5


def test_a_signed_constant_has_the_signs_of_the_others() -> None:
    a, b, c = (Seed(s, 5, 2, 1.0).values((1000,)) for s in SCHEMES)
    assert torch.equal(a.sign(), c)
    assert torch.equal(b.sign(), c)


def test_shapes_scalars_and_the_empty() -> None:
    seed = Seed("normal", 1, 0, 1.0)
    assert torch.equal(seed.values((3, 4, 5)).reshape(-1), seed.values((60,)))
    assert seed.values(()).shape == ()
    assert seed.values((0, 3)).shape == (0, 3)
    out = np.zeros(7, np.float32)
    fill(seed, out)
    assert torch.equal(torch.from_numpy(out), seed.values((60,))[:7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "gauss"}, "scheme 'gauss' is not one of normal"),
        ({"seed": -1}, r"seed=-1 .*below 2\*\*64"),
        ({"seed": 1 << 64}, "seed="),
        ({"seed": 1.0}, "seed=1.0 must be a whole number"),
        ({"stream": 1 << 63}, r"stream=.*below 2\*\*63"),
        ({"scale": 0.0}, r"scale=0.0 is outside 2\*\*-64 to 2\*\*64"),
        ({"scale": math.nan}, "scale=nan"),
        ({"scale": math.inf}, "scale=inf"),
        ({"factor": -1.0}, "factor=-1.0"),
        ({"factor": 2.0**25}, "factor="),
    ],
)
def test_bad_seeds(change: dict, message: str) -> None:
    good = {"scheme": "normal", "seed": 1, "stream": 0, "scale": 1.0, "factor": 1.0}
    with pytest.raises(ArgumentError, match=message):
        Seed(**{**good, **change})


@given(st.floats(2.0**-64, 2.0**64), st.floats(2.0**-24, 2.0**24))
@settings(max_examples=50)
def test_scale_and_factor_are_float32(scale: float, factor: float) -> None:
    seed = Seed("normal", 0, 0, scale, factor)
    assert seed.scale == np.float32(scale)
    assert seed.factor == np.float32(factor)
    assert Seed("normal", 0, 0, seed.scale, seed.factor) == seed


# A whole model ---------------------------------------------------------------------------------


def test_init_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))
    seeds = init_(net, 11)
    assert list(seeds) == ["0.weight", "3.weight"]
    assert [s.stream for s in seeds.values()] == [0, 1]
    assert seeds["0.weight"].scale == pytest.approx(math.sqrt(2 / (75 + 200)))
    assert seeds["3.weight"].scale == pytest.approx(math.sqrt(2 / 36))
    state = net.state_dict()
    for name, seed in seeds.items():
        assert torch.equal(state[name], seed.values(state[name].shape))
        assert not state[name.replace("weight", "bias")].any()
    assert state["1.weight"].eq(1).all()
    kaiming = init_(net, 11, scheme="uniform", fan="kaiming", include="3")
    assert kaiming["3.weight"].scale == pytest.approx(math.sqrt(3) * math.sqrt(2 / 32))
    assert torch.equal(net.state_dict()["0.weight"], state["0.weight"])


def test_the_same_seed_gives_the_same_model_and_another_another() -> None:
    def made(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        net = nets.build("lenet-300-100", seed=3)
        init_(net, seed)
        return torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    torch.rand(5)
    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))


def test_recurrent_and_attention_layers() -> None:
    net = nn.ModuleDict({"rnn": nn.LSTM(4, 6), "att": nn.MultiheadAttention(6, 2)})
    seeds = init_(net, 1)
    assert {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "att.in_proj_weight"} <= set(seeds)
    for name, p in net.named_parameters():
        if name in seeds:
            assert torch.equal(p.detach(), seeds[name].values(p.shape))
        else:
            assert "bias" in name
            assert not p.any()


def test_bad_models_are_left_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double())
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for call, message in (
        (lambda: init_(net, 1), "1.weight is torch.float64"),
        (lambda: init_(net, 1, include="0", fan="xavier"), "fan 'xavier'"),
        (lambda: init_(net, 1, include="0", scheme="x"), "scheme 'x'"),
        (lambda: init_(net, -1, include="0"), "seed=-1"),
        (lambda: init_(net, 1, include="0.bias"), "0.bias"),
        (lambda: init_(nn.ReLU(), 1), "no weight to initialise"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
