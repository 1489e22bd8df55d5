"""What a step costs on N workers: a model of exchange and compute with measured constants.

Wen et al., *TernGrad*, NeurIPS 2017, section 6 extrapolates a profile of one machine to many; so
does this. A step is compute, then codec work and wire time, which overlap as buckets follow one
another, then the rounds' latency::

    step = compute + max(work, wire) + min(work, wire) / buckets + rounds * buckets * latency

Bytes over the busiest link, a parameter, with b bits a code and s = log2(2 N L + 1) bits a sum of
N codes of L levels (float: b = s = 32):

    ring        2 (N-1)/N * 4            float only: reduce-scatter, all-gather
    all_gather  (N-1) b / 8
    two_phase   (N-1)/N (b + s) / 8      codes to the owner of a part, its exact sums to all
    server      (N-1) (b + s) / 8        gather, sum, broadcast: the server's own link

Compute is 6 operations a multiply-accumulate and example (forward 2, backward 4) at the measured
rate. Deviations: backward and exchange do not overlap here, while DDP lets a part of them; links
are full duplex and none is shared; a convolution's parameter counts as a fully-connected one's on
the wire, and differs in how often an example uses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gossamer.core.errors import ArgumentError

__all__ = ["NETWORKS", "TOPOLOGIES", "Constants", "Network", "Scheme", "mixed", "speed_up"]

TOPOLOGIES = ("ring", "all_gather", "two_phase", "server")


@dataclass(frozen=True)
class Constants:
    """What is measured on a machine and a link.

    Attributes:
        encode: seconds an element, scale included.
        decode: seconds an element of one payload's mean, as often as payloads arrive.
        add: seconds an element of float sums.
        sum: seconds an element of one payload's exact sum, as often as payloads arrive.
        pack: seconds an element of writing sums.
        unpack: seconds an element of sums' mean.
        bandwidth: bytes a second, each way.
        latency: seconds a round of messages.
        rate: floating-point operations a second of forward and backward.
        buckets: messages that a step's gradients are cut into.

    Raises :class:`ArgumentError` for values that are negative or not finite, and a bandwidth or
    rate of 0.
    """

    encode: float
    decode: float
    add: float
    bandwidth: float
    latency: float
    rate: float
    buckets: int
    sum: float
    pack: float
    unpack: float

    def __post_init__(self) -> None:
        nonnegative = ("encode", "decode", "add", "sum", "pack", "unpack", "latency")
        for name in (*nonnegative, "bandwidth", "rate"):
            value = getattr(self, name)
            least = "more than 0" if name in ("bandwidth", "rate") else "at least 0"
            if not math.isfinite(value) or value < 0 or (value == 0 and least != "at least 0"):
                raise ArgumentError(f"{name}={value} must be finite and {least}")
        if self.buckets < 1:
            raise ArgumentError(f"buckets={self.buckets} must be at least 1")


@dataclass(frozen=True)
class Network:
    """A network's parameters and what one example costs.

    Attributes:
        conv, dense: parameters of convolutions and of fully-connected layers, biases included.
        conv_macs, dense_macs: multiply-accumulates of one example's forward pass.
        batch: examples a worker and step.
    """

    name: str
    conv: int
    dense: int
    conv_macs: int
    dense_macs: int
    batch: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.conv + self.dense

    def compute(self, constants: Constants) -> float:
        """Seconds of forward and backward of a step."""
        return 6 * self.batch * (self.conv_macs + self.dense_macs) / constants.rate


@dataclass(frozen=True)
class Scheme:
    """How gradients are exchanged.

    Attributes:
        topology: of :data:`TOPOLOGIES`.
        bits: b, on average; 32 for float.
        levels: L of the codes; 0 for float.
        sum_bits: bits of a sum; None: log2(2 N L + 1), which an entropy coder approaches.

    Raises :class:`ArgumentError` for an unknown topology, bits not above 0, codes in a ring.
    """

    name: str
    topology: str
    bits: float
    levels: int
    sum_bits: float | None = None

    def __post_init__(self) -> None:
        if self.topology not in TOPOLOGIES:
            raise ArgumentError(f"topology {self.topology!r} is not one of {', '.join(TOPOLOGIES)}")
        if not self.bits > 0 or self.levels < 0:
            raise ArgumentError(
                f"bits={self.bits} must be more than 0, levels={self.levels} at least 0"
            )
        if self.topology == "ring" and self.levels:
            raise ArgumentError(
                "sums of codes outgrow their bits on the way round a ring; use two_phase"
            )

    def bytes(self, workers: int) -> float:
        """Bytes a parameter over the busiest link, one way, each step.

        >>> round(Scheme("float", "ring", 32, 0).bytes(8), 2)
        7.0
        >>> round(Scheme("terngrad", "two_phase", 1.32, 1).bytes(8), 3)
        0.591
        """
        others = _others(workers)
        if self.topology == "ring":
            return 2 * others / workers * self.bits / 8
        if self.topology == "all_gather":
            return others * self.bits / 8
        sums = self.sum_bits
        if sums is None:
            sums = math.log2(2 * workers * self.levels + 1) if self.levels else self.bits
        both = others * (self.bits + sums) / 8
        return both / workers if self.topology == "two_phase" else both

    def rounds(self, workers: int) -> int:
        """Messages one after the other."""
        others = _others(workers)
        if self.topology == "server":
            return 2
        return others if self.topology == "all_gather" else 2 * others

    def work(self, workers: int, constants: Constants) -> float:
        """Seconds an element of encoding, decoding and adding, on the busiest worker."""
        others = _others(workers)
        share = 1 if self.topology == "server" else 1 / workers
        if not self.levels:
            return others * share * constants.add
        if self.topology == "all_gather":
            return constants.encode + workers * constants.decode
        # every payload of its own part, then the sums of all parts
        sums = share * (workers * constants.sum + constants.pack)
        return constants.encode + sums + constants.unpack

    def step(self, network: Network, workers: int, constants: Constants) -> float:
        """Seconds a step; one worker exchanges nothing."""
        compute = network.compute(constants)
        if workers == 1:
            return compute
        work = network.parameters * self.work(workers, constants)
        wire = network.parameters * self.bytes(workers) / constants.bandwidth
        waits = self.rounds(workers) * constants.buckets * constants.latency
        longer, shorter = max(work, wire), min(work, wire)
        return compute + longer + shorter / constants.buckets + waits


def _others(workers: int) -> int:
    if workers < 1:
        raise ArgumentError(f"workers={workers} must be at least 1")
    return workers - 1


def speed_up(
    scheme: Scheme, base: Scheme, network: Network, workers: int, constants: Constants
) -> float:
    """How many times faster a step is under ``scheme`` than under ``base``."""
    return base.step(network, workers, constants) / scheme.step(network, workers, constants)


def mixed(like: Network, share: float) -> Network:
    """A network of as many parameters, ``share`` of them fully connected.

    A convolution's parameter is used as often as the average one of ``like``, a fully-connected
    one once an example. Raises :class:`ArgumentError` for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ArgumentError(f"share={share} is outside [0, 1]")
    dense = round(share * like.parameters)
    conv = like.parameters - dense
    return replace(
        like,
        name=f"{100 * share:g} % fully connected",
        conv=conv,
        dense=dense,
        conv_macs=round(conv * like.conv_macs / like.conv),
        dense_macs=dense,
    )


