"""What reading a file costs is bounded by its size and by what was asked for; told by counting."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack import Archive, describe, load_into, pack_bytes, unpack
from gossamer.pack.coders import context
from gossamer.pack.coders.limits import Reader, varint
from gossamer.pack.format import container
from gossamer.pack.format.book import decode_book
from gossamer.pack.format.container import MAGIC, OWN, SOLID, Entry, Header, file_chunks
from gossamer.pack.format.raw import compress, decode_raw, decompress
from gossamer.pack.format.section import CONTEXT, DENSE, GAPS
from gossamer.pack.format.values import BY_TORCH
from gossamer.pack.read import archive

F32, I32 = BY_TORCH[torch.float32], BY_TORCH[torch.int32]


def file_of(entries: list[Entry], payloads: list[bytes], *, metadata: bool = False) -> bytes:
    """A file with right checksums, whatever is in it."""
    return b"".join(file_chunks(Header(entries, [], metadata, version=2), payloads))


# Work that grows with the square of the file ------------------------------------------------------


class Compared(str):
    """A name that counts how often it is compared."""

    times = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Compared.times += 1
        return str.__eq__(self, other)


def test_a_duplicate_name_is_found_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i:x}" for i in range(2000)]
    data = file_of([Entry(n, F32, (0,), SOLID) for n in [*names, names[-1]]], [b"\0"])
    text = container._text
    monkeypatch.setattr(container, "_text", lambda *a: Compared(text(*a)))
    Compared.times = 0
    with pytest.raises(FormatError, match="two tensors are named '7cf'"):
        Archive(data)
    assert 0 < Compared.times <= 2 * len(names)


def test_grouped_tensors_are_found_without_walking_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 500
    values = np.arange(count, dtype="<f4")
    entries = [Entry(f"{i}", F32, (), SOLID) for i in range(count)]
    looked = 0
    numel = Entry.numel

    def counted(entry: Entry) -> int:
        nonlocal looked
        looked += 1
        return numel.fget(entry)  # type: ignore[attr-defined]

    monkeypatch.setattr(Entry, "numel", property(counted))
    data = file_of(entries, [b"\0" + values.tobytes()])
    found = unpack(data)
    assert [found[f"{i}"].item() for i in range(count)] == values.tolist()
    with Archive(data) as opened:
        opened.verify()
        assert sum(row["bytes"] for row in opened.rows()) == len(data) - opened.header.size
    assert looked <= 30 * count


def test_the_first_of_an_empty_group_bears_its_bytes() -> None:
    data = file_of([Entry(n, F32, (0,), SOLID) for n in "abc"], [b"\0"])
    with Archive(data) as opened:
        assert [row["bytes"] for row in opened.rows()] == [5, 0, 0]


def test_sections_are_named_without_a_search() -> None:
    entries = [Entry(f"{i}", F32, (1,), OWN) for i in range(50)]
    data = bytearray(file_of(entries, [b"\0\0" + bytes(4)] * 50))
    data[-1] ^= 1
    with Archive(bytes(data)) as opened, pytest.raises(FormatError, match=r"tensor '49'.*checksum"):
        opened.check_sections()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors decoded, in order."""
    seen: list[str] = []
    whole = Archive._decode

    def bits(self: Archive, index: int, entry: Entry, *rest: Any) -> Any:
        seen.append(entry.name)
        return whole(self, index, entry, *rest)

    monkeypatch.setattr(archive.Archive, "_decode", bits)
    return seen


def test_nothing_is_decoded_twice_for_its_aliases(decoded: list[str]) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    data = pack_bytes({"w": weight, **{f"a{i}": weight for i in range(9)}, "b": torch.ones(2)})
    with Archive(data) as opened:
        rows = {row["name"]: row for row in describe(opened)}
        assert decoded == ["w", "b"]
        opened.parts()
        own, tied = opened.info("w"), opened.info("a3")
        assert decoded == ["w", "b"]
        own["parts"]["raw"] = -1  # the caller's to change
        assert opened.info("w") == {**rows["w"], "shape": (3, 4)}
    assert tied["tied_to"] == "w"
    assert (tied["codec"], tied["bytes"], tied["bits_per_weight"], tied["parts"]) == (
        "tied",
        0,
        0.0,
        {},
    )
    assert (tied["nonzeros"], tied["distinct"]) == (11, 12) == (own["nonzeros"], own["distinct"])
    decoded.clear()
    with Archive(data) as opened:
        opened.verify()
    assert decoded == ["w", "b"]


