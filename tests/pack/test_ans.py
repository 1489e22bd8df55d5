"""rANS: compression against the entropy, the kernels against the Python decoder, damage."""

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import damaged, skewed, streams
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.kernels import kernel
from gossamer.pack.coders.ans import Rans, Stream, parse
from gossamer.pack.coders.gaps import to_gaps

coder = Rans()
LEVELS = ["scalar", "avx2", "avx512"]


def entropy_bytes(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    return float((counts * np.log2(counts.sum() / counts)).sum() / 8)


def decode_all_ways(data: bytes, count: int, alphabet: int) -> list[list[int] | None]:
    """By each kernel and by Python; ``None`` where the data are refused."""
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for level in LEVELS:
            patch.setenv("GOSSAMER_ISA", level)
            results.append(attempt(coder.decode, data, count, alphabet))
    results.append(attempt(coder.decode_reference, data, count, alphabet))
    return results


def attempt(decode, data, count, alphabet):
    try:
        out = decode(data, count, alphabet)
    except FormatError:
        return None
    assert len(out) == count
    assert out.dtype.itemsize == (1 if alphabet <= 256 else 2 if alphabet <= 65_536 else 4)
    assert not count or out.max() < alphabet
    return out.tolist()


def test_empty_one_symbol_and_raw():
    assert coder.encode(np.zeros(0, np.uint8), 4) == b""
    assert coder.decode(b"", 0, 4).tolist() == []
    data = coder.encode(np.full(1000, 300), 400)
    assert len(data) <= 4
    assert coder.decode(data, 1000, 400).tolist() == [300] * 1000
    uniform = np.arange(256).repeat(3)
    data = coder.encode(uniform, 256)
    assert len(data) == 1 + len(uniform)
    assert coder.decode(data, len(uniform), 256).tolist() == uniform.tolist()
    with pytest.raises(ArgumentError, match="alphabet"):
        coder.encode(uniform, 0)


def test_tiny_streams_cost_little():
    """One lane wastes no state: a table and the entropy, rounded up."""
    for count in (20, 100, 500, 2000):
        symbols = skewed(1, 4, count, 1.0)
        assert len(coder.encode(symbols, 4)) <= entropy_bytes(symbols) + 8


@pytest.mark.parametrize(("density", "alphabet"), [(0.09, 256), (0.3, 256), (0.04, 256)])
def test_large_gap_streams_reach_the_entropy(density, alphabet):
    rng = np.random.default_rng(0)
    symbols = to_gaps(np.flatnonzero(rng.random(int(1_100_000 / density), np.float32) < density))
    assert len(symbols) > 1_000_000
    data = coder.encode(symbols, alphabet)
    found = parse(data, len(symbols), alphabet)
    assert isinstance(found, Stream)
    assert found.lanes == 64
    table = len(data) - len(found.payload)
    assert table < 400
    assert len(data) <= 1.001 * entropy_bytes(symbols) + table
    np.testing.assert_array_equal(coder.decode(data, len(symbols), alphabet), symbols)


def test_large_code_stream_matches_an_independent_coder():
    rng = np.random.default_rng(0)
    symbols = np.clip(np.rint(np.abs(rng.normal(0, 9, 1_200_000))), 0, 63).astype(np.int32)
    data = coder.encode(symbols, 64)
    chance = np.bincount(symbols, minlength=64) / len(symbols)
    model = constriction.stream.model.Categorical(chance.astype(np.float32), perfect=True)
    other = constriction.stream.stack.AnsCoder()
    other.encode_reverse(symbols, model)
    theirs = other.num_bits() / 8  # without any table
    assert abs(theirs / entropy_bytes(symbols) - 1) < 1e-3
    assert len(data) <= 1.001 * theirs + 100


def test_large_wide_alphabet():
    symbols = np.minimum(np.random.default_rng(0).geometric(0.004, 1_000_000) - 1, 3999)
    data = coder.encode(symbols, 4000)
    found = parse(data, len(symbols), 4000)
    assert isinstance(found, Stream)
    table = len(data) - len(found.payload)
    assert table < 2200
    assert len(data) <= 1.002 * entropy_bytes(symbols) + table
    np.testing.assert_array_equal(coder.decode(data, len(symbols), 4000), symbols)


def test_gaps_of_random_positions_need_no_table():
    rng = np.random.default_rng(3)
    symbols = np.minimum(rng.geometric(0.05, 2000) - 1, 255)
    data = coder.encode(symbols, 256)
    assert data[0] & 7 in (3, 4)
    # Fewer bytes than the entropy of this sample plus two for each symbol that occurs.
    assert len(data) < entropy_bytes(symbols) + 45
    assert decode_all_ways(data, 2000, 256) == [symbols.tolist()] * 4


@given(streams())
@settings(max_examples=30)
def test_round_trip(case):
    alphabet, symbols = case
    data = coder.encode(symbols, alphabet)
    assert len(data) <= 1 + -(-len(symbols) * (alphabet - 1).bit_length() // 8) + 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_NATIVE", "0")
        assert coder.encode(symbols, alphabet) == data
    assert decode_all_ways(data, len(symbols), alphabet) == [symbols.tolist()] * 4


@pytest.mark.parametrize("lanes", [1, 4, 16, 64])
@pytest.mark.parametrize(
    ("alphabet", "bits"), [(40, 12), (256, 14), (90, 15), (3, 14), (200, 16), (3000, 13)]
)
@pytest.mark.parametrize("count", [1, 63, 64, 65, 3000])
def test_kernels_agree_at_all_lanes(lanes, alphabet, bits, count, monkeypatch):
    """Around whole rounds of lanes; the states and words themselves."""
    from gossamer.pack.coders import ans
    from gossamer.pack.coders.tables import normalise

    symbols = skewed(lanes, alphabet, count, 0.5)
    symbols = symbols.astype(np.uint8 if alphabet <= 256 else np.uint16)
    weights = np.bincount(symbols, minlength=alphabet) + 1
    table = normalise(weights, bits).astype(np.uint32)
    native = ans._write(symbols, table, bits, lanes)
    with monkeypatch.context() as patch:
        patch.setenv("GOSSAMER_NATIVE", "0")
        assert ans._write(symbols, table, bits, lanes) == native
    stream = Stream(table.astype(np.int64), np.arange(alphabet), bits, lanes, memoryview(native))
    for level in LEVELS:
        monkeypatch.setenv("GOSSAMER_ISA", level)
        out = ans._read_native(stream, table, count, symbols.dtype)
        np.testing.assert_array_equal(out, symbols)
        # One word too few or too many.
        for payload in (native[:-2], native + b"\0\0", native[:-1]):
            bad = Stream(stream.frequencies, stream.symbols, bits, lanes, memoryview(payload))
            found = [read(ans._read_native, bad, table, count, symbols.dtype)]
            found += [read(ans._read, bad, table, count, symbols.dtype)]
            assert found[0] == found[1]
            # A lone state has no redundancy: leaving out its zero bytes is what makes it short.
            assert lanes == 1 or found[0] is None


def read(how, *arguments) -> list[int] | None:
    try:
        return how(*arguments).tolist()
    except FormatError:
        return None


@given(streams(2500), st.data())
@settings(max_examples=60)
def test_damage_is_refused_or_harmless(case, data):
    """And all decoders agree on which."""
    alphabet, symbols = case
    coded = damaged(data, coder.encode(symbols, alphabet), flips=3, reach=81)
    results = decode_all_ways(coded, len(symbols), alphabet)
    assert all(r == results[0] for r in results)


def test_damage_to_a_large_stream_is_refused():
    rng = np.random.default_rng(0)
    symbols = np.minimum(rng.geometric(0.05, 300_000) - 1, 255)
    coded = coder.encode(symbols, 256)
    found = parse(coded, len(symbols), 256)
    assert isinstance(found, Stream)
    assert found.lanes == 64
    for at in rng.integers(len(coded) - len(found.payload), len(coded), 12):
        bad = bytearray(coded)
        bad[at] ^= 1 << int(rng.integers(8))
        for level in LEVELS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("GOSSAMER_ISA", level)
                # Every state must come back to its start: a changed bit does not go unnoticed.
                with pytest.raises(FormatError):
                    coder.decode(bytes(bad), len(symbols), 256)
    for size in (len(coded) - 2, len(coded) - 20_000, 400, 100):
        with pytest.raises(FormatError):
            coder.decode(coded[:size], len(symbols), 256)


@given(st.binary(max_size=120), st.integers(0, 300), st.integers(1, 70_000))
@settings(max_examples=150)
def test_noise_never_crashes(data, count, alphabet):
    results = decode_all_ways(data, count, alphabet)
    assert all(r == results[0] for r in results)


def test_kernel_checks_its_arguments():
    """Wrong tables are refused by the kernel itself."""
    native = kernel("entropy")
    if native is None:
        pytest.skip("the kernels are not built")
    data, out = np.zeros(8, np.uint8), np.zeros(4, np.uint8)
    good = np.array([2048, 2048], np.uint32)
    for table, bits, lanes in (
        (np.array([4096, 0], np.uint32), 12, 1),
        (np.array([2048, 2047], np.uint32), 12, 1),
        (np.array([2**32 - 2048, 2048], np.uint32), 12, 1),
        (good, 12, 2),
        (good, 17, 1),
        (np.full(512, 8, np.uint32), 12, 1),
    ):
        with pytest.raises(ValueError, match="rANS"):
            native.rans_decode(data, table, bits, lanes, out)
    with pytest.raises(ValueError, match="no rANS frequency"):
        native.rans_encode(np.array([2], np.uint8), good, 12, 1)


@pytest.mark.parametrize("count", [300, 5000, 60_000])
def test_estimate_is_close(count):
    for alphabet in (16, 64, 256):
        symbols = skewed(alphabet, alphabet, count)
        size = len(coder.encode(symbols, alphabet))
        estimate = coder.estimate(np.bincount(symbols, minlength=alphabet))
        assert abs(estimate - size) < 0.02 * size + 0.3 * alphabet
