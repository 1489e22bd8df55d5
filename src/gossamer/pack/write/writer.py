"""Pack a model or a mapping of tensors into a ``.gsm`` file."""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.core.files import write_chunks
from gossamer.core.names import Tensors
from gossamer.core.seeds import Seed, fill
from gossamer.pack.coders.limits import ANY_BYTES, MAX_DIMENSIONS, Reader, expansion, varint
from gossamer.pack.coders.table import CODERS, FIXED, HUFFMAN, NUMBERED, RANS
from gossamer.pack.format.container import (
    ALIAS,
    OWN,
    SOLID,
    Entry,
    Header,
    check_names,
    section_chunks,
)
from gossamer.pack.format.raw import compress, encode_raw
from gossamer.pack.format.section import SEEDED, parse
from gossamer.pack.format.values import BY_TORCH, Bits, DType, nonfinite, to_bits
from gossamer.pack.read.archive import Archive
from gossamer.pack.write.encode import encode_section
from gossamer.pack.write.layouts import Settings, seeded_section
from gossamer.pack.write.metadata import json_text
from gossamer.pack.write.state import maskable, named_tensors

__all__ = ["PROFILES", "pack", "pack_bytes"]

PROFILES = {
    "smallest": Settings(),
    "fast": Settings(coders=(FIXED, RANS), context=0, level=3, slack=0.002, gain=0.15, lzma=False),
    "huffman": Settings(coders=(HUFFMAN,), context=0, paper=True, lzma=False),
}
"""``smallest`` tries everything, coders of other packages too
(:func:`gossamer.pack.coders.table.register`); ``fast`` keeps to what decodes fastest, without the
context coder and LZMA; ``huffman`` is Deep Compression's own coding."""

_SPOOLED = 1 << 24  # bytes of sections that wait in memory
_GROUPED = 1 << 16  # raw tensors below this many bytes share one section per dtype
_SIGNS = 256  # a seed takes fewer bits than the signs of so many values; no need to compare
_OWN_COST = 8  # what a section of its own costs in the header, and its checksum


def pack(
    model_or_state: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    profile: str = "smallest",
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    index_bits: int = 5,
    context_entries: int | None = None,
    allow_nonfinite: bool = False,
    seeds: Mapping[str, Seed] | None = None,
    workers: int | None = None,
) -> Archive:
    """Write a model's tensors to a file, losslessly: bits in, the same bits out.

    Args:
        model_or_state: a module (its clean state, tied tensors once) or name -> tensor.
        path: the file; replaced atomically, and left as it was on any error.
        profile: ``smallest``, ``fast`` or ``huffman`` (see :data:`PROFILES`).
        metadata: anything JSON can hold, kept with the tensors.
        progress: called with (name, tensors done, tensors in all).
        index_bits: width of the gaps of profile ``huffman``.
        context_entries: the context coder is tried on tensors of up to this many entries
            (default: the profile's, 2**24 for ``smallest``).
        allow_nonfinite: store NaN and infinity instead of refusing them. Infinity in a module's
            buffers (an attention mask) needs no leave, except in running statistics.
        seeds: name -> the seed that a tensor's non-zero values come from
            (:func:`gossamer.core.seeds.init_`): the seed and a mask are stored where that is
            smallest, which takes a reader of format version 2.
        workers: tensors that are coded at once, in threads; the bytes are the same for any number.
            By default the cores that this process may use, or 1 where torch is held to one thread.

    Returns the archive, open for reading.

    Raises :class:`ArgumentError` for an unknown profile, a tensor that cannot be stored, NaN or
    infinity, metadata that is no JSON, a seed that does not give its tensor bit for bit, or
    ``workers`` below 1.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "w.gsm")
    >>> with pack({"w": torch.tensor([[0.0, 0.5], [0.0, -0.5]])}, path) as archive:
    ...     archive.tensor("w").tolist()
    [[0.0, 0.5], [0.0, -0.5]]
    """
    chunks = _chunks(
        model_or_state,
        _settings(profile, index_bits, context_entries),
        metadata,
        progress,
        allow_nonfinite,
        seeds or {},
        _workers(workers),
        str(Path(path).parent),
    )
    write_chunks(path, chunks)  # they are made as they are written
    return Archive(path, max_bytes=ANY_BYTES)


