"""The ``.gsm`` container: header, sections, checksums. Every byte is in ``docs/format.md``.

Sections follow one another in the order of the header's lengths, so an overlap or a hole cannot
even be written down.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack.coders.limits import (
    MAX_DIMENSIONS,
    MAX_HEADER,
    VERSION,
    Reader,
    expansion,
    tensors,
    varint,
)
from gossamer.pack.format.raw import compress, decompress
from gossamer.pack.format.values import BY_CODE, DType

__all__ = [
    "MAGIC",
    "Entry",
    "Header",
    "check_names",
    "file_chunks",
    "read_body",
    "read_header",
    "section_chunks",
    "section_crc",
    "write_header",
]

MAGIC = b"\x89GSM"
try:
    WRITER = metadata.version("gossamer")
except metadata.PackageNotFoundError:  # run from a source tree that was never installed
    WRITER = "source"

OWN, SOLID, ALIAS = range(3)
_METADATA = 1


@dataclass(frozen=True)
class Entry:
    """One tensor of the header.

    Attributes:
        name: clean parameter name.
        dtype, shape: of the tensor (an alias has its target's).
        place: ``OWN`` section, member of its dtype's ``SOLID`` section, or ``ALIAS``.
        target: for an alias, the index of the tensor it is.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    place: int
    target: int = -1

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass
class Header:
    """What the start of a file says.

    Attributes:
        entries: the tensors, in order.
        lengths: payload bytes of each section.
        has_metadata: whether section 0 is the metadata.
        writer: version of the library that wrote the file.
        crc: of the header.
        size: bytes up to the first section.
        version: of the format.
    """

    entries: list[Entry]
    lengths: list[int]
    has_metadata: bool
    writer: str = WRITER
    crc: int = 0
    size: int = 0
    offsets: list[int] = field(default_factory=list)
    version: int = 1

    def solids(self) -> list[DType]:
        """The dtypes that have a solid section, in the order of those sections."""
        codes = {e.dtype.code for e in self.entries if e.place == SOLID}
        return [BY_CODE[c] for c in sorted(codes)]

    @property
    def sections(self) -> int:
        """How many sections the entries call for."""
        own = sum(e.place == OWN for e in self.entries)
        return self.has_metadata + len(self.solids()) + own


def write_header(header: Header) -> bytes:
    """The header's bytes, checksum and all; sets ``header.crc``."""
    writer = header.writer.encode()
    parts = bytearray([len(writer)]) + writer + bytes([_METADATA * header.has_metadata])
    parts += varint(len(header.entries))
    for entry in header.entries:
        name = entry.name.encode()
        parts += varint(len(name)) + name
    parts += bytes(e.dtype.code | e.place << 5 for e in header.entries)
    for entry in header.entries:
        if entry.place == ALIAS:
            parts += varint(entry.target)
        else:
            parts += varint(len(entry.shape)) + b"".join(varint(d) for d in entry.shape)
    parts += b"".join(varint(length) for length in header.lengths)
    body = bytes(parts)
    stored, head = body, varint(len(body) << 1)
    packed = compress(body)
    bounded = len(body) <= expansion(len(packed)) and len(header.entries) <= tensors(len(packed))
    if bounded and len(packed) + len(varint(len(body))) < len(body):
        stored, head = packed, varint(len(packed) << 1 | 1) + varint(len(body))
    out = MAGIC + bytes([header.version]) + head + stored
    header.crc = zlib.crc32(out)
    return out + header.crc.to_bytes(4, "little")


def file_chunks(header: Header, payloads: Sequence[bytes]) -> list[bytes]:
    """A whole file: the header, which gets its lengths here, and the checked sections."""
    header.lengths = [len(p) for p in payloads]
    return list(section_chunks(header, payloads))


def section_chunks(header: Header, payloads: Iterable[bytes]) -> Iterator[bytes]:
    """A whole file, of a header with its lengths and payloads that come one by one."""
    yield write_header(header)
    for number, payload in enumerate(payloads):
        yield payload
        yield section_crc(header.crc, number, payload).to_bytes(4, "little")


def section_crc(header_crc: int, number: int, payload: bytes | memoryview) -> int:
    """CRC-32 of the header, the section's number and its payload, one after the other.

    A section in another place, or under another header, therefore does not pass.
    """
    return zlib.crc32(payload, zlib.crc32(varint(number), header_crc))


def read_header(data: bytes, file_size: int, where: str) -> Header:
    """Check and read the header from the first bytes of a file.

    Args:
        data: the file's beginning; all of the header must be in it.
        file_size: bytes of the whole file.
        where: the file's name, for messages.

    Raises :class:`FormatError` for another kind of file, another version, damage, or sections
    that do not add up to the file.
    """
    reader = Reader(data, where)
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise FormatError(
            f"{where}: not a .gsm file (it begins with {bytes(data[:4])!r}, not {MAGIC!r}); "
            "pass a file that gossamer.pack.pack wrote"
        )
    reader.take(len(MAGIC), "magic")
    version = reader.u8("version")
    if not 1 <= version <= VERSION:
        raise FormatError(
            f"{where}: format version {version}; gossamer {WRITER} reads versions 1 to {VERSION}. "
            "If the file is whole, install the gossamer release that wrote it"
        )
    head = reader.varint("header length", MAX_HEADER << 1 | 1)
    expanded = reader.varint("expanded header length", expansion(head >> 1)) if head & 1 else 0
    stored = reader.take(head >> 1, "header")
    crc = zlib.crc32(reader.data[: reader.at])
    if int.from_bytes(reader.take(4, "header checksum"), "little") != crc:
        raise reader.fail("the header does not match its checksum")
    body = decompress(stored, expanded, reader, "header") if head & 1 else bytes(stored)
    header = read_body(Reader(body, f"{where}: header"), tensors(head >> 1))
    header.crc, header.size, header.version = crc, reader.at, version
    at = header.size
    for length in header.lengths:
        header.offsets.append(at)
        at += length + 4
    if at != file_size:
        problem = "truncated" if at > file_size else "longer than it should be"
        raise reader.fail(f"{problem}: {file_size} bytes, the header describes {at}")
    return header


def read_body(reader: Reader, most: int) -> Header:
    """The header's contents, expanded and past its checksum; lengths unchecked by the file.

    ``most``: how many tensors there may be.
    """
    writer = _text(reader, reader.take(reader.u8("writer"), "writer"), "writer")
    reader.where += f" (written by gossamer {writer})"
    flags = reader.u8("flags")
    if flags & ~_METADATA:
        raise reader.fail(f"flags {flags:#04x} are unknown to gossamer {WRITER}")
    count = reader.varint("number of tensors", min(most, reader.left // 3))
    names: dict[str, None] = {}
    for _ in range(count):
        name = _text(reader, reader.block("a name"), "a name")
        if name in names:
            raise reader.fail(f"two tensors are named {name!r}")
        names[name] = None
    kinds = reader.take(count, "kinds")
    entries: list[Entry] = []
    for name, kind in zip(names, kinds, strict=True):
        code, place = kind & 31, kind >> 5
        dtype = BY_CODE.get(code)
        if dtype is None or place > ALIAS:
            raise reader.fail(f"tensor {name!r} is of unknown kind {kind:#04x}")
        if place == ALIAS:
            index = reader.varint(f"target of {name!r}", count - 1)
            entries.append(Entry(name, dtype, (), ALIAS, index))
            continue
        dimensions = reader.varint(f"dimensions of {name!r}", MAX_DIMENSIONS)
        what = f"shape of {name!r}"
        shape = tuple([reader.varint(what, 1 << 48) for _ in range(dimensions)])
        extent = 1
        for size in shape:
            extent *= max(size, 1)
        if extent * dtype.size >= 1 << 62:
            raise reader.fail(f"tensor {name!r} has the impossible shape {shape}")
        entries.append(Entry(name, dtype, shape, place))
    for i, entry in enumerate(entries):
        if entry.place == ALIAS:
            target = entries[entry.target]
            if target.place == ALIAS or target.dtype is not entry.dtype:
                raise reader.fail(f"tensor {entry.name!r} is tied to {target.name!r}, no tensor")
            entries[i] = Entry(entry.name, target.dtype, target.shape, ALIAS, entry.target)
    header = Header(entries, [], bool(flags & _METADATA), writer)
    header.lengths = [reader.varint("length of a section") for _ in range(header.sections)]
    reader.done()
    return header


def _text(reader: Reader, data: memoryview, what: str) -> str:
    try:
        return bytes(data).decode()
    except UnicodeDecodeError as e:
        raise reader.fail(f"{what} is not UTF-8 ({bytes(data[:20])!r}: {e.reason})") from None


def check_names(names: Sequence[str]) -> None:
    """Raise :class:`ArgumentError` for a name that no file can hold."""
    for name in names:
        try:
            name.encode()
        except (UnicodeEncodeError, AttributeError):
            raise ArgumentError(f"tensor name {name!r} is no valid text; rename it") from None
