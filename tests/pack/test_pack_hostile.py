"""Damaged and hostile files: a FormatError or exactly the right tensors, never anything else."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damage import mutated
from gossamer.core.errors import FormatError
from gossamer.pack import Archive, pack_bytes, unpack
from gossamer.pack.coders.limits import VERSION, Reader, varint
from gossamer.pack.coders.table import CODERS
from gossamer.pack.format.container import ALIAS, MAGIC, OWN, SOLID, Entry, Header, section_crc
from gossamer.pack.format.lzma_bytes import encode_lzma
from gossamer.pack.format.raw import compress
from gossamer.pack.format.section import parse
from gossamer.pack.format.values import BY_TORCH, analyse, to_bits
from gossamer.pack.read.decode import decode_section
from gossamer.pack.write.layouts import (
    Settings,
    bitmap_section,
    context_section,
    dense_section,
    gaps_section,
    paper_section,
    row_scan,
    scaled_section,
    transposed,
)
from gossamer.pack.write.scales import find_scales
from toy_coder import Toy

F32 = BY_TORCH[torch.float32]
QUICK = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])


def small_state() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    book = np.array([0, 0, 0, 0, -1.5, 0.3, 0.7], np.float32)
    weight = torch.from_numpy(book[rng.integers(0, 7, (9, 14))])
    return {
        "fc.weight": weight,
        "fc.bias": torch.from_numpy(rng.normal(size=20).astype(np.float32)),
        "tied": weight,
        "steps": torch.tensor(5),
    }


def small_file(**options: object) -> bytes:
    return pack_bytes(small_state(), metadata={"a": [1, 2]}, **options)


def read_all(data: bytes) -> dict[str, torch.Tensor]:
    with Archive(data) as archive:
        archive.verify()
        return archive.tensors()


@pytest.mark.parametrize("profile", ["smallest", "fast", "huffman"])
def test_every_flipped_byte_is_noticed(profile: str) -> None:
    data = small_file(profile=profile)
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            with pytest.raises(FormatError):
                read_all(bytes(damaged))


def test_every_truncation_and_any_appendix_is_noticed() -> None:
    data = small_file()
    for size in range(len(data)):
        with pytest.raises(FormatError):
            Archive(data[:size])
    with pytest.raises(FormatError, match="longer than it should be"):
        Archive(data + b"\0")


def test_what_the_messages_say(tmp_path) -> None:
    path = tmp_path / "net.gsm"
    data = small_file()
    path.write_bytes(b"PK\x03\x04" + data[4:])
    with pytest.raises(FormatError, match=r"net.gsm: not a .gsm file \(it begins with b'PK"):
        Archive(path)
    path.write_bytes(data[:4] + b"\x07" + data[5:])
    with pytest.raises(
        FormatError, match=r"format version 7; gossamer .* reads versions 1 to 3.*install"
    ):
        Archive(path)
    path.write_bytes(data[:-6])
    with pytest.raises(FormatError, match=r"net.gsm: truncated: \d+ bytes, .* describes \d+"):
        Archive(path)
    path.write_bytes(b"")
    with pytest.raises(FormatError, match=r"not a .gsm file"):
        Archive(path)
    damaged = bytearray(data)
    damaged[-20] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(FormatError, match=r"tensor 'fc.weight': .* checksum.*pack it again"):
        unpack(path)


def test_swapped_sections_do_not_pass() -> None:
    data = pack_bytes({n: torch.full((30, 30), v) for n, v in (("a", 1.1), ("b", 2.2))})
    with Archive(data) as archive:
        length, other = archive.header.lengths
        start = archive.header.size
    assert length == other
    one, two = data[start : start + length + 4], data[start + length + 4 :]
    assert one != two
    with pytest.raises(FormatError, match=r"tensor 'a'.*checksum"):
        unpack(data[:start] + two + one)


# Files with right checksums and wrong contents ---------------------------------------------------


def file_of(body: bytes, payloads: list[bytes], *, packed: int | None = None) -> bytes:
    head = MAGIC + b"\x01"
    if packed is None:
        head += varint(len(body) << 1) + body
    else:
        stored = compress(body)
        head += varint(len(stored) << 1 | 1) + varint(packed) + stored
    crc = zlib.crc32(head)
    out = head + crc.to_bytes(4, "little")
    for number, payload in enumerate(payloads):
        out += payload + section_crc(crc, number, payload).to_bytes(4, "little")
    return out


def body_of(
    names: list[bytes], kinds: bytes, shapes: bytes, lengths: list[int], flags: int = 0
) -> bytes:
    out = b"\x04test" + bytes([flags]) + varint(len(names))
    out += b"".join(varint(len(n)) + n for n in names)
    return out + kinds + shapes + b"".join(varint(n) for n in lengths)


def dims(*sizes: int) -> bytes:
    return varint(len(sizes)) + b"".join(varint(s) for s in sizes)


RAW_F32 = b"\x00\x00" + np.float32([1, 2]).tobytes()


def test_a_forged_file_is_readable_so_the_next_tests_test_something() -> None:
    body = body_of([b"w"], b"\x00", dims(2), [len(RAW_F32)])
    for packed in (None, len(body)):
        assert unpack(file_of(body, [RAW_F32], packed=packed))["w"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (body_of([b"w", b"w"], b"\0\0", dims(2) * 2, [10, 10]), "two tensors are named 'w'"),
        (body_of([b"\xff\xfe"], b"\0", dims(2), [10]), "a name is not UTF-8"),
        (body_of([b"w"], b"\x1f", dims(2), [10]), "'w' is of unknown kind 0x1f"),
        (body_of([b"w"], b"\x60", dims(2), [10]), "'w' is of unknown kind 0x60"),
        (body_of([b"w"], b"\x40", varint(0), []), "'w' is tied to 'w', no tensor"),
        (body_of([b"w"], b"\x40", varint(9), []), "target of 'w' is 9, at most 0"),
        (body_of([b"w", b"v"], b"\0\x41", dims(2) + varint(0), [10]), "'v' is tied to 'w'"),
        (body_of([b"w"], b"\0", dims(*[1] * 33), [10]), "dimensions of 'w' is 33, at most 32"),
        (body_of([b"w"], b"\0", dims(1 << 40, 1 << 40), [10]), "impossible shape"),
        (body_of([b"w"], b"\0", dims(0, 1 << 40, 1 << 40), [10]), "impossible shape"),
        (body_of([b"w"], b"\0", dims(1 << 38), [10]), "claims 1099511627776 bytes.*max_bytes="),
        (body_of([b"w"], b"\0", dims(2), [10], flags=4), "flags 0x04 are unknown"),
        (body_of([b"w"], b"\0", dims(2), [1 << 62]), "truncated"),
        (body_of([b"w"], b"\0", dims(2), [10, 10]), "header .*1 bytes too many"),
        (body_of([b"w"], b"\0", dims(2), []), "length of a section needs 1 bytes"),
        (b"\x04test\0" + varint(1 << 40), "number of tensors is 1099511627776"),
        (b"\xfftest", "writer needs 255 bytes"),
        (b"", "writer needs 1 bytes"),
    ],
)
def test_forged_headers(body: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        unpack(file_of(body, [RAW_F32]))


def test_a_header_that_expands_wrongly() -> None:
    body = body_of([b"w"], b"\x00", dims(2), [len(RAW_F32)])
    for claimed in (0, len(body) - 1, len(body) + 1):
        with pytest.raises(FormatError, match="header"):
            unpack(file_of(body, [RAW_F32], packed=claimed))
    with pytest.raises(FormatError, match="expanded header length is"):
        unpack(file_of(body, [RAW_F32], packed=1 << 40))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "expanded length"),
        (b"\0[1]", "a JSON list, not an object"),
        (b"\0{", "is no JSON"),
        (b"\0\xff", "is no JSON"),
        (b"\0" + b"[" * 100_000, "is no JSON"),
        (varint(5) + compress(b'{"a":1}'), "expands beyond the 5"),
        (varint(1 << 40) + compress(b"{}"), "at most"),
    ],
)
def test_forged_metadata(payload: bytes, message: str) -> None:
    body = body_of([], b"", b"", [len(payload)], flags=1)
    with Archive(file_of(body, [payload])) as archive, pytest.raises(FormatError, match=message):
        _ = archive.metadata
    good = b"\0" + json.dumps({"a": 1}).encode()
    body = body_of([], b"", b"", [len(good)], flags=1)
    assert Archive(file_of(body, [good])).metadata == {"a": 1}


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "layout needs 1 bytes"),
        (b"\x07", "layout byte 0x07 is unknown"),
        (b"\x80", "layout byte 0x80 is unknown"),
        (b"\x08", "layout byte 0x08 is unknown"),
        (b"\x00\x08", "raw form 0x08"),
        (b"\x00\x00" + bytes(7), "raw values needs 8 bytes"),
        (b"\x00\x00" + bytes(9), "1 bytes too many"),
        (b"\x02\x03", "non-zero entries is 3, at most 2"),
        (b"\x01\x00\x00\x00", "dense symbols without any value"),
        (b"\x01\x01\x00\x01" + np.float32([1]).tobytes(), "1 of 2 entries, all of which are"),
        (b"\x02\x01\x00\x00", "escapes needs 1 bytes"),
        (b"\x01\x02\x00\x02" + np.float32([1, 1]).tobytes(), "not ascending"),
        (b"\x01\x02\x00\x02" + np.float32([2, 1]).tobytes(), "not ascending"),
        (b"\x01\x02\x00\x01" + np.float32([0]).tobytes(), "holds zero"),
        (b"\x01\x02\x00\x02" + np.float32([1, 2]).tobytes() + b"\x03", "symbol coder 3"),
        (b"\x04\x00\x00\x00\x00", "index bits 0"),
        (b"\x04\x00\x00\x00\x05\x03", "fillers is 3, at most 2"),
        (b"\x11\x02\x00\x01" + np.float32([1]).tobytes() + b"\x09", "9 column classes"),
    ],
)
def test_forged_sections(payload: bytes, message: str) -> None:
    body = body_of([b"w"], b"\x00", dims(2), [len(payload)])
    with pytest.raises(FormatError, match=message):
        unpack(file_of(body, [payload]))


def test_bool_holds_only_true_and_false() -> None:
    body = body_of([b"m"], b"\x09", dims(2), [4])
    with pytest.raises(FormatError, match="'m' is bool but holds the byte 2"):
        unpack(file_of(body, [b"\0\0\1\2"]))


@contextmanager
def toy_registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CODERS, "_entries", {**CODERS._entries, "toy": Toy()})
        yield


def sections() -> list[tuple[bytes, np.ndarray, tuple[int, ...]]]:
    """One section of every layout."""
    rng = np.random.default_rng(3)
    book = np.array([-1.5, -0.2, 0.3, 0.7], np.float32)
    keep = rng.random((12, 40)) < np.where(np.arange(40) < 20, 0.05, 0.5)
    tensor = torch.from_numpy(np.where(keep, book[rng.integers(0, 4, (12, 40))], np.float32(0)))
    noise = torch.from_numpy(np.where(keep, rng.normal(size=(12, 40)), 0).astype(np.float32))
    classes = (np.arange(40) >= 20).astype(np.uint8)
    rows = (np.arange(12) >= 4).astype(np.uint8)
    s = Settings()
    out = []
    for t in (tensor, noise):
        dtype, bits = to_bits("t", t)
        v = analyse(bits, dtype, (12, 40))
        if t is noise:
            assert v.book is None
        scan = row_scan(v)
        made = [f(v, s, scan, c) for f in (gaps_section, bitmap_section) for c in (None, classes)]
        made += [f(v, s, transposed(scan), rows) for f in (gaps_section, bitmap_section)]
        if v.book is not None:
            made += [dense_section(v, s, scan, c) for c in (None, classes)]
            made += [dense_section(v, s, transposed(scan), rows)]
            made += [context_section(v), paper_section(v, s)]
        made += [b"\x07\x00" + encode_lzma(bits.tobytes(), 4)]
        out += [(bytes(m), bits, (12, 40)) for m in made]
    with toy_registered():  # a symbol coder told by its name
        made = torch.randint(-7, 8, (12, 40), generator=torch.Generator().manual_seed(0))
        dtype, bits = to_bits("t", made * torch.arange(1.0, 13).sqrt()[:, None])
        scales, codes = find_scales(bits, dtype, (12, 40)) or pytest.fail("they have scales")
        v = analyse(codes, scales.codes, (12, 40))
        for inner in (context_section(v), bytes(gaps_section(v, s, row_scan(v), None))):
            out.append((scaled_section(scales, inner), bits, (12, 40)))
        v, toy = analyse(*reversed(to_bits("t", tensor)), (12, 40)), Settings(coders=("toy",))
        for section in (gaps_section, dense_section):
            out.append((bytes(section(v, toy, row_scan(v), classes)), v.bits, (12, 40)))
    return out


SECTIONS = sections()


def test_every_layout_decodes() -> None:
    assert {data[0] & 7 for data, _, _ in SECTIONS} == {1, 2, 3, 4, 5, 7}
    for data, bits, shape in SECTIONS:
        np.testing.assert_array_equal(outcome(data, shape), bits)
        out = np.full(480, 7, np.uint32)
        with toy_registered():
            assert decode_section(data, F32, shape, 480, "x", out) is out
        np.testing.assert_array_equal(out, bits)
    assert sum(b"\x03toy" in data for data, _, _ in SECTIONS) == 2


def test_the_parts_of_a_section_add_up_and_its_classes_may_be_empty() -> None:
    with toy_registered():
        for data, _, shape in SECTIONS:
            section = parse(Reader(data, "x", VERSION), F32, shape, 480)
            assert sum(section.parts.values()) == len(data)
    bits = np.zeros((3, 4), np.uint32)
    bits[1, :2] = np.float32([1, 2]).view(np.uint32)
    v, s = analyse(bits.reshape(-1), F32, (3, 4)), Settings()
    for kind in (gaps_section, bitmap_section):
        for first in (0, 1):  # the class that has none comes last, or first
            classes = np.array([first, first, 1 - first, 1 - first], np.uint8)
            coded = bytes(kind(v, s, row_scan(v), classes))
            assert decode_section(coded, F32, (3, 4), 12, "x").tolist() == bits.reshape(-1).tolist()


def outcome(data: bytes, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        with toy_registered():
            bits = decode_section(data, F32, shape, 480, "x")
    except FormatError:
        return None
    assert bits.shape == (480,)
    assert bits.dtype == np.uint32
    return bits


@QUICK
@given(st.data())
def test_mutated_sections_give_an_error_or_a_tensor_the_same_compiled_and_plain(
    data: st.DataObject,
) -> None:
    section, _, shape = data.draw(st.sampled_from(SECTIONS))
    damaged = bytearray(section)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                damaged[at] = data.draw(st.integers(0, 255))
            case 1:
                del damaged[at : at + data.draw(st.integers(1, 4))]
            case 2:
                damaged[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        if not damaged:
            break
    compiled = outcome(bytes(damaged), shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_NATIVE", "0")
        plain = outcome(bytes(damaged), shape)
    np.testing.assert_equal(plain, compiled)


@QUICK
@given(
    st.integers(0, 127),
    st.binary(max_size=80),
    st.sampled_from([(1,), (7,), (3, 5), (2, 3, 2, 2), (40, 30), ()]),
    st.sampled_from(list(BY_TORCH.values())),
)
def test_random_sections_give_an_error_or_a_tensor(first, data, shape, dtype) -> None:
    numel = int(np.prod(shape))
    try:
        bits = decode_section(bytes([first]) + data, dtype, shape, numel, "x")
    except FormatError:
        return
    assert bits.shape == (numel,)


@QUICK
@given(st.data())
def test_mutated_headers_give_an_error_or_tensors(data: st.DataObject) -> None:
    body = body_of([b"w", b"b", b"t"], b"\0\x20\x40", dims(2) + dims(2) + b"\0", [9, 10])
    try:
        tensors = unpack(file_of(mutated(data, body), [RAW_F32[1:], RAW_F32]))
    except FormatError:
        return
    assert all(isinstance(t, torch.Tensor) for t in tensors.values())


@QUICK
@given(st.binary(max_size=200))
def test_random_files(data: bytes) -> None:
    for prefix in (b"", MAGIC, MAGIC + b"\x01", MAGIC + b"\x03"):
        with pytest.raises(FormatError):
            unpack(prefix + data)


def test_header_sections_add_up() -> None:
    entries = [Entry("a", F32, (2,), OWN), Entry("b", F32, (), SOLID), Entry("c", F32, (), ALIAS)]
    assert Header(entries, [], True).sections == 3
    assert Reader(b"", "x").left == 0
