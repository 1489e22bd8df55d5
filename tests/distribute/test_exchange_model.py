"""The performance model against the published bytes, networks against their layers, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from gossamer import nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.distribute.bench.performance import (
    NETWORKS,
    Constants,
    Network,
    Scheme,
    mixed,
    speed_up,
)

FLOAT = Scheme("float", "ring", 32, 0)
HALF = Scheme("fp16", "ring", 16, 0)
PLANES = Scheme("2-bit", "all_gather", 2, 1)
SPARSE = Scheme("1.32-bit", "all_gather", 1.32, 1)
PHASES = Scheme("two-phase", "two_phase", 1.32, 1)
SERVER = Scheme("server", "server", 1.32, 1)


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (2, (4.00, 2.00, 0.250, 0.165, 0.228)),
        (4, (6.00, 3.00, 0.750, 0.495, 0.421)),
        (8, (7.00, 3.50, 1.75, 1.16, 0.591)),
        (16, (7.50, 3.75, 3.75, 2.48, 0.746)),
        (32, (7.75, 3.88, 7.75, 5.12, 0.889)),
    ],
)
def test_bytes_a_parameter(workers: int, expected: tuple[float, ...]) -> None:
    schemes = (FLOAT, HALF, PLANES, SPARSE, PHASES)
    for scheme, wanted in zip(schemes, expected, strict=True):
        # printed to three figures
        assert scheme.bytes(workers) == pytest.approx(wanted, rel=6e-3), scheme.name


def test_bytes_of_servers_and_of_more_bits() -> None:
    # codes of three workers in, sums of four in log2 9 bits out to three
    assert SERVER.bytes(4) == pytest.approx(3 * (1.32 + math.log2(9)) / 8)
    # SQ3: 3 levels, sums of 8 workers in log2 49 bits
    three = Scheme("sq3", "two_phase", 3, 3)
    assert three.bytes(8) == pytest.approx(7 / 8 * (3 + math.log2(49)) / 8)
    assert replace(three, sum_bits=6).bytes(8) == pytest.approx(7 / 8 * 9 / 8)
    assert Scheme("float", "server", 32, 0).bytes(5) == 4 * 8


def test_a_step_by_hand() -> None:
    constants = Constants(
        encode=1e-9, decode=2e-9, add=3e-9, bandwidth=1e8, latency=1e-3, rate=6e9, buckets=4,
        sum=4e-9, pack=5e-9, unpack=6e-9,
    )  # fmt: skip
    network = Network("small", conv=10**6, dense=3 * 10**6, conv_macs=9, dense_macs=1, batch=10**8)
    assert network.compute(constants) == 1.0
    assert all(s.step(network, 1, constants) == 1.0 for s in (FLOAT, SPARSE, PHASES, SERVER))
    # 4e6 parameters, 6 B each at 1e8 B/s: .24 s; adding 3/4 of them: .009 s; 6 rounds, 4 buckets
    assert FLOAT.step(network, 4, constants) == pytest.approx(1 + 0.24 + 0.009 / 4 + 0.024)
    # work 4e6 (1 + 2 * 2) ns = .02 s; wire 4e6 * .165 / 1e8 = .0066 s; one round, 4 buckets
    assert SPARSE.step(network, 2, constants) == pytest.approx(1 + 0.02 + 0.0066 / 4 + 0.004)
    # 4 ranks: encode, sum a quarter of the codes of each, write that quarter, read all sums
    assert PHASES.work(4, constants) == pytest.approx(1e-9 + 4e-9 + 5e-9 / 4 + 6e-9)
    assert SERVER.work(4, constants) == pytest.approx(1e-9 + 4 * 4e-9 + 5e-9 + 6e-9)
    assert [s.rounds(4) for s in (FLOAT, SPARSE, PHASES, SERVER)] == [6, 3, 6, 2]
    found = speed_up(SPARSE, FLOAT, network, 2, constants)
    assert found == FLOAT.step(network, 2, constants) / SPARSE.step(network, 2, constants)


def test_networks_are_the_published_ones() -> None:
    model = nets.build("alexnet", seed=0)
    counts = {"conv": 0, "fc": 0}
    for name, p in names.parameters(model).items():
        counts["conv" if name.startswith("conv") else "fc"] += p.numel()
    alexnet = NETWORKS["alexnet"]
    assert (alexnet.conv, alexnet.dense) == (counts["conv"], counts["fc"])
    # Simonyan and Zisserman 2015, table 2: 133 M; Szegedy et al. 2015: 1.5 G operations
    assert NETWORKS["vgg-a"].parameters == 132_863_336
    assert NETWORKS["googlenet"].parameters == 6_998_552
    assert NETWORKS["googlenet"].conv_macs == pytest.approx(1.55e9, rel=0.05)
    assert NETWORKS["alexnet"].conv_macs == 665_784_864


def test_the_orders_of_the_paper() -> None:
    constants = Constants(
        encode=2e-10, decode=1e-10, add=3e-10, bandwidth=1.2e8, latency=1e-4, rate=8e10, buckets=8,
        sum=1e-10, pack=3e-10, unpack=3e-10,
    )  # fmt: skip
    fast = replace(constants, bandwidth=1.2e9)
    for network in NETWORKS.values():
        by_workers = [speed_up(PHASES, FLOAT, network, n, constants) for n in (2, 4, 8)]
        assert all(a < b for a, b in pairwise(by_workers))
        for n in (2, 4, 8, 64):
            slow, quick = (speed_up(PHASES, FLOAT, network, n, c) for c in (constants, fast))
            assert slow > quick
    shares = [
        speed_up(PHASES, FLOAT, mixed(NETWORKS["alexnet"], share), 8, constants)
        for share in (0, 0.5, 0.9, 1)
    ]
    assert all(a < b for a, b in pairwise(shares))


def test_mixed_keeps_parameters() -> None:
    half = mixed(NETWORKS["alexnet"], 0.5)
    assert half.parameters == NETWORKS["alexnet"].parameters
    own = NETWORKS["alexnet"].dense / NETWORKS["alexnet"].parameters
    assert mixed(NETWORKS["alexnet"], own).conv == NETWORKS["alexnet"].conv


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="topology 'star'"):
        Scheme("x", "star", 2, 1)
    with pytest.raises(ArgumentError, match="ring"):
        Scheme("x", "ring", 2, 1)
    with pytest.raises(ArgumentError, match="bits=0"):
        Scheme("x", "server", 0, 1)
    with pytest.raises(ArgumentError, match="workers=0"):
        FLOAT.bytes(0)
    with pytest.raises(ArgumentError, match=r"share=1\.5"):
        mixed(NETWORKS["alexnet"], 1.5)
    times = ("encode", "decode", "add", "sum", "pack", "unpack", "latency")
    good = {**dict.fromkeys(times, 0.0), "bandwidth": 1.0, "rate": 1.0}
    for change in ({"bandwidth": 0.0}, {"rate": math.inf}, {"encode": -1.0}, {"buckets": 0}):
        with pytest.raises(ArgumentError, match=f"{next(iter(change))}="):
            Constants(**({**good, "buckets": 1} | change))  # type: ignore[arg-type]
