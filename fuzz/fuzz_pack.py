"""Fuzz the `.gsm` reader with atheris, coverage-guided: the longer run behind the tests.

    make fuzz FUZZ_SECONDS=600

which installs atheris and runs ``python fuzz/fuzz_pack.py [libFuzzer's options] [CORPUS]``.

Anything but a FormatError or decoded tensors of the promised shapes is a finding. Checksums are
put right after each mutation, since no fuzzer guesses them. The corpus starts with the files of
tests/pack/golden.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import atheris

from gossamer.core.errors import FormatError
from gossamer.pack import Archive
from gossamer.pack.coders.limits import Reader
from gossamer.pack.format.container import MAGIC, VERSION, read_body, section_crc
from gossamer.pack.format.raw import decompress
from gossamer.pack.netfile import read_net

PACKAGE = "gossamer.pack"
MAX_BYTES = 1 << 24
SHAPES = {"conv": (4, 3, 2, 2), "fc": (5, 12)}


def functions(module: ModuleType) -> Iterator[FunctionType]:
    """Every function and method that a module defines."""
    found = list(vars(module).values())
    found += [
        inner
        for kind in found
        if isinstance(kind, type) and kind.__module__ == module.__name__
        for inner in vars(kind).values()
    ]
    for value in found:
        if isinstance(value, property):
            value = value.fget
        while not isinstance(value, FunctionType) and (
            inner := getattr(value, "__wrapped__", getattr(value, "__func__", None))
        ):
            value = inner  # cached, a static or a class method
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            yield value


def instrument(trace: Callable[[Any], Any]) -> int:
    """Have every function of the package traced; how many there are.

    Function by function, after the import: a hook on imports depends on how the package was
    installed (an editable one has a finder of its own), and misses what was imported before.
    """
    modules = {n: m for n, m in sys.modules.items() if f"{n}.".startswith(f"{PACKAGE}.")}
    known = {id(f): f for module in modules.values() for f in functions(module)}
    for function in known.values():
        trace(function)
    return len(known)


def mended(data: bytes) -> bytes:
    """The same file with every checksum made right, as far as its lengths can be followed."""
    reader = Reader(data, "fuzz")
    try:
        reader.take(len(MAGIC) + 1, "magic")
        head = reader.varint("header length", 1 << 20)
        if head & 1:
            size = reader.varint("expanded", 1 << 16)
            body = decompress(reader.take(head >> 1, "header"), size, reader, "header")
        else:
            body = bytes(reader.take(head >> 1, "header"))
    except FormatError:
        return data
    start = MAGIC + bytes([VERSION]) + data[len(MAGIC) + 1 : reader.at]
    crc = zlib.crc32(start)
    out = start + crc.to_bytes(4, "little")
    rest = data[reader.at + 4 :]
    try:
        lengths = read_body(Reader(body, "fuzz"), 1 << 16).lengths
    except FormatError:
        return out + rest
    for number, length in enumerate(lengths):
        payload = rest[:length].ljust(min(length, 1 << 16), b"\0")
        rest = rest[length + 4 :]
        out += payload + section_crc(crc, number, payload).to_bytes(4, "little")
    return out


def one(data: bytes) -> None:
    """Read one input in every way there is."""
    for candidate in (data, mended(data)):
        try:
            with Archive(candidate, max_bytes=MAX_BYTES) as archive:
                for name in archive.names:
                    row = archive.info(name)
                    if tuple(archive.tensor(name).shape) != tuple(row["shape"]):
                        raise RuntimeError(f"{name} has another shape than its row")
                _ = archive.metadata
        except FormatError:
            pass
    try:
        for layer in read_net(data, SHAPES):
            layer.weight()
    except FormatError:
        pass


if __name__ == "__main__":
    traced = instrument(atheris.instrument_func)
    print(f"{traced} functions of {PACKAGE} traced, from {sys.modules[PACKAGE].__file__}")
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
