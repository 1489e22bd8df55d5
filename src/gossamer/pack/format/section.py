"""One coded tensor's bytes, taken apart but not yet decoded. Layout: ``docs/format.md``."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.seeds import FACTORS, SCALES, SCHEMES, Seed
from gossamer.pack.coders.bits import as_symbols, histogram
from gossamer.pack.coders.limits import NAMES, SEEDS, Reader
from gossamer.pack.coders.table import CODERS, NAMED, NUMBERED, named
from gossamer.pack.format.book import decode_book
from gossamer.pack.format.scales import Scales, read_scales
from gossamer.pack.format.values import BY_TORCH, Bits, DType

__all__ = [
    "BITMAP",
    "CLASSES",
    "CONTEXT",
    "DENSE",
    "FURTHER",
    "GAPS",
    "LAYOUTS",
    "LZMA",
    "PAPER",
    "RAW",
    "RAW_VALUES",
    "SCALED",
    "SEEDED",
    "TRANSPOSED",
    "ZERO",
    "Section",
    "Stream",
    "matrix",
    "parse",
    "symbols",
]

RAW, DENSE, GAPS, BITMAP, PAPER, CONTEXT, SEEDED, LZMA, SCALED = range(9)
LAYOUTS = ("raw", "dense", "gaps", "bitmap", "fixed gaps", "context", "seeded", "lzma", "scaled")

FURTHER = 7
"""In the first byte: what the layout exceeds this by follows as a varint."""

# Flags in the first byte, above the three bits of the layout.
TRANSPOSED, CLASSES, RAW_VALUES, ZERO = 8, 16, 32, 64

_ALLOWED = {
    RAW: 0,
    DENSE: TRANSPOSED | CLASSES | ZERO,
    GAPS: TRANSPOSED | CLASSES | RAW_VALUES,
    BITMAP: TRANSPOSED | CLASSES | RAW_VALUES,
    PAPER: 0,
    CONTEXT: 0,
    SEEDED: 0,
    LZMA: 0,
}
MAX_CLASSES = 8
FACTOR = 128  # in the byte of a seed's scheme


@dataclass(frozen=True)
class Stream:
    """Encoded symbols: the coder's name, how many, below what, and the bytes."""

    coder: str
    count: int
    alphabet: int
    data: memoryview


@dataclass
class Section:
    """A coded tensor before decoding.

    Attributes:
        layout: one of ``RAW .. LZMA``; of a seeded tensor its mask's, of a scaled one its codes'.
        flags: the first byte's flags.
        shape: rows and columns of the scanned matrix (transposed already).
        kept: non-zero entries, per column class.
        book: distinct non-zero values, or ``None`` for raw ones.
        classes: of the columns; ``None`` when there is one.
        classed: the stream that they came from.
        widths: columns of each class.
        positions: per class.
        codes: index into ``book`` per entry; ``None`` when there is nothing to tell.
        raw: bytes with another coding (raw values, context coding, LZMA).
        index_bits: of the fixed gaps.
        seed: where the values come from; everything else is then the mask's.
        scales: what the codes are to be multiplied by; everything else is then the codes'.
        parts: bytes by purpose; they add up to the section.
    """

    layout: int
    flags: int = 0
    shape: tuple[int, int] = (0, 0)
    kept: list[int] = field(default_factory=list)
    book: Bits | None = None
    classes: NDArray[np.unsignedinteger] | None = None
    classed: Stream | None = None
    widths: list[int] = field(default_factory=list)
    positions: list[Stream | None] = field(default_factory=list)
    codes: Stream | None = None
    raw: memoryview = field(default_factory=lambda: memoryview(b""))
    index_bits: int = 0
    seed: Seed | None = None
    scales: Scales | None = None
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The oldest version of a file that can hold it."""
        coders = {s.coder for s in (self.classed, *self.positions, self.codes) if s}
        further = self.layout >= FURTHER or self.scales is not None
        if further or not coders <= set(NUMBERED):
            return NAMES
        return 1 if self.seed is None else SEEDS

    @property
    def chain(self) -> str:
        """The codecs in words, for tables: ``gaps(rans) codes(rans)``."""
        names = [LAYOUTS[self.layout]]
        used = sorted({s.coder for s in self.positions if s})
        if used:
            names[0] += f"({','.join(used)})"
        if self.seed is not None:
            names.insert(0, f"seeded({self.seed.scheme})")
        if self.scales is not None:
            names.insert(0, f"scaled({self.scales.group})")
        if self.flags & TRANSPOSED:
            names.append("columns")
        if self.flags & CLASSES:
            names.append(f"classes({len(self.widths)})")
        if self.codes:
            names.append(f"codes({self.codes.coder})")
        elif self.flags & RAW_VALUES:
            names.append("raw values")
        return " ".join(names)


def matrix(shape: tuple[int, ...], numel: int) -> tuple[int, int]:
    """Rows and columns of a tensor: ``(out, in, kh, kw)`` is out by in*kh*kw."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, numel // rows if rows else 0


