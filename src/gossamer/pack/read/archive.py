"""Open a ``.gsm`` file: lazy tensors, a row per tensor, verification, loading into a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.names import Tensors
from gossamer.pack.coders.limits import MAX_HEADER, Allowance, Reader, decoded_bytes, expansion
from gossamer.pack.format.container import (
    ALIAS,
    OWN,
    SOLID,
    Entry,
    Header,
    read_header,
    section_crc,
)
from gossamer.pack.format.raw import decode_raw, decompress
from gossamer.pack.format.section import Section, parse
from gossamer.pack.format.values import Bits, DType, from_bits, to_bits
from gossamer.pack.read.decode import decode_parsed
from gossamer.pack.read.rows import Row, grouped_row, own_parts, own_row, tied_row
from gossamer.pack.read.source import Source

__all__ = ["Archive", "describe", "unpack"]

_FIRST_READ = 1 << 16


class Archive:
    """A ``.gsm`` file, open for reading; tensors are decoded when asked for.

    Several threads may read it at once, and processes forked since it was opened (the workers of a
    data loader). It is not to be closed while another thread reads.

    Args:
        source: path, or the bytes of a file.
        max_bytes: bound on the decoded bytes of all tensors; by default 1 GiB, or 128 times the
            file if that is more. Raise it for a larger model that you trust; given, it also
            lets the context coder take as long as it needs, beyond what the file's bytes pay for.
        keep: what is decoded is kept, so that no tensor is decoded twice; tensors of the archive
            then share its memory.

    Raises :class:`FormatError` when the file is not whole, is of another format or version, or
    claims more than ``max_bytes``. Nothing is allocated for a claim before it is checked.
    """

    def __init__(
        self, source: str | Path | bytes, *, max_bytes: int | None = None, keep: bool = False
    ) -> None:
        self._file = Source(source)
        self.path = None if isinstance(source, bytes) else Path(source)
        self.where = str(self.path) if self.path else "archive"
        self.trusted = max_bytes is not None
        self._allowance = Allowance()
        try:
            self.file_bytes = self._file.size
            first = self._file.read(0, _FIRST_READ)
            if self.file_bytes > len(first):
                first += self._more(first)
            self.header: Header = read_header(first, self.file_bytes, self.where)
            self._check_size(decoded_bytes(self.file_bytes) if max_bytes is None else max_bytes)
        except BaseException:
            self._file.close()
            raise
        self.where += f" (written by gossamer {self.header.writer})"
        self._index = {e.name: i for i, e in enumerate(self.header.entries)}
        self._sections = self._assign()
        self._firsts, self._starts, self._totals = self._group()
        self._solid: dict[int, Bits] = {}
        self._rows: dict[int, Row] = {}
        self.keep = keep
        self._kept: dict[int, Bits] = {}
        self._metadata: dict[str, Any] | None = None

    def _more(self, first: bytes) -> bytes:
        """The rest of a header longer than the first read."""
        reader = Reader(first[4:], self.where)
        reader.u8("version")
        need = reader.varint("header length", MAX_HEADER << 1 | 1) >> 1
        return self._file.read(len(first), need + 64 - len(first))

    def _check_size(self, max_bytes: int) -> None:
        if (total := self.dense_bytes) > max_bytes:
            raise FormatError(
                f"{self.where}: claims {total} bytes of tensors, max_bytes is {max_bytes}; "
                f"if you trust the file, open it with max_bytes={total}"
            )

    def _assign(self) -> dict[int, int]:
        """Entry index -> section number, aliases through their target."""
        header = self.header
        number = int(header.has_metadata)
        solids = {d.code: number + i for i, d in enumerate(header.solids())}
        number += len(solids)
        sections: dict[int, int] = {}
        for i, entry in enumerate(header.entries):
            if entry.place == SOLID:
                sections[i] = solids[entry.dtype.code]
            elif entry.place == OWN:
                sections[i] = number
                number += 1
        return sections

    def _group(self) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
        """Of each dtype's group the first entry, where each entry starts, and all elements."""
        firsts, starts, totals = dict[int, int](), dict[int, int](), dict[int, int]()
        for i, entry in enumerate(self.header.entries):
            if entry.place == SOLID:
                firsts.setdefault(entry.dtype.code, i)
                starts[i] = totals.get(entry.dtype.code, 0)
                totals[entry.dtype.code] = starts[i] + entry.numel
        return firsts, starts, totals

    # Closing --------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the file. Decoded tensors stay."""
        self._file.close()

    def __del__(self) -> None:
        """Close the file of an archive that nobody kept."""
        if hasattr(self, "_file"):
            self._file.close()

    def __enter__(self) -> Self:
        """The archive itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    # Reading --------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of all tensors, aliases included."""
        return list(self._index)

    @property
    def aliases(self) -> dict[str, str]:
        """Alias -> the tensor it is tied to."""
        entries = self.header.entries
        return {e.name: entries[e.target].name for e in entries if e.place == ALIAS}

    def __len__(self) -> int:
        """Number of names."""
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._index)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self._index

    @property
    def metadata(self) -> dict[str, Any]:
        """The user's metadata; empty when there is none."""
        if self._metadata is None:
            self._metadata = self._read_metadata() if self.header.has_metadata else {}
        return self._metadata

    def _read_metadata(self) -> dict[str, Any]:
        reader = Reader(self._section(0, "metadata"), f"{self.where}: metadata")
        size = reader.varint("expanded length", expansion(reader.left))
        data = reader.rest()
        text = decompress(data, size, reader, "metadata") if size else bytes(data)
        try:
            found = json.loads(text.decode())  # of bytes it would guess UTF-16
        except (ValueError, RecursionError) as e:
            raise reader.fail(f"is no JSON ({e})") from None
        if not isinstance(found, dict):
            raise reader.fail(f"is a JSON {type(found).__name__}, not an object")
        return found

    def _section(self, number: int, what: str) -> memoryview:
        """The checked payload of a section."""
        length = self.header.lengths[number]
        data = memoryview(self._file.read(self.header.offsets[number], length + 4))
        payload = data[:length]
        if len(data) != length + 4:
            raise FormatError(f"{self.where}: {what}: the file was cut short while open")
        if section_crc(self.header.crc, number, payload) != int.from_bytes(data[length:], "little"):
            raise FormatError(
                f"{self.where}: {what}: the data does not match its checksum; "
                "the file is damaged, fetch or pack it again"
            )
        return payload

    def entry(self, name: str) -> Entry:
        """Shape and dtype of a tensor; of its target for an alias."""
        return self._entry(name)[1]

    def _entry(self, name: str) -> tuple[int, Entry]:
        if name not in self._index:
            raise ArgumentError(
                f"name {name!r} is not in {self.where}; it holds: {', '.join(self.names[:40])}"
            )
        entry = self.header.entries[self._index[name]]
        if entry.place == ALIAS:
            return entry.target, self.header.entries[entry.target]
        return self._index[name], entry

    def __getitem__(self, name: str) -> Tensor:
        """As :meth:`tensor`."""
        return self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Decode one tensor, on the CPU, bit for bit as it was packed.

        Raises :class:`ArgumentError` for an unknown name, :class:`FormatError` for damage.
        """
        index, entry = self._entry(name)
        return from_bits(self._bits(index, entry), entry.dtype, entry.shape)

    def read_into(self, name: str, out: Tensor) -> None:
        """Decode one tensor into ``out``, which has its shape and dtype (see :meth:`entry`).

        A contiguous tensor on the CPU is written directly. Raises as :meth:`tensor`; after a
        :class:`FormatError` ``out`` may be written in part.
        """
        index, entry = self._entry(name)
        if out.device.type != "cpu" or not out.is_contiguous() or out.is_neg():
            with torch.no_grad():
                out.copy_(self.tensor(name))
            return
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # a graph that saved it is out of date
        self._bits(index, entry, to_bits(name, out)[1])

    def _bits(self, index: int, entry: Entry, out: Bits | None = None) -> Bits:
        if index not in self._kept:
            bits = self._decode(index, entry, None if self.keep else out)
            if not self.keep:
                return bits
            self._kept[index] = bits
        if out is None:
            return self._kept[index]
        out[:] = self._kept[index]
        return out

    def _decode(self, index: int, entry: Entry, out: Bits | None = None) -> Bits:
        if entry.place == SOLID:
            solid = self._solid_bits(entry.dtype)
            start = self._starts[index]
            bits = np.empty(entry.numel, entry.dtype.bits) if out is None else out
            bits[:] = solid[start : start + entry.numel]
        else:
            reader, section = self._parsed(index, entry)
            bits = decode_parsed(
                reader,
                section,
                entry.dtype,
                entry.shape,
                out,
                allowed=lambda work: self.trusted or self._allowance.take(work, index),
            )
        if entry.dtype.torch == torch.bool and bits.size and bits.max() > 1:
            raise FormatError(
                f"{self.where}: tensor {entry.name!r} is bool but holds the byte {bits.max()}"
            )
        return bits

    def _parsed(self, index: int, entry: Entry) -> tuple[Reader, Section]:
        """A tensor's own section, taken apart."""
        what = f"tensor {entry.name!r}"
        payload = self._section(self._sections[index], what)
        reader = Reader(payload, f"{self.where}: {what}", self.header.version)
        return reader, parse(reader, entry.dtype, entry.shape, entry.numel)

    def _solid_bits(self, dtype: DType) -> Bits:
        if dtype.code not in self._solid:
            number = self.header.solids().index(dtype) + self.header.has_metadata
            what = f"the small {dtype.name} tensors"
            reader = Reader(self._section(number, what), f"{self.where}: {what}")
            bits = decode_raw(reader, dtype, self._totals[dtype.code])
            reader.done()
            self._solid[dtype.code] = bits
        return self._solid[dtype.code]

    def cost(self, names: Iterable[str]) -> int:
        """Bytes that are decoded to read these tensors: their own, and all of their groups'."""
        found = {self._entry(name) for name in names}
        groups = {entry.dtype for _, entry in found if entry.place == SOLID}
        return sum(e.numel * e.dtype.size for _, e in found if e.place == OWN) + sum(
            self._totals[dtype.code] * dtype.size for dtype in groups
        )

    def tensors(self) -> Tensors:
        """All tensors by name; tied names share one tensor."""
        found: dict[int, Tensor] = {}
        out: Tensors = {}
        for name in self.names:
            index, _ = self._entry(name)
            if index not in found:
                found[index] = self.tensor(name)
            out[name] = found[index]
        return out

    def verify(self) -> None:
        """Check every checksum and decode every tensor; FormatError at the first fault."""
        _ = self.metadata
        self.check_sections()
        for index, entry in enumerate(self.header.entries):
            if entry.place != ALIAS:
                self._bits(index, entry)

    def check_sections(self) -> None:
        """Check every checksum, decoding nothing."""
        owners: dict[int, str] = {0: "metadata"} if self.header.has_metadata else {}
        for index, number in self._sections.items():
            owners.setdefault(number, f"tensor {self.header.entries[index].name!r}")
        for number in range(len(self.header.lengths)):
            self._section(number, owners[number])

    # Describing -----------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """One row per name. Decodes only what does not say of itself how many values it holds.

        Counts of the others are those that their sections declare, which decoding checks.
        """
        return [self.info(name) for name in self.names]

    def info(self, name: str) -> Row:
        """The row of one tensor; an alias takes no bytes."""
        index, entry = self._entry(name)
        if index not in self._rows:
            self._rows[index] = self._row(index, entry)
        row = self._rows[index]
        return (
            tied_row(name, row) if name != entry.name else Row(**row | {"parts": {**row["parts"]}})
        )

    def _row(self, index: int, entry: Entry) -> Row:
        if entry.place == SOLID:
            return grouped_row(entry, self._bits(index, entry), self._share(index, entry))
        section = self._parsed(index, entry)[1]
        return own_row(entry, section, lambda: self._bits(index, entry))

    def _share(self, index: int, entry: Entry) -> int:
        """A grouped tensor's share of its section, by elements; shares add up exactly."""
        whole = self.header.lengths[self._sections[index]] + 4
        count = self._totals[entry.dtype.code]
        if count == 0:  # the first of the group stands for all
            return whole if self._firsts[entry.dtype.code] == index else 0
        start = self._starts[index]
        return whole * (start + entry.numel) // count - whole * start // count

    def parts(self) -> dict[str, int]:
        """Bytes of the whole file by purpose; they add up to ``file_bytes``. Decodes nothing."""
        out = {"header": self.header.size}
        if self.header.has_metadata:
            out["metadata"] = self.header.lengths[0] + 4
        for index, entry in enumerate(self.header.entries):
            if index in self._rows:
                parts = self._rows[index]["parts"]
            elif entry.place == SOLID:
                parts = {"raw": self._share(index, entry)}
            else:
                parts = {} if entry.place == ALIAS else own_parts(self._parsed(index, entry)[1])
            for part, size in parts.items():
                out[part] = out.get(part, 0) + size
        return out

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensors without any coding, tied ones once."""
        return sum(e.numel * e.dtype.size for e in self.header.entries if e.place != ALIAS)


def describe(archive: Archive) -> list[dict[str, Any]]:
    """The rows of an archive as plain dictionaries, ready for JSON."""
    return [{**row, "shape": list(row["shape"])} for row in archive.rows()]


def unpack(path: str | Path | bytes, *, max_bytes: int | None = None) -> Tensors:
    """Read all tensors of a ``.gsm`` file: clean name -> tensor, tied names sharing one.

    ``max_bytes``: as in :class:`Archive`. Raises :class:`FormatError` for a damaged file.
    """
    with Archive(path, max_bytes=max_bytes) as archive:
        return archive.tensors()
