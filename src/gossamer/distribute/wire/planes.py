"""Codes as bytes: bit planes, sparse signs, base 3, and integer sums. The plain torch version.

Elements go in groups of 64, one bit of 64 elements is one little-endian 64-bit word, element e at
bit e % 64; bits past the last element are zero. A code is a magnitude of some bits and a sign.

- ``planes``: group after group, the words of magnitude bit 0, 1, ... and of the signs. Signs of
  zeros are 0. Ternary: non-zero, negative.
- ``sparse``: group after group, the magnitude words only; then the sign bits of the non-zero
  elements without gaps, in order, padded to 8 bytes. Ternary: 1 + p bits at a fraction p non-zero.
- ``base3`` (ternary only): blocks of 320 elements in 64 bytes, byte j being
  ``sum_p 3**p (1 + code[j + 64 p])``; the last block of r elements in b = ceil(r / 5) bytes,
  with b in place of 64 and codes of 0 past the end.

Integer sums of N workers' codes, in ``bits`` bits:

- ``planes``: two's complement, group after group the words of bit 0 .. bits - 1.
- ``sparse``: one byte a group, the bits of its largest magnitude, padded to 8 bytes; then group
  after group so many magnitude words; then the signs of non-zero sums as above.

Everything here refuses bytes of the wrong length or with bits set past the end by
:class:`FormatError`, with nothing written.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.errors import ArgumentError, FormatError, one_of

__all__ = ["FORMS", "Form", "groups", "pack", "pack_sums", "payload_bytes", "unpack", "unpack_sums"]

Form = Literal["planes", "sparse", "base3"]

FORMS: tuple[Form, ...] = ("planes", "sparse", "base3")
"""Forms of a payload; a form's place here is its number on the wire."""

GROUP, BLOCK = 64, 320


