"""Version 3 of the format: coders of other packages, told by name, and further layouts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack import Archive, pack_bytes, unpack
from gossamer.pack.coders.limits import Reader, varint
from gossamer.pack.coders.table import CODERS, NUMBERED, register
from gossamer.pack.format.container import OWN, Entry, Header, file_chunks
from gossamer.pack.format.lzma_bytes import encode_lzma
from gossamer.pack.format.section import parse
from gossamer.pack.format.values import BY_TORCH
from toy_coder import Toy

F32 = BY_TORCH[torch.float32]


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table as it was, after each test."""
    monkeypatch.setattr(CODERS, "_entries", dict(CODERS._entries))


@pytest.fixture
def toy() -> Iterator[Toy]:
    return register(Toy())


def pruned() -> dict[str, torch.Tensor]:
    """Codes that the toy's fixed lengths fit: half are the smallest value, a quarter the next."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(13), [*(1 << np.arange(11, -1, -1)), 1])
    rng.shuffle(codes)
    codes = codes.reshape(64, 64)
    book = np.sort(rng.normal(size=13)).astype(np.float32)
    return {"fc.weight": torch.from_numpy(book[codes]), "steps": torch.tensor(3)}


def test_a_registered_coder_takes_part_is_told_by_name_and_read_back(toy: Toy) -> None:
    state = pruned()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CODERS, "_entries", {n: CODERS[n] for n in NUMBERED})
        without = pack_bytes(state)
    data = pack_bytes(state)
    assert len(data) < len(without)
    assert (data[4], without[4]) == (3, 1)
    assert bytes([3]) + b"toy" in data
    with Archive(data) as archive:
        assert archive.info("fc.weight")["codec"] == "dense(toy)"
        assert sum(archive.parts().values()) == len(data)
        for name, tensor in state.items():
            assert torch.equal(archive.tensor(name), tensor)


@pytest.mark.parametrize("profile", ["fast", "huffman"])
def test_the_other_profiles_keep_to_their_coders(toy: Toy, profile: str) -> None:
    assert pack_bytes(pruned(), profile=profile)[4] == 1


def test_a_coder_that_is_never_smallest_leaves_the_file_as_it_was() -> None:
    before = pack_bytes(pruned())

    class Large(Toy):
        def estimate(self, histogram: np.ndarray) -> float:
            return float(8 * histogram.sum() + 100)

        measure = estimate

        def encode(self, symbols: np.ndarray, alphabet: int) -> bytes:
            return super().encode(symbols, alphabet) + bytes(1000)

    register(Large())
    assert pack_bytes(pruned()) == before


def test_a_reader_without_the_coder_names_it(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack_bytes(pruned())
    monkeypatch.setattr(CODERS, "_entries", {n: CODERS[n] for n in NUMBERED})
    with Archive(data) as archive:
        assert archive.tensor("steps") == 3
        with pytest.raises(
            FormatError,
            match=r"tensor 'fc.weight': symbols: symbol coder \"toy\" is not known here; install "
            "the package that registers it",
        ):
            archive.tensor("fc.weight")


@pytest.mark.parametrize("version", [1, 2])
def test_a_name_in_an_older_file_is_refused(toy: Toy, version: int) -> None:
    section = dense_section(3, b"\x03toy", b"\x40")
    assert parse(Reader(section, "x"), F32, (2,), 2).version == 3
    with pytest.raises(FormatError, match=f"symbol coder 3 in a file of version {version}"):
        parse(Reader(section, "x", version=version), F32, (2,), 2)


def dense_section(coder: int, name: bytes, data: bytes) -> bytes:
    """Two values, both kept: a stream of two symbols."""
    book = b"\x02\x00\x02" + np.float32([1, 2]).tobytes()
    return b"\x01" + book + varint(len(data) << 2 | coder) + name + data


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"", "coder's name needs 1 bytes"),
        (b"\x00", "no symbol coder is told by the name ''"),
        (b"\x05toy", "coder's name needs 5 bytes, 4 are left"),
        (b"\x04t\x1by!", r"told by the name 't\\x1by!'"),
        (b"\x04t y!", "told by the name 't y!'"),
        (b"\x03\xfftoy", "told by the name"),
        (b"\x41" + b"t" * 65, "told by the name"),
        (b"\x05fixed", "told by the name 'fixed'"),
        (b"\x04rans", "told by the name 'rans'"),
        (b"\x03toz", '"toz" is not known here'),
    ],
)
def test_forged_names(toy: Toy, name: bytes, message: str) -> None:
    data = b"\x40" if name else b""
    with pytest.raises(FormatError, match=message):
        parse(Reader(dense_section(3, name, data), "x"), F32, (2,), 2)


@pytest.mark.parametrize("name", ["", "a b", "é", "x" * 65, "tab\t"])
def test_a_coder_of_a_name_that_no_file_can_hold_is_not_registered(name: str) -> None:
    coder = Toy()
    coder.id = name
    with pytest.raises(ArgumentError, match="printable ASCII"):
        register(coder)


def test_a_taken_name_is_refused_and_the_same_coder_may_come_twice(toy: Toy) -> None:
    assert register(toy) is toy
    with pytest.raises(ArgumentError, match="'toy' is there already"):
        register(Toy())


def test_a_coder_that_does_not_give_back_what_it_took_writes_no_file(toy: Toy) -> None:
    toy.decode = lambda data, count, alphabet: np.zeros(count, np.uint8)  # type: ignore
    with pytest.raises(ArgumentError, match="'toy' does not give back the 4096 symbols"):
        pack_bytes(pruned())


@pytest.mark.parametrize(
    "found",
    [np.zeros(3, np.uint8), np.array([0, 2], np.uint8), np.zeros((2, 1), np.uint8), np.zeros(2)],
    ids=["too many", "beyond the alphabet", "another shape", "floats"],
)
def test_what_another_packages_coder_decodes_is_checked(toy: Toy, found: np.ndarray) -> None:
    data = pack_bytes(pruned())
    assert set(unpack(data)) == {"fc.weight", "steps"}
    toy.decode = lambda data, count, alphabet: found  # type: ignore
    with pytest.raises(FormatError, match="symbol coder 'toy'"):
        unpack(data)


# Further layouts ---------------------------------------------------------------------------------


def file_of(payload: bytes, shape: tuple[int, ...] = (2,), version: int = 3) -> bytes:
    header = Header([Entry("w", F32, shape, OWN)], [], False, "test", version=version)
    return b"".join(file_chunks(header, [payload]))


LZMA_1_2 = encode_lzma(np.float32([1, 2]).tobytes(), 4)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\x07", "further layout needs 1 bytes"),
        (b"\x07\x02" + LZMA_1_2, "layout 9 is not known here; install the gossamer release"),
        (b"\x07" + varint(1 << 62), "layout 4611686018427387911 is not known here"),
        (b"\x07\x80\x00", "further layout is not in its shortest form"),
        (b"\x0f\x00" + LZMA_1_2, "layout byte 0x0f is unknown"),
        (b"\x47\x00" + LZMA_1_2, "layout byte 0x47 is unknown"),
        (b"\x07\x00", "LZMA data of 0 bytes is not the 8 bytes"),
        (b"\x07\x00\x00", "LZMA data of 1 bytes is not the 8 bytes"),
        (b"\x07\x00" + LZMA_1_2[:-1], "is not the 8 bytes of the tensor"),
        (b"\x07\x00" + LZMA_1_2 + b"\x00", "is not the 8 bytes of the tensor"),
        (b"\x07\x00\x03" + LZMA_1_2[1:], "LZMA data is damaged"),
        (b"\x07\x00" + encode_lzma(bytes(1 << 20), 4), "expands beyond the 8 bytes"),
        (b"\x07\x00" + encode_lzma(bytes(7), 4), "is not the 8 bytes of the tensor"),
    ],
)
def test_forged_further_layouts(payload: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        unpack(file_of(payload))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_further_layout_takes_version_3_and_an_empty_tensor_has_none(version: int) -> None:
    payload = b"\x07\x00" + LZMA_1_2
    data = file_of(payload, version=version)
    if version == 3:
        assert unpack(data)["w"].tolist() == [1, 2]
        with pytest.raises(FormatError, match="lzma cannot hold an empty tensor"):
            unpack(file_of(payload, shape=(0,)))
    else:
        with pytest.raises(FormatError, match=f"byte 0x07 is unknown to version {version}"):
            unpack(data)
