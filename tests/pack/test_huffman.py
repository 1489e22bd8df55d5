"""Huffman coding: lengths, bytes, the decoders against each other, damaged input."""

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import damaged, skewed, streams
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack.coders.bits import BitWriter
from gossamer.pack.coders.huffman import Huffman, code_lengths, table_bytes
from gossamer.pack.coders.tables import write_signed, write_used

coder = Huffman()


def entropy(histogram: np.ndarray) -> float:
    """Bits of all symbols."""
    counts = histogram[histogram > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def test_lengths_by_hand():
    assert code_lengths(np.array([5, 0, 9, 12, 13, 16, 45])).tolist() == [4, 0, 4, 3, 3, 3, 1]
    assert code_lengths(np.array([0, 7])).tolist() == [0, 1]
    assert code_lengths(np.array([0, 0])).tolist() == [0, 0]
    assert code_lengths(np.zeros(0, np.int64)).tolist() == []


def test_lengths_refuse():
    with pytest.raises(ArgumentError, match="use at least 2"):
        code_lengths(np.array([1, 1, 1]), limit=1)
    with pytest.raises(ArgumentError, match="negative"):
        code_lengths(np.array([1, -1]))


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.integers(3, 5))
@settings(max_examples=25)
def test_lengths_are_optimal(counts, limit):
    """Against all lengths that satisfy Kraft's inequality."""
    best = min(
        sum(c * n for c, n in zip(counts, lengths, strict=True))
        for lengths in itertools.product(range(1, limit + 1), repeat=len(counts))
        if sum(2.0**-n for n in lengths) <= 1
    )
    found = code_lengths(np.array(counts), limit=limit)
    assert (found * counts).sum() == best
    assert found.max() <= limit
    assert (2.0**-found).sum() == 1


def test_limit_binds_on_fibonacci_counts():
    counts = np.array([1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89])
    assert code_lengths(counts).max() == 10
    limited = code_lengths(counts, limit=5)
    assert limited.max() == 5
    assert (2.0**-limited).sum() == 1


def test_bytes_by_hand():
    # Counts 3, 1, 1: codes 0, 10, 11; 0 10 0 11 0 -> 0100 1100.
    data = coder.encode(np.array([0, 1, 0, 2, 0]), 3)
    assert data[0] == 1
    assert data[-1] == 0b01001100
    assert coder.decode(data, 5, 3).tolist() == [0, 1, 0, 2, 0]


def test_empty_and_one_symbol():
    assert coder.encode(np.zeros(0, np.uint8), 9) == b""
    assert coder.decode(b"", 0, 9).tolist() == []
    data = coder.encode(np.full(10_000, 7), 9)
    assert len(data) == 2
    assert coder.decode(data, 10_000, 9).tolist() == [7] * 10_000
    with pytest.raises(FormatError, match="for no symbols"):
        coder.decode(b"\0", 0, 9)
    with pytest.raises(FormatError, match="alphabet"):
        coder.decode(data, 5, 7)
    with pytest.raises(FormatError, match="empty"):
        coder.decode(b"", 5, 9)


@pytest.mark.parametrize("alphabet", [2, 5, 16, 64, 256, 1000])
def test_within_a_bit_of_the_entropy(alphabet):
    for seed in range(4):
        symbols = skewed(seed, alphabet, 20_000, 0.1 + seed)
        histogram = np.bincount(symbols, minlength=alphabet)
        data = coder.encode(symbols, alphabet)
        payload = (code_lengths(histogram) * histogram).sum()
        assert entropy(histogram) <= payload <= entropy(histogram) + len(symbols)
        # The table takes no more than a byte a symbol.
        assert 8 * len(data) <= 1.005 * payload + 8 * (alphabet + 8)
        assert abs(coder.estimate(histogram) - len(data)) < 0.02 * len(data) + alphabet