def _network(
    name: str, convs: list[tuple[int, int, int, int]], dense: list[tuple[int, int]], batch: int
) -> Network:
    """From (inputs a group, outputs, kernel side, output side) and (inputs, outputs)."""
    return Network(
        name,
        conv=sum(i * o * k * k + o for i, o, k, _ in convs),
        dense=sum(i * o + o for i, o in dense),
        conv_macs=sum(i * o * k * k * side * side for i, o, k, side in convs),
        dense_macs=sum(i * o for i, o in dense),
        batch=batch,
    )


def _inception(
    side: int, i: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int
) -> list[tuple[int, int, int, int]]:
    """Szegedy et al. 2015, table 1: (reduced, out) of the 3 x 3 and 5 x 5 branches."""
    ones = [(i, out, 1, side) for out in (one, three[0], five[0], pool)]
    return [*ones, (*three, 3, side), (*five, 5, side)]


_GOOGLENET = [
    (3, 64, 7, 112), (64, 64, 1, 56), (64, 192, 3, 56),
    *_inception(28, 192, 64, (96, 128), (16, 32), 32),
    *_inception(28, 256, 128, (128, 192), (32, 96), 64),
    *_inception(14, 480, 192, (96, 208), (16, 48), 64),
    *_inception(14, 512, 160, (112, 224), (24, 64), 64),
    *_inception(14, 512, 128, (128, 256), (24, 64), 64),
    *_inception(14, 512, 112, (144, 288), (32, 64), 64),
    *_inception(14, 528, 256, (160, 320), (32, 128), 128),
    *_inception(7, 832, 256, (160, 320), (32, 128), 128),
    *_inception(7, 832, 384, (192, 384), (48, 128), 128),
]  # fmt: skip
_VGG_A = [
    (3, 64, 3, 224), (64, 128, 3, 112), (128, 256, 3, 56), (256, 256, 3, 56),
    (256, 512, 3, 28), (512, 512, 3, 28), (512, 512, 3, 14), (512, 512, 3, 14),
]  # fmt: skip
_ALEXNET = [
    (3, 96, 11, 55), (48, 256, 5, 27), (256, 384, 3, 13), (192, 384, 3, 13), (192, 256, 3, 13),
]  # fmt: skip

NETWORKS: dict[str, Network] = {
    n.name: n
    for n in (
        _network("alexnet", _ALEXNET, [(9216, 4096), (4096, 4096), (4096, 1000)], 64),
        _network("vgg-a", _VGG_A, [(25088, 4096), (4096, 4096), (4096, 1000)], 64),
        _network("googlenet", _GOOGLENET, [(1024, 1000)], 64),
    )
}
"""The paper's three, without GoogLeNet's auxiliary classifiers; 64 examples a worker."""
