"""Positions as gaps and bitmaps, and decoding into memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack.coders.ans import Rans
from gossamer.pack.coders.bits import FixedWidth
from gossamer.pack.coders.gaps import (
    ESCAPE,
    fixed_gaps,
    fixed_positions,
    from_bitmap,
    from_gaps,
    mask_gaps,
    to_bitmap,
    to_gaps,
)
from gossamer.pack.coders.huffman import Huffman
from gossamer.pack.read.into import decode_dense_into, decode_sparse_into

PATHS = ["python", "scalar", "avx2", "avx512"]
positions_of = st.sets(st.integers(0, 4000), max_size=60).map(lambda s: np.array(sorted(s), int))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    take(request.param, monkeypatch)


def take(path: str, patch: pytest.MonkeyPatch) -> None:
    if path == "python":
        patch.setenv("GOSSAMER_NATIVE", "0")
    else:
        patch.setenv("GOSSAMER_NATIVE", "1")
        patch.setenv("GOSSAMER_ISA", path)


def test_wide_gaps_by_hand():
    # 254 zeros fit a symbol; 255 are an escape and nothing more; 510 are two.
    assert to_gaps(np.array([254])).tolist() == [254]
    assert to_gaps(np.array([255])).tolist() == [255, 0]
    assert to_gaps(np.array([0, 511])).tolist() == [0, 255, 255, 0]
    assert mask_gaps(np.array([[False, True], [True, False]])).tolist() == [1, 0]
    assert to_gaps(np.zeros(0, np.int64)).tolist() == []


@given(positions_of, st.integers(0, 2000))
def test_wide_gaps_round_trip(positions, trailing):
    size = int(positions[-1]) + 1 + trailing if len(positions) else trailing
    symbols = to_gaps(positions)
    assert len(symbols) == len(positions) + np.count_nonzero(symbols == ESCAPE)
    np.testing.assert_array_equal(from_gaps(symbols, len(positions), size), positions)


def test_wide_gaps_refuse():
    symbols = np.array([3, 255, 0], np.uint8)
    assert from_gaps(symbols, 2, 260).tolist() == [3, 259]
    with pytest.raises(FormatError, match="entry 259 of 259"):
        from_gaps(symbols, 2, 259)
    with pytest.raises(FormatError, match="2 non-zeros, 3"):
        from_gaps(symbols, 3, 260)
    with pytest.raises(FormatError, match="escape"):
        from_gaps(symbols[:2], 1, 1000)
    for bad in (np.array([3, 3]), np.array([4, 2]), np.array([-1]), np.array([[1]])):
        with pytest.raises(ArgumentError, match="positions"):
            to_gaps(bad)


def test_fixed_gaps_are_the_papers():
    """Figure 2 of the paper: 3-bit differences, a filler after 8 entries."""
    positions = np.array([1, 4, 15])
    gaps, fillers = fixed_gaps(positions, 3)
    assert gaps.tolist() == [1, 2, 7, 2]
    assert fillers.tolist() == [2]
    assert fixed_positions(gaps, 16).tolist() == [1, 4, 12, 15]
    # A gap of 7 fits and is no filler; one of 8 needs a filler and then no zero.
    assert [g.tolist() for g in fixed_gaps(np.array([7]), 3)] == [[7], []]
    assert [g.tolist() for g in fixed_gaps(np.array([8]), 3)] == [[7, 0], [0]]


@given(positions_of, st.integers(1, 10))
def test_fixed_gaps_round_trip(positions, bits):
    gaps, fillers = fixed_gaps(positions, bits)
    assert not len(gaps) or gaps.max() < 1 << bits
    places = fixed_positions(gaps, 4001)
    np.testing.assert_array_equal(np.delete(places, fillers), positions)
    # No more fillers than the zeros between ask for.
    holes = np.diff(positions, prepend=-1) - 1
    assert len(fillers) == sum(h // (1 << bits) for h in holes.tolist())


def test_fixed_gaps_refuse():
    with pytest.raises(FormatError, match="entry 15 of 15"):
        fixed_positions(np.array([1, 2, 7, 2], np.uint8), 15)
    with pytest.raises(ArgumentError, match="1 to 16"):
        fixed_gaps(np.array([1]), 0)


@given(positions_of)
def test_bitmap_round_trip(positions):
    mask = np.zeros(4001, bool)
    mask[positions] = True
    packed = to_bitmap(mask)
    assert len(packed) == 501
    np.testing.assert_array_equal(from_bitmap(packed, len(positions), 4001), positions)


def test_bitmap_refuses():
    packed = np.array([0b10000001], np.uint8)
    assert from_bitmap(packed, 2, 8).tolist() == [0, 7]
    with pytest.raises(FormatError, match="entry 7 of 7"):
        from_bitmap(packed, 2, 7)
    with pytest.raises(FormatError, match="2 non-zeros"):
        from_bitmap(packed, 1, 8)
    with pytest.raises(FormatError, match="bytes"):
        from_bitmap(packed, 2, 9)


# Into memory --------------------------------------------------------------------------------------


def sparse(seed: int, size: int, density: float, entries: int):
    rng = np.random.default_rng(seed)
    positions = np.flatnonzero(rng.random(size) < density)
    codes = rng.integers(0, entries, len(positions)).clip(0, entries * 2 // 3)
    book = rng.normal(size=entries).astype(np.float32)
    dense = np.zeros(size, np.float32)
    dense[positions] = book[codes]
    return to_gaps(positions), codes, book, dense


def fill(out, gaps, codes, book, coder=None):
    coder = coder or Rans()
    decoder = None if isinstance(coder, Rans) else coder.decode
    decode_sparse_into(
        out,
        coder.encode(gaps, 256),
        coder.encode(codes, len(book)),
        gap_count=len(gaps),
        code_count=len(codes),
        codebook=book,
        gap_decoder=decoder,
        code_decoder=decoder,
    )


@pytest.mark.parametrize(("size", "density"), [(0, 0), (1, 1), (5000, 0.1), (9000, 0), (9000, 1)])
@pytest.mark.parametrize("entries", [1, 16, 32, 200, 300])
def test_sparse_into(path, size, density, entries):
    gaps, codes, book, dense = sparse(size, size, density, entries)
    out = np.full(size, np.nan, np.float32)
    fill(out, gaps, codes, book)
    np.testing.assert_array_equal(out, dense)


@pytest.mark.parametrize("offset", [0, 1, 15])
def test_large_sparse_into_at_any_alignment(path, offset):
    """Large results are written past the caches; nothing around them is touched."""
    size = (1 << 20) + 4096 + 37
    gaps, codes, book, dense = sparse(1, size, 0.004, 32)
    assert (gaps == ESCAPE).any()
    room = np.full(size + 64, 7, np.float32)
    out = room[offset : offset + size]
    fill(out, gaps, codes, book)
    np.testing.assert_array_equal(out, dense)
    assert (room[:offset] == 7).all()
    assert (room[offset + size :] == 7).all()


@pytest.mark.parametrize("coder", [FixedWidth(), Huffman()], ids=lambda c: c.id)
def test_other_coders_take_the_same_path(path, coder):
    gaps, codes, book, dense = sparse(2, 6000, 0.1, 20)
    out = np.empty((60, 100), np.float32)
    fill(out, gaps, codes, book, coder)
    np.testing.assert_array_equal(out.reshape(-1), dense)


def test_values_keep_their_bits(path):
    """NaN payloads and negative zero included."""
    patterns = np.array([0x7FC01234, 0x80000000, 0xFF800001, 1], np.uint32)
    out = np.zeros(8, np.float32)
    fill(out, np.zeros(8, np.uint8), np.arange(8) % 4, patterns.view(np.float32))
    assert out.view(np.uint32).tolist() == [*patterns.tolist(), *patterns.tolist()]


def test_sparse_into_refuses_streams_that_disagree(path):
    gaps, codes, book, dense = sparse(3, 5000, 0.1, 16)
    size = int(np.flatnonzero(dense)[-1]) + 1
    fill(np.empty(size, np.float32), gaps, codes, book)
    with pytest.raises(FormatError):
        fill(np.empty(size - 1, np.float32), gaps, codes, book)
    with pytest.raises(FormatError):
        fill(np.empty(size, np.float32), gaps, codes[:-1], book)
    with pytest.raises(FormatError):
        fill(np.empty(size, np.float32), gaps, np.append(codes, 0), book)
    with pytest.raises(FormatError, match=r"escape|more gaps"):
        fill(np.empty(9000, np.float32), np.append(gaps, np.uint8(255)), codes, book)


def test_into_refuses_unfit_arrays():
    book = np.ones(2, np.float32)
    for out in (np.zeros(4), np.zeros((4, 4), np.float32).T[1:], np.zeros(8, np.float32)[::2]):
        with pytest.raises(ArgumentError, match="contiguous"):
            decode_dense_into(out, b"", codebook=book)
    with pytest.raises(ArgumentError, match="codebook"):
        decode_dense_into(np.zeros(2, np.float32), b"", codebook=book[:0])


@pytest.mark.parametrize("size", [0, 1, 17, 5000, (1 << 20) + 70])
@pytest.mark.parametrize("entries", [1, 3, 32, 200, 300])
def test_dense_into(path, size, entries, request):
    if "python" in request.node.name:
        size = min(size, 5000)
    rng = np.random.default_rng(size)
    codes = (rng.random(size) ** 3 * entries).astype(np.int64)
    book = rng.normal(size=entries).astype(np.float32)
    room = np.full(size + 8, 7, np.float32)
    out = room[3 : 3 + size]
    decode_dense_into(out, Rans().encode(codes, entries), codebook=book)
    np.testing.assert_array_equal(out, book[codes])
    assert (room[:3] == 7).all()
    assert (room[3 + size :] == 7).all()


@given(st.integers(0, 99), st.data())
@settings(max_examples=60)
def test_damage_never_passes_the_end(seed, data):
    """Any bytes: an error or something of the right size, and nothing around it touched."""
    gaps, codes, book, _ = sparse(seed, 4500, 0.08, 24)
    coded = [bytearray(Rans().encode(gaps, 256)), bytearray(Rans().encode(codes, 24))]
    for _ in range(data.draw(st.integers(1, 4))):
        stream = coded[data.draw(st.integers(0, 1))]
        at = data.draw(st.integers(0, len(stream) - 1))
        stream[at] ^= data.draw(st.integers(1, 255))
    size = data.draw(st.integers(1, 4500))
    results = []
    for path in PATHS:
        with pytest.MonkeyPatch.context() as patch:
            take(path, patch)
            room = np.full(4600, 7, np.float32)
            try:
                decode_sparse_into(
                    room[40 : 40 + size],
                    bytes(coded[0]),
                    bytes(coded[1]),
                    gap_count=len(gaps),
                    code_count=len(codes),
                    codebook=book,
                )
                results.append(room[40 : 40 + size].tolist())
            except FormatError:
                results.append(None)
            assert (room[:40] == 7).all()
            assert (room[40 + size :] == 7).all()
    assert all(r == results[0] for r in results)