def pack_bytes(
    model_or_state: nn.Module | Mapping[str, Tensor],
    *,
    profile: str = "smallest",
    metadata: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
    seeds: Mapping[str, Seed] | None = None,
    workers: int | None = None,
) -> bytes:
    """As :func:`pack`, into memory."""
    settings, free, told = _settings(profile, 5, None), allow_nonfinite, seeds or {}
    number = _workers(workers)
    return b"".join(_chunks(model_or_state, settings, metadata, None, free, told, number, None))


def _workers(workers: int | None) -> int:
    if workers is not None:
        return _whole("workers", workers, 1)
    if torch.get_num_threads() == 1:
        return 1
    can = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(can(0)) if can else os.cpu_count() or 1


def _whole(name: str, value: int, least: int) -> int:
    if not isinstance(value, Integral) or value < least:
        raise ArgumentError(f"{name} is {value!r}, it must be {least} or more, a whole number")
    return int(value)


def _settings(profile: str, index_bits: int, context_entries: int | None) -> Settings:
    if not isinstance(profile, str) or profile not in PROFILES:
        raise ArgumentError(f"profile {profile!r} is not one of {', '.join(PROFILES)}")
    if not isinstance(index_bits, Integral) or not 1 <= index_bits <= 16:
        raise ArgumentError(f"index_bits is {index_bits}, allowed are 1 to 16")
    if context_entries is not None:
        _whole("context_entries", context_entries, 0)
    chosen = PROFILES[profile]
    return replace(
        chosen,
        coders=tuple(CODERS) if profile == "smallest" else chosen.coders,
        context=chosen.context if context_entries is None else context_entries,
        index_bits=index_bits,
    )


@dataclass(frozen=True)
class _Coded:
    dtype: DType
    shape: tuple[int, ...]
    section: int | None  # of its own: its bytes, the next in the spool
    bits: Bits | None  # for the group of its dtype
    version: int = 1  # that a file with it needs


def _chunks(
    source: nn.Module | Mapping[str, Tensor],
    settings: Settings,
    metadata: Mapping[str, Any] | None,
    progress: Callable[[str, int, int], None] | None,
    allow_nonfinite: bool,
    seeds: Mapping[str, Seed],
    workers: int,
    folder: str | None,
) -> Iterator[bytes]:
    """The whole file, in pieces.

    The header comes first and tells all lengths, so that sections wait in a spool: on the disk of
    ``folder`` where they are many (None: in memory).
    """
    state, aliases = named_tensors(source)
    check_names([*state, *aliases])
    if not isinstance(seeds, Mapping) or not all(isinstance(s, Seed) for s in seeds.values()):
        raise ArgumentError("seeds is no mapping of tensor names to seeds, such as init_ gives")
    odd = [name for name in seeds if name not in state]
    if odd:
        raise ArgumentError(
            f"seeds name {odd[0]!r}, which is no tensor to store; there are: {', '.join(state)}"
        )
    coded: list[_Coded] = []
    masks = maskable(source) if isinstance(source, nn.Module) else set()

    def code(name: str) -> tuple[_Coded, bytes]:
        tensor = state[name]
        free = allow_nonfinite or (name in masks and not bool(torch.isnan(tensor).any()))
        return _code(name, tensor, settings, free, seeds.get(name))

    with SpooledTemporaryFile(_SPOOLED if folder else 0, dir=folder) as spool:
        for name, (one, section) in zip(state, _each(code, list(state), workers), strict=True):
            coded.append(one)
            spool.write(section)
            if progress is not None:
                progress(name, len(coded), len(state))
        yield from _file(state, aliases, coded, spool, settings, metadata)


