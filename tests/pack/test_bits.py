"""Fixed-width packing, and the small tables in front of coded symbols."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack.coders.bits import (
    BitReader,
    BitWriter,
    FixedWidth,
    golomb_best,
    golomb_widths,
    histogram,
    pack_bits,
    symbol_dtype,
    unpack_bits,
)
from gossamer.pack.coders.tables import (
    _POWERS,
    geometric_weights,
    log_weights,
    normalise,
    read_signed,
    read_used,
    write_signed,
    write_used,
)


@pytest.fixture(params=["0", "1"], ids=["numpy", "native"])
def native(request, monkeypatch):
    monkeypatch.setenv("GOSSAMER_NATIVE", request.param)


def test_nibbles_are_low_first(native):
    assert pack_bits(np.array([1, 2, 3], np.uint32), 4) == b"\x21\x03"
    assert unpack_bits(b"\x21\x03", 3, 4).tolist() == [1, 2, 3]


def test_three_bits_cross_bytes(native):
    # 7, 0, 5 are the bits 111 000 101, first symbol in the low bits.
    assert pack_bits(np.array([7, 0, 5], np.uint8), 3) == bytes([0b01000111, 0b1])


@pytest.mark.parametrize("width", [0, 1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 24, 31, 32])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 100])
def test_round_trip_at_every_width(native, width, count):
    rng = np.random.default_rng(width * 101 + count)
    values = rng.integers(0, 1 << width, count, dtype=np.uint64).astype(np.uint32)
    data = pack_bits(values, width)
    assert len(data) == -(-count * width // 8)
    out = unpack_bits(data, count, width)
    assert out.dtype == symbol_dtype(1 << width)
    np.testing.assert_array_equal(out, values)


def test_numpy_packs_across_its_chunks(monkeypatch):
    values = np.random.default_rng(0).integers(0, 1 << 5, 70_001).astype(np.uint32)
    native = pack_bits(values, 5)
    monkeypatch.setenv("GOSSAMER_NATIVE", "0")
    assert pack_bits(values, 5) == native
    np.testing.assert_array_equal(unpack_bits(native, len(values), 5), values)


def test_unpack_refuses(native):
    with pytest.raises(FormatError, match="take 2 bytes, got 1"):
        unpack_bits(b"\x21", 3, 4)
    with pytest.raises(FormatError, match="last 4 bits"):
        unpack_bits(b"\x21\x13", 3, 4)
    with pytest.raises(ArgumentError, match="0 to 32"):
        unpack_bits(b"", 0, 33)


def test_fixed_width_coder(native):
    coder = FixedWidth()
    assert coder.encode(np.array([0, 0], np.uint8), 1) == b""
    assert coder.decode(b"", 2, 1).tolist() == [0, 0]
    assert coder.encode(np.array([4, 1]), 5) == bytes([0b001100])
    assert coder.estimate(np.array([1, 1, 0, 0, 1])) == 2
    with pytest.raises(FormatError, match="symbol 7 in an alphabet of 5"):
        coder.decode(bytes([0b001111]), 2, 5)
    for bad in (np.array([5]), np.array([-1]), np.array([0.5]), np.zeros((1, 1), np.uint8)):
        with pytest.raises(ArgumentError):
            coder.encode(bad, 5)
    with pytest.raises(ArgumentError, match="count"):
        coder.decode(b"", -1, 5)


@pytest.mark.parametrize("alphabet", [5, 256, 1000, 70_000])
def test_histogram(native, alphabet):
    symbols = np.random.default_rng(0).integers(0, alphabet, 3001).astype(symbol_dtype(alphabet))
    np.testing.assert_array_equal(
        histogram(symbols, alphabet), np.bincount(symbols, minlength=alphabet)
    )


def test_exp_golomb_by_hand():
    # Order 0, value + 1 in binary: 0 is "1", 2 is "01" and then the low bit of 3.
    writer = BitWriter()
    writer.golomb(np.array([0, 2]), 0)
    # Prefixes 1, 01; remainders (nothing), 1.
    assert writer.bytes() == bytes([0b1101])
    assert writer.bits == 4
    assert (2 * golomb_widths(np.array([0, 2]), 0) + 1).sum() == 4


@given(
    st.lists(st.integers(0, 2**31), max_size=40),
    st.integers(0, 7),
    st.integers(0, 9),
)
def test_exp_golomb_round_trip(values, k, before):
    writer = BitWriter()
    writer.put(5, before)
    writer.golomb(np.array(values, np.int64), k)
    writer.put(1, 1)
    data = writer.bytes()
    reader = BitReader(data + b"\xff", len(data) + 1)
    assert reader.get(before) == 5 % (1 << before)
    assert reader.golomb(len(values), k).tolist() == values
    assert reader.get(1) == 1
    assert reader.finish() == len(data)


def test_best_golomb_order():
    assert golomb_best(np.zeros(10, np.int64)) == (0, 10)
    k, bits = golomb_best(np.full(10, 127))
    assert (k, bits) == (7, 80)


@given(st.binary(max_size=30), st.integers(0, 200), st.integers(0, 7))
def test_reader_never_passes_the_end(data, count, k):
    reader = BitReader(data, len(data))
    try:
        values = reader.golomb(count, k)
        assert len(values) == count
        assert not count or values.min() >= 0
        assert reader.finish() <= len(data)
    except FormatError:
        return


def test_reader_refuses_set_bits_after_a_table():
    reader = BitReader(b"\x03", 1)
    reader.get(1)
    with pytest.raises(FormatError, match="after a table"):
        reader.finish()


@given(st.sets(st.integers(0, 70_000), min_size=1, max_size=60))
def test_used_symbols_round_trip(symbols):
    used = np.array(sorted(symbols))
    writer = BitWriter()
    write_used(writer, used)
    data = writer.bytes()
    assert read_used(BitReader(data, len(data)), 70_001, 60).tolist() == used.tolist()
    with pytest.raises(FormatError):
        read_used(BitReader(data, len(data)), int(used[-1]), 60)
    with pytest.raises(FormatError, match="at most"):
        read_used(BitReader(data, len(data)), 70_001, len(used) - 1)


@given(st.lists(st.integers(-70_000, 70_000), max_size=50))
def test_signed_round_trip(values):
    writer = BitWriter()
    write_signed(writer, np.array(values, np.int64))
    data = writer.bytes()
    assert read_signed(BitReader(data, len(data)), len(values)).tolist() == values


def test_powers_of_two_are_exact():
    # round(2**(15 + i/256)) is p with (2p - 1)**256 < 2**(256 * 16 + i) < (2p + 1)**256.
    for i, p in enumerate(_POWERS.tolist()):
        target = 1 << (256 * 16 + i)
        assert (2 * p - 1) ** 256 < target < (2 * p + 1) ** 256


def test_log_weights():
    assert log_weights(np.array([0, 2, 4]), 2).tolist() == [1 << 15, 1 << 16, 1 << 17]
    assert log_weights(np.array([0, 1]), 2)[1] == 46341  # sqrt(2) * 2**15
    # 18 octaves at most.
    assert log_weights(np.array([-30, -40, 0]), 1).tolist() == [1 << 15, 1 << 15, 1 << 33]


@given(
    st.lists(st.integers(1, 2**34), min_size=1, max_size=300),
    st.integers(9, 16),
)
def test_normalise_is_nearly_optimal(weights, bits):
    w = np.array(weights)
    f = normalise(w, bits)
    assert f.sum() == 1 << bits
    assert f.min() >= 1
    # The greedy optimum, one unit at a time from the first, for the sum of weight * log f.
    if bits > 10:
        return
    best = np.ones(len(w), np.int64)
    for _ in range((1 << bits) - len(w)):
        best[np.argmax(w * np.log1p(1 / best))] += 1
    value, top = (float((w * np.log2(g)).sum()) for g in (f, best))
    assert value <= top * (1 + 1e-9)
    assert top - value <= 1e-3 * w.sum()


def test_geometric_weights_follow_the_distribution():
    weights = geometric_weights([(256, 32)], 256, 10)  # density 1/2
    np.testing.assert_allclose(weights / weights[0], 0.5 ** np.arange(10), rtol=1e-5)
    # The last symbol of the alphabet is the escape: all the rest.
    assert geometric_weights([(256, 32)], 4, 4)[-2:].tolist() == [(1 << 27) + 1, (1 << 27) + 1]
    both = geometric_weights([(64, 32), (192, 64)], 256, 2)
    assert both[0] == (64 * (1 << 29) + 192 * (1 << 28) >> 8) + 1