def parse(reader: Reader, dtype: DType, shape: tuple[int, ...], numel: int) -> Section:
    """Take a section apart; FormatError wherever it contradicts itself or the shape."""
    before = reader.at
    first = reader.u8("layout")
    layout, flags = first & 7, first & ~7
    if layout == SEEDED and reader.version < SEEDS:
        raise FormatError(f"{reader.where} is seeded in a file of version {reader.version}")
    if flags & ~_ALLOWED[layout] or (layout == FURTHER and reader.version < NAMES):
        raise reader.fail(f"layout byte {first:#04x} is unknown to version {reader.version}")
    if layout == FURTHER:
        layout += reader.varint("further layout")
        if layout >= len(LAYOUTS):
            raise FormatError(
                f"{reader.where}: layout {layout} is not known here; install the gossamer release "
                "that wrote the file"
            )
    section = Section(layout, flags)
    if layout == RAW:
        section.raw = reader.rest()
        section.parts = {"raw": len(section.raw), "framing": 1}
        return section
    if numel == 0:
        raise reader.fail(f"layout {LAYOUTS[layout]} cannot hold an empty tensor")
    if layout == SEEDED:
        return _seeded(reader, dtype, shape, numel)
    if layout == SCALED:
        return _scaled(reader, dtype, shape, numel)
    if layout == LZMA:
        section.raw = reader.rest()
        section.parts = {"raw": len(section.raw), "framing": reader.at - before - len(section.raw)}
        return section
    rows, cols = matrix(shape, numel)
    section.shape = (cols, rows) if flags & TRANSPOSED else (rows, cols)
    whole = len(reader.data) - before
    total = reader.varint("non-zero entries", numel)
    before = reader.at
    if not flags & RAW_VALUES:
        section.book = decode_book(reader, dtype, numel)
    parts = {"codebook": reader.at - before}
    groups = [numel]
    if flags & CLASSES:
        groups = _classes(reader, section, parts)
    if layout == DENSE:
        _dense(reader, section, total, groups, parts)
    elif layout in (GAPS, BITMAP):
        _positions(reader, section, total, groups, parts)
    elif layout == PAPER:
        _paper(reader, section, total, numel, parts)
    else:
        section.kept = [total]
        section.raw = reader.rest()
        parts["context"] = len(section.raw)
    reader.done()
    parts["framing"] = whole - sum(parts.values())
    section.parts = {k: v for k, v in parts.items() if v}
    return section


def _seeded(reader: Reader, dtype: DType, shape: tuple[int, ...], numel: int) -> Section:
    """The seed, and the mask's section."""
    if dtype.torch != torch.float32:
        raise reader.fail(f"a seed gives float32, not {dtype.name}")
    form = reader.u8("scheme")
    if form & ~FACTOR >= len(SCHEMES):
        raise reader.fail(f"scheme {form:#04x} is unknown to this version")
    seed = int.from_bytes(reader.take(8, "seed"), "little")
    stream = reader.varint("stream")
    scale = _between(reader, "scale", SCALES)
    factor = _between(reader, "factor", FACTORS) if form & FACTOR else 1.0
    spent = reader.at  # the layout byte and the seed
    _check_plain(reader, "a mask that is itself")
    section = parse(reader, BY_TORCH[torch.bool], shape, numel)
    section.seed = Seed(SCHEMES[form & ~FACTOR], seed, stream, scale, factor)
    section.parts["seed"] = spent
    return section


def _scaled(reader: Reader, dtype: DType, shape: tuple[int, ...], numel: int) -> Section:
    """The scales, and the codes' section."""
    scales = read_scales(reader, dtype, shape)
    spent = reader.at  # the layout and the scales
    _check_plain(reader, "codes that are themselves")
    section = parse(reader, scales.codes, shape, numel)
    section.scales = scales
    section.parts["scales"] = spent
    return section


def _check_plain(reader: Reader, what: str) -> None:
    """A section inside another is neither seeded nor scaled."""
    inner = Reader(reader.data[reader.at :], reader.where)
    if not inner.left:
        return
    layout = inner.u8("layout") & 7
    if layout == FURTHER and inner.left:
        layout += inner.varint("further layout")
    if layout in (SEEDED, SCALED):
        raise reader.fail(f"{what} {LAYOUTS[layout]}")


def _between(reader: Reader, what: str, bounds: tuple[float, float]) -> float:
    value = float(np.frombuffer(reader.take(4, what), "<f4")[0])
    if not bounds[0] <= value <= bounds[1]:  # NaN is not, either
        raise reader.fail(f"{what} is {value}, allowed are {bounds[0]} to {bounds[1]}")
    return value