def _each(
    code: Callable[[str], tuple[_Coded, bytes]], todo: list[str], workers: int
) -> Iterator[tuple[_Coded, bytes]]:
    """``code`` of each, in order, ``workers`` at a time; what is slow in it leaves Python's lock.

    Results wait for the one in front of them, so no more than twice ``workers`` are begun.
    """
    if workers == 1 or len(todo) < 2:
        yield from map(code, todo)
        return
    pool, begun = ThreadPoolExecutor(workers, "pack"), deque[Future[tuple[_Coded, bytes]]]()
    try:
        for name in todo:
            begun.append(pool.submit(code, name))
            if len(begun) == 2 * workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _file(
    state: Tensors,
    aliases: Mapping[str, str],
    coded: Sequence[_Coded],
    spool: SpooledTemporaryFile[bytes],
    settings: Settings,
    metadata: Mapping[str, Any] | None,
) -> Iterator[bytes]:
    """Header and sections of tensors that are coded, each section with its checksum."""
    entries = [
        Entry(n, c.dtype, c.shape, SOLID if c.section is None else OWN)
        for n, c in zip(state, coded, strict=True)
    ]
    place = {name: i for i, name in enumerate(state)}
    for alias, name in aliases.items():
        target = entries[place[name]]
        entries.append(Entry(alias, target.dtype, target.shape, ALIAS, place[name]))
    version = max((c.version for c in coded), default=1)
    header = Header(entries, [], metadata is not None, version=version)
    payloads = [] if metadata is None else [_metadata(metadata)]
    for dtype in header.solids():
        group = [c.bits for c in coded if c.bits is not None and c.dtype is dtype]
        if settings.paper:
            payloads.append(b"\0" + b"".join(g.tobytes() for g in group))
        else:
            payloads.append(encode_raw(np.concatenate(group), dtype, level=settings.level))
    own = [c.section for c in coded if c.section is not None]
    header.lengths = [*map(len, payloads), *own]
    spool.seek(0)
    sections = itertools.chain(payloads, map(spool.read, own))
    yield from section_chunks(header, sections)


def _code(
    name: str, tensor: Tensor, settings: Settings, allow_nonfinite: bool, seed: Seed | None
) -> tuple[_Coded, bytes]:
    """A tensor, and its section if it has its own."""
    dtype, bits = to_bits(name, tensor)
    shape = tuple(tensor.shape)
    if len(shape) > MAX_DIMENSIONS:
        raise ArgumentError(
            f"tensor {name!r} has {len(shape)} dimensions, at most {MAX_DIMENSIONS} can be "
            "stored; reshape it"
        )
    if not allow_nonfinite:
        bad = nonfinite(bits, dtype)
        if bad:
            raise ArgumentError(
                f"tensor {name!r} holds {bad} NaN or infinite values of {len(bits)}; a network "
                "with them computes nothing useful: find where training diverged, or pass "
                "allow_nonfinite=True to store them as they are"
            )
    section: bytes | None = None
    if seed is not None and len(bits):
        section = _seeded(name, bits, dtype, shape, settings, seed)
    if section is None or np.count_nonzero(bits) <= _SIGNS:
        plain = encode_section(bits, dtype, shape, settings)
        section = plain if section is None else min(plain, section, key=len)
    small = len(bits) * dtype.size < _GROUPED
    # In the group a float takes most of its bytes: only its exponents have something to share.
    grouped = len(bits) * dtype.size * (0.75 if section[0] == 0 else 1)
    if small and len(section) + _OWN_COST >= grouped:
        return _Coded(dtype, shape, None, bits), b""
    version = _version(section, dtype, shape, settings)
    return _Coded(dtype, shape, len(section), None, version), section


def _version(section: bytes, dtype: DType, shape: tuple[int, ...], settings: Settings) -> int:
    """The oldest version that has what a section uses; most need not be looked at."""
    if section[0] & 7 < SEEDED and set(settings.coders) <= set(NUMBERED):
        return 1
    where = Reader(section, "a section just written")
    return parse(where, dtype, shape, math.prod(shape)).version


def _seeded(
    name: str, bits: Bits, dtype: DType, shape: tuple[int, ...], settings: Settings, seed: Seed
) -> bytes:
    """The seed and the mask, once it is sure that they give the tensor."""
    if dtype.torch != torch.float32:
        raise ArgumentError(
            f"seeds[{name!r}] gives float32, the tensor is {dtype.name}; leave the seed out"
        )
    made = np.empty(len(bits), np.float32)
    fill(seed, made)
    kept = bits != 0
    wrong = np.flatnonzero(kept & (bits != made.view(np.uint32)))
    if len(wrong):
        first = int(wrong[0])
        raise ArgumentError(
            f"seeds[{name!r}] does not give the tensor: {len(wrong)} of {kept.sum()} non-zero "
            f"entries differ, the first is {bits.view(np.float32)[first]} and not {made[first]}; "
            "pass the seed it was initialised from (and the factor of its mask), or leave it out"
        )
    return seeded_section(
        seed, encode_section(kept.astype(np.uint8), BY_TORCH[torch.bool], shape, settings)
    )


def _metadata(metadata: Mapping[str, Any]) -> bytes:
    """Expanded length (0: not compressed) and the JSON."""
    text = json_text(metadata, ensure_ascii=False).encode()
    packed = varint(len(text)) + compress(text)
    worth = len(packed) < len(text) + 1 and len(text) <= expansion(len(packed))
    return packed if worth else b"\0" + text
