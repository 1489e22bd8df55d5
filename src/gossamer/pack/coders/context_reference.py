"""The context coder in plain Python: the specification of ``native/context.cpp``, bit for bit.

Each entry is a zero flag, then a magnitude (a unary bucket and the bits inside it), then a sign.
Every decision's probability is a logistic mix (Mahoney, "Adaptive weighing of context models for
lossless data compression", 2005) of adaptive counters and of direct estimates: densities and mean
magnitudes of the row, the column, the input channel and the kernel position, the neighbours, and
the earlier rows whose signs agreed so far. Integers only, so that every machine gets the same bits.

Probabilities are in units of 2^-16, stretched ones (ln(p / (1 - p))) in 1/256 nat, mixing weights
in 2^-16 and at most 2^12 either way. A counter holds its probability in 22 bits and how many bits
it saw (up to 1023).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from gossamer.pack.coders.binary_range import Coder, Decoder, Encoder

__all__ = ["decode", "encode"]

EDGE = 3071
POSITIONS = 64
ROWS = 1024
LOOKS = 256
ONE = 1 << 31
HEAVY = 1 << 28


@dataclass(frozen=True)
class Preset:
    """What was tuned: priors in entries, weights in 1/64, rates in 2^-20."""

    zero_rate: int = 12
    zero_boost: int = 117
    zero_first: int = 6
    row_prior: int = 20
    col_prior: int = 24
    channel_prior: int = 1
    position_prior: int = 257
    current_prior: int = 3
    near_prior: int = 36
    row_weight: int = 23
    col_weight: int = 11
    channel_weight: int = 10
    position_weight: int = 18
    current_weight: int = 5
    near_weight: int = 3
    zero_cell: int = 5
    guess_weight: int = 48
    sign_rate: int = 14
    sign_boost: int = 667
    sign_first: int = 3
    sign_cell: int = 4
    own_flat: int = 180
    own_slope: int = 139
    near_flat: int = 37
    near_slope: int = 249
    size_rate: int = 122
    size_boost: int = 364
    size_first: int = 8
    size_cell: int = 4
    mean_weight: int = 20
    mean_prior: int = 1
    agree_prior: int = 20
    agree_scale: int = 4


@cache
def _curves() -> tuple[list[int], list[int]]:
    """Stretch by probability, and squash by stretched value + EDGE."""
    squash = [0] * (2 * EDGE + 1)
    e = ONE
    for x in range(EDGE + 1):
        p = min((ONE << 16) // (ONE + e), 65535)
        squash[EDGE + x] = p
        squash[EDGE - x] = max(65536 - p, 1)
        e = (e * 2139111403 + (ONE >> 1)) >> 31
    stretch: list[int] = []
    for x in range(-EDGE, EDGE + 1):
        stretch += [x] * (squash[EDGE + x] + 1 - len(stretch))
    return stretch + [EDGE] * (65536 - len(stretch)), squash


def encode(
    ranks: Sequence[int], rows: int, cols: int, kernel: int, stride: int, largest: int
) -> bytes:
    """Code ``rows * cols`` ranks, row-major, of magnitudes up to ``largest``.

    ``kernel`` entries of each row belong to one input channel; entries ``stride`` apart are above
    each other in the kernel (or in the picture that a row is, when ``kernel`` is 1).
    """
    coder = Encoder()
    _Model(coder, rows, cols, kernel, stride, largest).run(list(ranks))
    return coder.finish()


def decode(data: bytes, rows: int, cols: int, kernel: int, stride: int, largest: int) -> list[int]:
    """The ranks of :func:`encode`; :class:`FormatError` when ``data`` has another length."""
    coder, ranks = Decoder(data), [0] * (rows * cols)
    _Model(coder, rows, cols, kernel, stride, largest).run(ranks)
    coder.finish()
    return ranks


def _bucket(m: int) -> int:
    """0..7 each alone, then four buckets an octave."""
    if m < 8:
        return m
    e = m.bit_length() - 1
    return 8 + (e - 3) * 4 + (m >> e - 2 & 3)


def _clamp(x: int, low: int, high: int) -> int:
    return low if x < low else high if x > high else x


def _band(x: int, shift: int, half: int) -> int:
    return _clamp((x >> shift) + half, 0, 2 * half - 1)


def _share(count: int, of: int, prior: int, p: int) -> int:
    return _clamp((count * 65536 + prior * p) // (of + prior), 1, 65535)


def _sign3(v: int) -> int:
    return 0 if v == 0 else 1 if v < 0 else 2


class _Mixer:
    """Two sets of weights, one for all decisions and one by context, their outputs averaged."""

    def __init__(self, sets: int, weights: Sequence[int]) -> None:
        self.all = [w * 1024 for w in weights]
        self.by = [list(self.all) for _ in range(sets)]


class _Model:
    def __init__(
        self,
        coder: Coder,
        rows: int,
        cols: int,
        kernel: int,
        stride: int,
        largest: int,
    ) -> None:
        self.coder, self.s = coder, Preset()
        self.rows, self.cols, self.kernel, self.stride = rows, cols, kernel, stride
        self.largest, self.last_bucket = largest, _bucket(largest - 1)
        self.stretch, self.squash = _curves()
        s, conv, channels = self.s, int(kernel > 1), cols // kernel
        self.channels = channels
        self.col_count = [0] * (cols + 2 * stride)
        self.col_sum = [0] * cols
        self.channel_count, self.channel_sum = [0] * channels, [0] * channels
        self.position_count = [0] * kernel
        self.columns: list[list[tuple[int, int]]] = [[] for _ in range(cols)]
        self.cells: dict[tuple[int | str, ...], list[int]] = {}
        weights = [s.row_weight, s.col_weight, s.channel_weight]
        weights += [conv * s.position_weight, conv * s.current_weight]
        weights += [s.near_weight, 0, s.guess_weight, 0]
        self.zero = _Mixer(POSITIONS, weights + [s.zero_cell] * 7)
        self.sign = _Mixer(POSITIONS, [0] * 16 + [s.sign_cell] * 7)
        self.size = _Mixer(self.last_bucket + 1, [s.mean_weight] * 3 + [0] * 3 + [s.size_cell] * 10)
        self.count = self.sum = self.steps = self.guess_mean = 0

    # A decision: begin, inputs and cells, decide.

    def begin(self, p: int) -> None:
        self.p, self.base = p, self.stretch[p]
        self.x: list[int] = []
        self.used: list[list[int]] = []

    def cell(self, *key: int | str) -> None:
        """A counter enters as its difference from the base estimate, and starts there."""
        c = self.cells.setdefault(key, [self.p << 6, 0])
        self.used.append(c)
        trust = 512 * c[1] // (2 * c[1] + 3)
        self.x.append((self.stretch[c[0] >> 6] - self.base) * trust >> 8)

    def decide(self, bit: int, mixer: _Mixer, which: int, rate: int, first: int) -> int:
        x, sets = self.x, (mixer.all, mixer.by[which])
        dots = [self.base + (sum(map(int.__mul__, w, x)) >> 16) for w in sets]
        bit = self.coder.code(bit, self.p_of(sum(dots) >> 1))
        for w, dot in zip(sets, dots, strict=True):
            e = ((bit << 16) - self.p_of(dot)) * rate
            for i, xi in enumerate(x):
                w[i] = _clamp(w[i] + ((e * xi + 524288) >> 20), -HEAVY, HEAVY)
        for c in self.used:
            self.adapt(bit, first, c)
        return bit

    def p_of(self, x: int) -> int:
        return self.squash[_clamp(x, -EDGE, EDGE) + EDGE]

    @staticmethod
    def adapt(bit: int, first: int, c: list[int]) -> None:
        c[0] += ((4194303 if bit else 0) - c[0]) * (131072 // (2 * c[1] + first + 2)) >> 16
        c[1] = min(c[1] + 1, 1023)

    def pull(self, v: int) -> int:
        """A neighbour's value, scaled by the mean magnitude; negative values count up."""
        if not v:
            return 0
        z = min(768, self.s.near_flat + abs(v) * self.s.near_slope // self.scale)
        return z if v < 0 else -z

    def run(self, ranks: list[int]) -> None:
        """Code ``ranks`` (row-major); a decoder overwrites them, reading only what it wrote."""
        for y in range(self.rows):
            self.y = y
            self.row_count = self.row_sum = self.row_sign = 0
            self.recent_sum = self.recent_count = self.gap = self.last = 0
            self.agree: dict[int, int] = defaultdict(int)  # by earlier row
            for x in range(self.cols):
                self.entry(ranks, y * self.cols + x, x)

    def entry(self, r: list[int], at: int, x: int) -> None:
        s, y, cols, stride = self.s, self.y, self.cols, self.stride
        channel, k = divmod(x, self.kernel)
        kq = min(k, POSITIONS - 1)
        if k == 0:
            self.current = self.current_sum = 0
        W, WW = r[at - 1] if x > 0 else 0, r[at - 2] if x > 1 else 0
        U = r[at - stride] if x >= stride else 0
        back = self.kernel if self.kernel > 1 else stride + 1
        C = r[at - back] if x >= back else 0
        N = r[at - cols] if y > 0 else 0
        NW = r[at - cols - 1] if y > 0 and x > 0 else 0
        NE = r[at - cols + 1] if y > 0 and x + 1 < cols else 0
        NN = r[at - 2 * cols] if y > 1 else 0

        # What the neighbours' signed values, weighted as the sign mixer has learnt, say of this.
        self.scale = self.sum * 2 // (self.count + 1) + 2
        offsets = [1, stride, stride + 1, stride - 1, 8 if stride == 3 else 2]
        offsets += [2 * stride, 2 * stride + 1, 2 * stride - 1]
        reach = k if self.kernel > 1 else x
        near = [
            self.pull(r[at - o]) if o <= reach and (stride > 1 or j in (0, 4)) else 0
            for j, o in enumerate(offsets)
        ]
        near += [self.pull(v) for v in (C if self.kernel > 1 else 0, N, NW, NE, NN)]
        pairs = zip(near, self.sign.all, self.sign.by[kq], strict=False)
        guess = min(1024, abs(sum((a + b) * v for v, a, b in pairs) >> 17))
        surprise = guess - (self.guess_mean >> 8)
        self.guess_mean += ((guess << 8) - self.guess_mean) >> 7

        # What earlier rows say that agreed, or disagreed, with this row's signs so far.
        looked = [e for e in self.columns[x][-LOOKS:] if y - e[0] < ROWS]
        vote = sum(self.agree[row] if negative else -self.agree[row] for row, negative in looked)
        size = abs(vote) * 256 * s.agree_scale // (self.row_count + s.agree_prior)
        votes, vote_size = min(size, 2000), min(size, 1000)

        n = y * cols + x
        g = _clamp((self.count * 65536 + 32768) // (n + 1), 8, 65535)
        self.begin(g)
        of_channel, of_position = y * self.kernel + k, y * self.channels + channel
        c = self.col_count
        around = c[x + stride - 1] + c[x + stride + 1] + c[x] + c[x + 2 * stride]
        shares = (
            _share(self.row_count, x, s.row_prior, g),
            _share(c[x + stride], y, s.col_prior, g),
            _share(self.channel_count[channel], of_channel, s.channel_prior, g),
            _share(self.position_count[k], of_position, s.position_prior, g),
            _share(self.current, k, s.current_prior, g),
            _share(around, 4 * y + 2, s.near_prior, g),
        )
        er, ec, ei, ek, eu, en = (self.stretch[p] - self.base for p in shares)
        self.x += [er, ec, ei, ek, eu, en, 64, surprise, vote_size]
        qr, qc, qi, qn = (_band(e, 7, 8) for e in (er, ec, ei, en))
        beside = (W != 0, WW != 0, N != 0, U != 0)
        self.cell("row column", qr, qc)
        self.cell("channel row", qi, qr)
        self.cell("beside", kq, *beside)
        self.cell("kernel", _band(eu, 7, 4), kq, qr)
        self.cell("gap", min(self.gap, 63))
        self.cell("beside near", *beside, C != 0, qn)
        self.cell("near column", qn, qc)
        rate = s.zero_rate + s.zero_boost * 64 // (64 + (n >> 4))
        if not self.decide(int(r[at] != 0), self.zero, kq, rate, s.zero_first):
            r[at] = 0
            self.gap += 1
            return

        hints = (surprise, vote_size, guess)
        m = self.magnitude(abs(r[at]) - 1, x, channel, kq, hints, (W, N, U, C))

        self.begin(32768)
        own = s.own_flat + min(1024, s.own_slope * (m + 1) // self.scale)
        lean = min(1024, abs(self.row_sign) * 512 // (self.row_count + 4))
        self.x += [v * own >> 7 for v in near]
        self.x += [lean if self.row_sign < 0 else -lean, 32, -votes if vote < 0 else votes]
        self.cell("sign left", _sign3(W), _sign3(WW))
        self.cell("sign above", _sign3(N), _sign3(W), _sign3(NN))
        self.cell("sign kernel", _sign3(U), _sign3(C), _sign3(W))
        self.cell("sign position", kq)
        self.cell("sign last", self.last)
        b = _bucket(m)
        self.cell("sign size", b)
        self.cell("sign column", x)
        rate = s.sign_rate + s.sign_boost * 64 // (64 + (self.count >> 2))
        negative = self.decide(int(r[at] < 0), self.sign, kq, rate, s.sign_first)
        r[at] = -(m + 1) if negative else m + 1
        for row, other in looked:
            self.agree[row] += 1 if other == negative else -1
        self.columns[x].append((y, negative))
        self.count += 1
        self.sum += b
        self.row_count += 1
        self.row_sum += b
        self.col_count[x + stride] += 1
        self.col_sum[x] += b
        self.channel_count[channel] += 1
        self.channel_sum[channel] += b
        self.position_count[k] += 1
        self.current += 1
        self.current_sum += b
        self.recent_sum += b * 32 - (self.recent_sum >> 3)
        self.recent_count += 32 - (self.recent_count >> 3)
        self.row_sign += -1 if negative else 1
        self.last, self.gap = negative + 1, 0

    def magnitude(
        self,
        m: int,
        x: int,
        channel: int,
        kq: int,
        hints: tuple[int, int, int],
        beside: tuple[int, int, int, int],
    ) -> int:
        s, (surprise, vote_size, guess) = self.s, hints
        mean, p = (self.sum * 16 + 16) // (self.count + 1), s.mean_prior  # of buckets, times 16
        columns = self.col_count[x + self.stride]
        means = (
            (self.row_sum * 16 + p * mean) // (self.row_count + p),
            (self.col_sum[x] * 16 + p * mean) // (columns + p),
            (self.channel_sum[channel] * 16 + p * mean) // (self.channel_count[channel] + p),
            (self.recent_sum + 32 * mean) // (self.recent_count + 32),
            (self.current_sum * 16 + 2 * mean) // (self.current + 2),
        )
        excess = [min((a + 8) * 256 // (mean + 8) - 256, 512) for a in means[:3]]
        a, d, b, f, h = (_clamp(((v + 8) * 16 // (mean + 8) >> 1) - 4, 0, 7) for v in means)
        W, N, U, C = (
            min(3, _bucket(abs(z) - 1) * 32 // (mean + 8) + 1) if z else 0 for z in beside
        )
        want, got = _bucket(m), 0
        while got < self.last_bucket:
            start = self.cells[("base", got - 1)][0] >> 6 << 6 if got else 32768 << 6
            base = self.cells.setdefault(("base", got), [start, 0])
            if not base[1]:
                base[0] = start
            self.begin(base[0] >> 6)
            self.x += [*excess, 32, surprise, vote_size]
            self.cell("row", got, a)
            self.cell("channel", got, b)
            self.cell("column", got, d)
            self.cell("recent", got, f)
            self.cell("current", got, h)
            self.cell("row column", got, a, d)
            self.cell("position", got, kq)
            self.cell("left above", got, W, N)
            self.cell("size kernel", got, U, C)
            self.cell("guess", got, min(15, guess >> 6))
            self.used.append(base)
            rate = s.size_rate + s.size_boost * 64 // (64 + (self.steps >> 2))
            self.steps += 1
            if not self.decide(int(want > got), self.size, got, rate, s.size_first):
                break
            got += 1
        if got < 8:
            return got
        value, node = 4 + (got - 8 & 3), 1
        for j in range((got - 8) // 4, -1, -1):
            if node < 8:
                c = self.cells.setdefault(("low", got, node), [32768 << 6, 0])
                bit = self.coder.code(m >> j & 1, _clamp(c[0] >> 6, 64, 65472))
                self.adapt(bit, s.size_first, c)
                node = node * 2 + bit
            else:
                bit = self.coder.code(m >> j & 1, 32768)
            value = value * 2 + bit
        return min(value, self.largest - 1)