def groups(numel: int) -> int:
    """Groups of 64 that hold ``numel`` elements."""
    return -(-numel // GROUP)


def payload_bytes(numel: int, planes: int, form: Form) -> int:
    """Bytes of codes with ``planes`` magnitude bits; of ``sparse`` the most there can be.

    >>> [payload_bytes(1000, 1, form) for form in ("planes", "sparse", "base3")]
    [256, 256, 200]
    """
    if form not in FORMS:
        raise ArgumentError(f"form={form!r} is not one of {', '.join(FORMS)}")
    return -(-numel // 5) if form == "base3" else 8 * (planes + 1) * groups(numel)


def _bytes_of(bits: Tensor) -> Tensor:
    """Bools, a multiple of 8 of them, to bytes, the first lowest."""
    weight = 1 << torch.arange(8, device=bits.device)
    return (bits.reshape(-1, 8) * weight).sum(1).to(torch.uint8)


def _bits_of(data: Tensor) -> Tensor:
    """Bytes to bools."""
    shift = torch.arange(8, dtype=torch.uint8, device=data.device)
    return (data.reshape(-1, 1) >> shift & 1).bool().reshape(-1)


def _planes_of(values: Tensor, planes: int) -> Tensor:
    """Bits 0 .. planes - 1 of integers: bytes (groups, planes, 8)."""
    count = groups(values.numel())
    wide = pad(values, (0, count * GROUP - values.numel()))
    rows = [_bytes_of((wide >> b & 1).bool()).reshape(count, 1, 8) for b in range(planes)]
    return torch.cat(rows, 1) if rows else values.new_empty((count, 0, 8), dtype=torch.uint8)


def _values_of(words: Tensor, planes: int) -> Tensor:
    """The way back, from (groups, planes, 8): int32, all groups in full."""
    out = torch.zeros(words.shape[0] * GROUP, dtype=torch.int32, device=words.device)
    for b in range(planes):
        out |= _bits_of(words[:, b]).int() << b
    return out


def _signs(neg: Tensor) -> Tensor:
    return _bytes_of(pad(neg, (0, -neg.numel() % GROUP)))


def _spread(data: Tensor, where: Tensor) -> Tensor:
    """Gapless sign bits to where the non-zero elements are."""
    count = int(where.sum())
    if data.numel() != 8 * groups(count):
        raise FormatError(
            f"sign bits of {count} non-zero elements take {8 * groups(count)} bytes, not "
            f"{data.numel()}"
        )
    bits = _bits_of(data)
    _empty(bits[count:], "sign bits")
    neg = torch.zeros_like(where)
    neg[where] = bits[:count]
    return neg


def _empty(rest: Tensor, what: str) -> None:
    if bool(rest.any()):
        raise FormatError(f"{what} are set past the last element")


def _length(data: Tensor, least: int, most: int) -> None:
    if not least <= data.numel() <= most:
        raise FormatError(f"a payload of {data.numel()} bytes where {least} to {most} can be")


def pack(magnitude: Tensor, neg: Tensor, planes: int, form: Form) -> Tensor:
    """Codes to bytes: magnitudes as integers ``(numel,)``, signs as bools, to uint8."""
    one_of("form", form, FORMS)
    if form == "base3":
        return _pack_base3(torch.where(neg, -magnitude.int(), magnitude.int()))
    if form == "planes":
        sign = _planes_of(neg.to(torch.uint8), 1)
        return torch.cat([_planes_of(magnitude, planes), sign], 1).reshape(-1)
    return torch.cat([_planes_of(magnitude, planes).reshape(-1), _signs(neg[magnitude > 0])])


def unpack(payload: Tensor, numel: int, planes: int, form: Form) -> tuple[Tensor, Tensor]:
    """Bytes to magnitudes (int32) and signs (bool) of ``(numel,)``; raises :class:`FormatError`."""
    most = payload_bytes(numel, planes, form)
    magnitude_bytes = 8 * planes * groups(numel)
    _length(payload, magnitude_bytes if form == "sparse" else most, most)
    if not numel:
        none = torch.zeros(0, dtype=torch.int32, device=payload.device)
        return none, none.bool()
    if form == "base3":
        code = _unpack_base3(payload, numel)
        return code.abs(), code < 0
    if form == "planes":
        words = payload.reshape(-1, planes + 1, 8)
        value, neg = _values_of(words[:, :planes], planes), _bits_of(words[:, planes])
        _empty(neg[numel:], "sign bits")
    else:
        value = _values_of(payload[:magnitude_bytes].reshape(-1, planes, 8), planes)
    _empty(value[numel:], "magnitude bits")
    if form == "sparse":
        neg = _spread(payload[magnitude_bytes:], value > 0)
    return value[:numel], neg[:numel]


def _pack_base3(code: Tensor) -> Tensor:
    whole = code.numel() // BLOCK * BLOCK
    parts = []
    for part, stride in ((code[:whole], 64), (code[whole:], -(-(code.numel() - whole) // 5))):
        if stride:
            digits = pad(part + 1, (0, -part.numel() % (5 * stride)), value=1)
            power = 3 ** torch.arange(5, device=code.device).reshape(1, 5, 1)
            parts.append((digits.reshape(-1, 5, stride) * power).sum(1).reshape(-1))
    return torch.cat(parts).to(torch.uint8)


def _unpack_base3(data: Tensor, numel: int) -> Tensor:
    if bool((data > 242).any()):
        raise FormatError("a base-3 byte above 242")
    whole = numel // BLOCK * BLOCK // 5
    power = 3 ** torch.arange(5, device=data.device).reshape(1, 5, 1)
    parts = [
        (part.int().reshape(-1, 1, stride) // power % 3 - 1).reshape(-1)
        for part, stride in ((data[:whole], 64), (data[whole:], data.numel() - whole))
        if stride
    ]
    code = torch.cat(parts)
    _empty(code[numel:], "base-3 digits")
    return code[:numel].int()


def pack_sums(sums: Tensor, bits: int, form: Form = "planes") -> Tensor:
    """Integers of at most ``bits`` bits in two's complement, ``(numel,)``, to bytes."""
    if form == "planes":
        return _planes_of(sums, bits).reshape(-1)
    if form != "sparse":
        raise ArgumentError(f"form={form!r}: sums go as 'planes' or 'sparse'")
    value = sums.int().abs()
    count = groups(sums.numel())
    words = _planes_of(value, bits)
    held = words.reshape(count, bits, 8).any(2) * torch.arange(1, bits + 1, device=sums.device)
    need = held.amax(1) if count else held.sum(1)
    used = torch.arange(bits, device=sums.device) < need[:, None]
    head = pad(need.to(torch.uint8), (0, -count % 8))
    return torch.cat([head, words[used].reshape(-1), _signs((sums < 0)[value > 0])])


def unpack_sums(data: Tensor, numel: int, bits: int, form: Form = "planes") -> Tensor:
    """Bytes to int32 sums of ``(numel,)``; raises :class:`FormatError`."""
    count = groups(numel)
    if form == "planes":
        _length(data, 8 * bits * count, 8 * bits * count)
        value = _values_of(data.reshape(count, bits, 8), bits)
        _empty(value[numel:], "bits of sums")
        return torch.where(value >> bits - 1 > 0, value - (1 << bits), value)[:numel]
    if form != "sparse":
        raise ArgumentError(f"form={form!r}: sums go as 'planes' or 'sparse'")
    head = count + -count % 8
    _length(data, head, head + 8 * (bits + 1) * count)
    need = data[:count].long()
    _empty(data[count:head], "bits of the head")
    if bool((need > bits).any()):
        raise FormatError(f"a group of sums of more than {bits} bits")
    used = torch.arange(bits, device=data.device) < need[:, None]
    middle = head + 8 * int(need.sum())
    _length(data, middle, head + 8 * (bits + 1) * count)
    words = torch.zeros((count, bits, 8), dtype=torch.uint8, device=data.device)
    words[used] = data[head:middle].reshape(-1, 8)
    value = _values_of(words, bits)
    _empty(value[numel:], "bits of sums")
    neg = _spread(data[middle:], value > 0)
    return torch.where(neg, -value, value)[:numel]
