"""Edges of the coders that a change of one constant would move."""

import numpy as np
import pytest
import torch

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack import pack, pack_bytes, unpack
from gossamer.pack.coders.table import CODERS, HUFFMAN
from gossamer.pack.format.values import analyse, to_bits
from gossamer.pack.write.layouts import context_section


@pytest.mark.parametrize("count", [3, 100, 40_000, 300_000])
@pytest.mark.parametrize("alphabet", [2, 17, 300])
def test_the_huffman_reader_in_numpy_reads_long_streams(count: int, alphabet: int) -> None:
    rng = np.random.default_rng(count + alphabet)
    weights = 0.8 ** np.arange(alphabet)
    symbols = rng.choice(alphabet, count, p=weights / weights.sum())
    symbols = symbols.astype(np.uint8 if alphabet <= 256 else np.uint16)
    data = CODERS[HUFFMAN].encode(symbols, alphabet)
    reader = CODERS[HUFFMAN]
    assert np.array_equal(reader.decode_reference(data, count, alphabet), symbols)
    assert np.array_equal(reader.decode(data, count, alphabet), symbols)
    for bad in (data[:-1], data + b"\0"):
        with pytest.raises(FormatError):
            reader.decode_reference(bad, count, alphabet)
        with pytest.raises(FormatError):
            reader.decode(bad, count, alphabet)


def sparse(entries: int, kept: list[int]) -> torch.Tensor:
    w = torch.zeros(2, entries // 2)
    w.view(-1)[kept] = 0.5
    return w


@pytest.mark.parametrize("bits", [1, 2, 5, 16])
def test_index_bits_from_1_to_16_round_trip(tmp_path, bits: int) -> None:
    # gaps of one, of the most that fits, one more, and far more than the width holds
    most = (1 << min(bits, 10)) - 1
    w = sparse(20_000, [0, 1, 1 + most, 2 + 2 * most, 9_000, 19_999])
    with pack({"w": w}, tmp_path / "w.gsm", profile="huffman", index_bits=bits) as archive:
        assert torch.equal(archive.tensor("w"), w)


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_other_index_bits_are_refused(tmp_path, bits: int) -> None:
    with pytest.raises(ArgumentError, match=f"index_bits is {bits}, allowed are 1 to 16"):
        pack({"w": torch.ones(2, 2)}, tmp_path / "w.gsm", profile="huffman", index_bits=bits)


def test_a_trusted_file_may_hold_more_than_its_bytes_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = torch.zeros(2200, 2000)
    w[100, 100] = 1.0
    dtype, bits = to_bits("w", w)
    section = context_section(analyse(bits, dtype, (2200, 2000)))
    assert len(section) < 200  # 2^22 + 1024 bytes each are fewer than its entries
    monkeypatch.setattr("gossamer.pack.write.writer.encode_section", lambda *_: section)
    data = pack_bytes({"w": w})
    monkeypatch.undo()
    with pytest.raises(FormatError, match=r"4400000 entries .* are too many .*pass max_bytes="):
        unpack(data)
    assert torch.equal(unpack(data, max_bytes=1 << 25)["w"], w)