@given(streams())
@settings(max_examples=40)
def test_round_trip(case):
    alphabet, symbols = case
    data = coder.encode(symbols, alphabet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_NATIVE", "0")
        assert coder.encode(symbols, alphabet) == data
    for decode in (coder.decode, coder.decode_reference):
        out = decode(data, len(symbols), alphabet)
        assert out.dtype.itemsize == (1 if alphabet <= 256 else 2 if alphabet <= 65_536 else 4)
        np.testing.assert_array_equal(out, symbols)


def test_four_streams_and_long_codes():
    # Counts halve: codes up to the limit, longer than any table of first bits.
    symbols = np.repeat(np.arange(18), [1 << (17 - i) for i in range(18)])
    np.random.default_rng(0).shuffle(symbols)
    assert len(symbols) > 1 << 16
    data = coder.encode(symbols, 20)
    assert data[0] == 2
    np.testing.assert_array_equal(coder.decode(data, len(symbols), 20), symbols)
    np.testing.assert_array_equal(coder.decode_reference(data, len(symbols), 20), symbols)


def forged(lengths: list[int], payload: bytes) -> bytes:
    writer = BitWriter()
    write_used(writer, np.arange(len(lengths)))
    writer.put(lengths[0] - 1, 5)
    write_signed(writer, np.diff(lengths))
    return b"\1" + writer.bytes() + payload


def test_kraft_violations_are_refused():
    assert coder.decode(forged([1, 2, 2], b"\x4c"), 5, 3).tolist() == [0, 1, 0, 2, 0]
    with pytest.raises(FormatError, match="overfull"):
        coder.decode(forged([1, 1, 2], b"\x4c"), 5, 3)
    with pytest.raises(FormatError, match="incomplete"):
        coder.decode(forged([1, 3, 3], b"\x4c"), 5, 3)
    with pytest.raises(FormatError, match="incomplete"):
        coder.decode(forged([1], b"\x00"), 5, 3)
    with pytest.raises(FormatError, match="lengths of"):
        coder.decode(forged([1, 25], b"\x00"), 5, 3)


@pytest.mark.parametrize("native", ["0", "1"])
def test_stream_must_end_with_its_symbols(native, monkeypatch):
    monkeypatch.setenv("GOSSAMER_NATIVE", native)
    for payload, count in ((b"\x4c", 9), (b"\x4c\x00", 5), (b"\x4d", 5), (b"", 5)):
        with pytest.raises(FormatError, match="stream"):
            coder.decode(forged([1, 2, 2], payload), count, 3)


@given(streams(1500), st.data())
@settings(max_examples=80)
def test_damage_is_refused_or_harmless(case, data):
    """And both decoders agree on which."""
    alphabet, symbols = case
    coded = damaged(data, coder.encode(symbols, alphabet), flips=3, reach=61)
    results = []
    for decode in (coder.decode, coder.decode_reference):
        try:
            out = decode(coded, len(symbols), alphabet)
            assert len(out) == len(symbols)
            assert not len(out) or out.max() < alphabet
            results.append(out.tolist())
        except FormatError:
            results.append(None)
    assert results[0] == results[1]


@given(st.binary(max_size=80), st.integers(0, 300), st.integers(1, 400))
@settings(max_examples=150)
def test_noise_never_crashes(data, count, alphabet):
    with contextlib.suppress(FormatError):
        assert len(coder.decode(data, count, alphabet)) == count


@pytest.mark.parametrize("native", ["0", "1"])
def test_nothing_may_follow_the_streams(native, monkeypatch):
    monkeypatch.setenv("GOSSAMER_NATIVE", native)
    symbols = np.array([0, 1] * 8, np.uint8)
    data = coder.encode(symbols, 2)
    np.testing.assert_array_equal(coder.decode(data, 16, 2), symbols)
    with pytest.raises(FormatError):
        coder.decode(data + b"\0", 16, 2)


def test_a_measure_is_what_encoding_takes():
    for symbols in ([0, 0, 0, 1], [0, 1, 2, 2, 2, 2, 2, 2, 2], [5]):
        given = np.array(symbols, np.uint8)
        histogram = np.bincount(given, minlength=6)
        assert coder.measure(histogram) == len(coder.encode(given, 6))


def test_four_streams_by_hand():
    # Five symbols are split 2, 2, 1, 0: codes 0, 10, 11 once more, each stream to its own byte.
    table = forged([1, 2, 2], b"")
    sizes = b"".join(n.to_bytes(4, "little") for n in (1, 1, 1))
    data = b"\2" + table[1:] + sizes + bytes([0b01000000, 0b01100000, 0])
    for decode in (coder.decode, coder.decode_reference):
        assert decode(data, 5, 3).tolist() == [0, 1, 0, 2, 0]
        with pytest.raises(FormatError, match="longer than the data"):
            decode(data[:-1], 5, 3)
    assert table_bytes(data, 5, 3) == len(data) - 3


def test_what_a_table_takes():
    data = coder.encode(np.array([0, 1, 0, 2, 0]), 3)
    assert table_bytes(data, 5, 3) == len(data) - 1
    assert table_bytes(b"", 0, 3) == 0
    one = coder.encode(np.full(9, 7), 9)
    assert table_bytes(one, 9, 9) == len(one)


def test_a_measure_counts_four_streams_from_where_they_begin():
    # Two bytes more than encoding takes: half a byte for each stream, which here is filled up.
    symbols = np.arange(1 << 16) % 2
    assert coder.encode(symbols, 2)[0] == 2
    assert coder.measure(np.array([1 << 15, 1 << 15])) == len(coder.encode(symbols, 2)) + 2
    assert coder.encode(symbols[1:], 2)[0] == 1
    assert coder.measure(np.array([(1 << 15) - 1, 1 << 15])) == len(coder.encode(symbols[1:], 2))