def test_a_code_book_of_deltas_is_read_in_one_pass() -> None:
    count = 65_535
    deltas = bytes((count - 1 + 7) // 8)
    book = bytes([1 << 2]) + varint(count) + varint(0) + (1).to_bytes(4, "little") + b"\0" + deltas
    made = decode_book(Reader(book, "book"), I32)
    np.testing.assert_array_equal(made, np.arange(1, count + 1))


def test_a_code_book_has_no_more_values_than_its_tensor_elements() -> None:
    # 65,535 values from ten bytes: a grid of the integers from 1 on.
    book = bytes([2 << 2 | 16]) + varint(65_535) + varint(1) + varint(2)
    assert len(decode_book(Reader(book, "book"), I32)) == 65_535
    data = file_of([Entry("w", I32, (1,), OWN)], [bytes([GAPS]) + varint(0) + book])
    with pytest.raises(FormatError, match="'w': code book size is 65535, at most 1 is possible"):
        unpack(data)


@pytest.mark.parametrize("step", [1, 3, (1 << 31) // 5])
def test_an_integer_grid_keeps_to_the_range(step: int) -> None:
    def book(low: int, count: int) -> bytes:
        folded = 2 * low if low >= 0 else -2 * low - 1
        return bytes([2 << 2 | 16]) + varint(count) + varint(step) + varint(folded)

    most = (1 << 31) // step
    low = max(-most, -5)
    made = decode_book(Reader(book(low, 5), "book"), I32).view(np.int32)
    assert made.tolist() == [k * step for k in range(low, low + 6) if k][:5]
    for start in (-most - 1, most):
        with pytest.raises(FormatError, match="leaves the range of int32"):
            decode_book(Reader(book(start, 2), "book"), I32)


def test_a_row_that_is_kept_whole_is_packed() -> None:
    # What classes of columns save is estimated as more than the rest costs.
    weight = torch.zeros(300, 784)
    weight[3] = 0.5
    assert torch.equal(unpack(pack_bytes({"w": weight}))["w"], weight)


# Few bytes that expand to many --------------------------------------------------------------------


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that were asked of zstd by headers and metadata."""
    seen: list[int] = []

    def spy(data: Any, size: int, *rest: Any) -> bytes:
        seen.append(size)
        return decompress(data, size, *rest)

    monkeypatch.setattr(container, "decompress", spy)
    monkeypatch.setattr(archive, "decompress", spy)
    return seen


def test_a_header_bomb_is_refused_before_it_expands(expanded: list[int]) -> None:
    count = 1_000_000
    body = b"\0\0" + varint(count) + bytes(3 * count)
    stored = compress(body, 3)
    head = MAGIC + b"\1" + varint(len(stored) << 1 | 1) + varint(len(body)) + stored
    data = head + zlib.crc32(head).to_bytes(4, "little")
    most = (64 << 10) + 100 * len(stored)
    with pytest.raises(FormatError, match=f"expanded header length is 3000005, at most {most} is"):
        Archive(data)
    assert expanded == []


def test_names_that_are_all_the_same_end_at_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    text = container._text

    def spy(*arguments: Any) -> str:
        read.append(text(*arguments))
        return read[-1]

    monkeypatch.setattr(container, "_text", spy)
    body = b"\0\0" + varint(20_000) + bytes(60_000)
    head = MAGIC + b"\1" + varint(len(body) << 1) + body
    with pytest.raises(FormatError, match="two tensors are named ''"):
        Archive(head + zlib.crc32(head).to_bytes(4, "little"))
    assert len(read) == 3  # the writer and two names


def test_a_metadata_bomb_is_refused_before_it_expands(expanded: list[int]) -> None:
    text = b'{"a":[' + b"[]," * 1_000_000 + b"0]}"
    data = file_of([], [varint(len(text)) + compress(text, 3)], metadata=True)
    with Archive(data) as opened:
        with pytest.raises(FormatError, match="metadata: expanded length is 3000009, at most"):
            _ = opened.metadata
        assert expanded == []


def test_what_compresses_beyond_the_bound_is_written_as_it_is(expanded: list[int]) -> None:
    history = {"history": [0] * 400_000}
    data = pack_bytes({"w": torch.ones(2)}, metadata=history)
    assert len(data) > 800_000
    with Archive(data) as opened:
        assert opened.metadata == history
    assert expanded == []


def test_a_network_of_many_like_tensors_keeps_its_compressed_header(expanded: list[int]) -> None:
    names = [f"transformer.layers.{i}.attention.query.weight" for i in range(5000)]
    entries = [Entry(n, F32, (2, 1), OWN) for n in names]
    data = file_of(entries, [b"\0\0" + bytes(8)] * len(names))
    with Archive(data) as opened:
        assert opened.names == names
        assert expanded[0] > 20 * opened.header.size


# The context coder: time for every entry, however few bits it costs -------------------------------


def context_file(rows: int, cols: int, payload: int) -> bytes:
    """One float32 tensor whose section ends in so many bytes of the context coder."""
    body = bytes([CONTEXT]) + varint(1) + b"\0\1" + np.array([1], "<f4").tobytes() + b"\1\1"
    return file_of([Entry("w", F32, (rows, cols), OWN)], [body + bytes([255]) * payload])


def test_the_context_coder_is_not_begun_for_more_entries_than_bytes_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def decode(data: bytes, rows: int, cols: int) -> Any:
        asked.append(rows * cols)
        raise FormatError("asked")

    monkeypatch.setattr(context, "decode", decode)
    size = 1 + 1 + 2 + 4 + 2 + 30  # layout, kept, form and count, value, two numbers, the rest
    cols = ((1 << 16) + 1024 * size) // 64
    with pytest.raises(FormatError, match="asked"):
        unpack(context_file(64, cols, 30))
    message = f"'w': {64 * cols + 64} entries by the context coder in {size} bytes are too many"
    with pytest.raises(FormatError, match=message):
        unpack(context_file(64, cols + 1, 30))
    # 12.4 million entries in a file of 71 bytes
    with pytest.raises(FormatError, match="by the context coder in 40 bytes"):
        unpack(context_file(4096, 3017, 30))
    assert asked == [64 * cols]


@pytest.mark.parametrize("nonzeros", [0, 1, 3, 40, 2000])
def test_nearly_empty_tensors_are_packed_and_read(nonzeros: int) -> None:
    rng = np.random.default_rng(nonzeros)
    weight = np.zeros(600 * 800, np.float32)
    weight[rng.choice(len(weight), nonzeros, replace=False)] = 0.25
    data = pack_bytes({"w": torch.from_numpy(weight).reshape(600, 800)})
    with Archive(data) as opened:
        np.testing.assert_array_equal(opened.tensor("w").numpy().reshape(-1), weight)
        length = opened.header.lengths[0]
        coded = opened.info("w")["codec"] == "context"
    assert not coded or weight.size <= (1 << 16) + 1024 * length


# How much may be decoded --------------------------------------------------------------------------


def constant(count: int, name: str = "w") -> tuple[Entry, bytes]:
    """A tensor of ones in a dozen bytes."""
    book = b"\0\1" + np.array([1], "<f4").tobytes()
    return Entry(name, F32, (count,), OWN), bytes([DENSE]) + varint(count) + book


def test_a_file_of_a_few_bytes_may_claim_a_gigabyte() -> None:
    count = (1 << 30) // 4
    for more, message in ((0, None), (1, "claims 1073741828 bytes .* open it with max_bytes=1073")):
        entry, payload = constant(count + more)
        data = file_of([entry], [payload])
        if message is None:
            Archive(data).close()
            continue
        for read in (Archive, unpack):
            with pytest.raises(FormatError, match=message):
                read(data)
        Archive(data, max_bytes=4 * count + 4).close()


def test_a_larger_file_may_claim_more() -> None:
    rest = 1 << 24
    entry, payload = constant(((1 << 31) - rest) // 4)
    stored = Entry("x", BY_TORCH[torch.uint8], (rest,), OWN)
    data = file_of([entry, stored], [payload, bytes(2 + rest)])
    with Archive(data) as opened:  # 2 GiB of 16 MiB
        assert opened.dense_bytes == 1 << 31 < 128 * len(data)
    entry, payload = constant(1 << 30)
    with pytest.raises(FormatError, match="max_bytes is 2147"):
        Archive(file_of([entry, stored], [payload, bytes(2 + rest)]))


class Bias(nn.Module):
    """One parameter of so many elements."""

    def __init__(self, count: int = 2, *, device: str = "cpu") -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(count, device=device))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of every decoding that was begun."""
    seen: list[int] = []

    def raw(reader: Any, dtype: Any, count: int) -> Any:
        seen.append(count)
        return decode_raw(reader, dtype, count)

    monkeypatch.setattr(archive, "decode_raw", raw)
    return seen


@pytest.mark.parametrize("load", [load_into, gossamer.load])
def test_what_is_decoded_follows_the_model(load: Any, asked: list[int]) -> None:
    # The group of the model's one tensor claims 80 MB of another's.
    group = b"\1" + compress(bytes(8 + 80_000_000), 1)
    entries = [Entry("w", F32, (2,), SOLID), Entry("other", F32, (20_000_000,), SOLID)]
    data = file_of(entries, [group])
    model = Bias()
    with pytest.raises(
        FormatError, match=r"80000008 bytes would be decoded for 8 bytes .* pass max"
    ):
        load(data, model, strict=False)
    assert asked == []
    load(data, model, strict=False, max_bytes=80_000_008)
    assert asked == [20_000_002]
    with pytest.raises(FormatError, match="max_bytes is 80000007"):
        load(data, model, strict=False, max_bytes=80_000_007)


@pytest.mark.parametrize("load", [load_into, gossamer.load])
def test_a_model_may_be_as_large_as_it_is(load: Any) -> None:
    # Beyond what the file's size alone allows. The model's shape is wrong: nothing is decoded.
    entry, payload = constant((1 << 34) // 4)
    data = file_of([entry], [payload])
    with pytest.raises(ArgumentError, match=r"'w' is float32\[4294967296\] in the file"):
        load(data, Bias())
    with pytest.raises(FormatError, match="claims 17179869184 bytes"):
        Archive(data)
    # What the model does not have is not decoded, and costs nothing.
    entry, _ = constant((1 << 34) // 4, "head")
    other, more = constant(3)
    model = Bias(3)
    load(file_of([entry, other], [payload, more]), model, strict=False)
    assert model.w.tolist() == [1, 1, 1]