def _stream(reader: Reader, what: str, count: int, alphabet: int) -> Stream:
    head = reader.varint(f"length of {what}")
    coder = _name(reader, what) if head & 3 == NAMED else NUMBERED[head & 3]
    return Stream(coder, count, alphabet, reader.take(head >> 2, what))


def _name(reader: Reader, what: str) -> str:
    """The name of a coder, which must be known here."""
    if reader.version < NAMES:
        raise reader.fail(f"{what}: symbol coder {NAMED} in a file of version {reader.version}")
    length = reader.u8(f"{what}: coder's name")
    name = bytes(reader.take(length, f"{what}: coder's name")).decode("latin-1")
    if not named(name) or name in NUMBERED:
        raise reader.fail(f"{what}: no symbol coder is told by the name {name!a}")
    if name not in CODERS:
        raise FormatError(
            f'{reader.where}: {what}: symbol coder "{name}" is not known here; install the '
            "package that registers it"
        )
    return name


def _size(section: Section) -> int:
    return 0 if section.book is None else len(section.book)


def _classes(reader: Reader, section: Section, parts: dict[str, int]) -> list[int]:
    before = reader.at
    count = reader.u8("column classes")
    if not 2 <= count <= MAX_CLASSES:
        raise reader.fail(f"{count} column classes, allowed are 2 to {MAX_CLASSES}")
    rows, cols = section.shape
    section.classed = stream = _stream(reader, "column classes", cols, count)
    section.classes = symbols(reader, stream, "column classes")
    section.widths = histogram(section.classes, count).tolist()
    parts["classes"] = reader.at - before
    return [rows * width for width in section.widths]


def symbols(reader: Reader, stream: Stream, what: str) -> NDArray[np.unsignedinteger]:
    """Decode a stream, adding the place to the coder's message."""
    coder = CODERS[stream.coder]
    try:
        found = coder.decode(stream.data, stream.count, stream.alphabet)
    except FormatError as e:
        raise FormatError(f"{reader.where}: {what}: {e}") from None
    if stream.coder in NUMBERED:
        return found
    try:  # another package's, which may not check
        found = as_symbols(found, stream.alphabet)
    except ArgumentError as e:
        raise FormatError(f"{reader.where}: {what}: symbol coder {stream.coder!r}: {e}") from None
    if len(found) != stream.count:
        raise FormatError(
            f"{reader.where}: {what}: symbol coder {stream.coder!r} gave {len(found)} of "
            f"{stream.count} symbols"
        )
    return found


def _dense(
    reader: Reader, section: Section, total: int, groups: list[int], parts: dict[str, int]
) -> None:
    section.kept = [total]
    alphabet = _size(section) + bool(section.flags & ZERO)
    if alphabet == 0:
        raise reader.fail("dense symbols without any value")
    if not section.flags & ZERO and total != sum(groups):
        raise reader.fail(f"{total} of {sum(groups)} entries, all of which are non-zero")
    before = reader.at
    for size in groups:
        need = size and alphabet > 1
        section.positions.append(_stream(reader, "symbols", size, alphabet) if need else None)
    parts["codes"] = reader.at - before


def _positions(
    reader: Reader, section: Section, total: int, groups: list[int], parts: dict[str, int]
) -> None:
    before = reader.at
    kept = [reader.varint("entries of a class", size) for size in groups[:-1]]
    last = total - sum(kept)
    if not 0 <= last <= groups[-1]:
        raise reader.fail(f"classes hold {sum(kept)} of {total} entries")
    section.kept = [*kept, last]
    for size, count in zip(groups, section.kept, strict=True):
        if not count:
            section.positions.append(None)
        elif section.layout == BITMAP:
            section.positions.append(_stream(reader, "bitmap", (size + 7) // 8, 256))
        else:
            extra = reader.varint("escapes", (size - count) // 255)
            section.positions.append(_stream(reader, "gaps", count + extra, 256))
    parts["positions"] = reader.at - before
    before = reader.at
    if section.flags & RAW_VALUES:
        section.raw = reader.rest()
        parts["raw"] = len(section.raw)
        return
    if total and not _size(section):
        raise reader.fail(f"{total} entries without a code book")
    if total and _size(section) > 1:
        section.codes = _stream(reader, "codes", total, _size(section))
    parts["codes"] = reader.at - before


def _paper(reader: Reader, section: Section, total: int, numel: int, parts: dict[str, int]) -> None:
    section.index_bits = reader.u8("index bits")
    if not 1 <= section.index_bits <= 16:
        raise reader.fail(f"index bits {section.index_bits}, allowed are 1 to 16")
    entries = total + reader.varint("fillers", numel - total)
    section.kept = [total]
    before = reader.at
    section.positions = [_stream(reader, "gaps", entries, 1 << section.index_bits)]
    parts["positions"] = reader.at - before
    before = reader.at
    section.codes = _stream(reader, "codes", entries, _size(section) + 1)
    parts["codes"] = reader.at - before
