"""The functions of :mod:`gossamer.distribute.codecs.eager` by the compiled kernel, on CPU.

Bits depend neither on the instruction set (``GOSSAMER_ISA``) nor on the number of threads, which is
torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.core.kernels import kernel
from gossamer.distribute.codecs.eager import Layout
from gossamer.distribute.codecs.random import Key
from gossamer.distribute.wire.planes import FORMS, Form, groups

__all__ = ["decode_mean", "decode_sums", "encode", "pack_sums", "statistics", "sum_codes"]


def _kernel() -> ModuleType:
    found = kernel("exchange")
    if found is None:
        raise RuntimeError("the compiled kernel was turned off between two calls")
    return found


def _refused(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except ValueError as error:
        raise FormatError(str(error)) from None


def statistics(g: Tensor, absolute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sum (of magnitudes where ``absolute``), sum of squares, largest magnitude of flat float32."""
    total, squares, bits = _kernel().statistics(g.numpy(), absolute, torch.get_num_threads())
    largest = math.nan if bits >= 0x7F800000 else float(np.uint32(bits).view(np.float32))
    double = torch.tensor([total, squares], dtype=torch.float64)
    return double[0], double[1], torch.tensor(largest, dtype=torch.float32)


def encode(
    g: Tensor, scale: Tensor, layout: Layout, key: Key, shift: int, form: Form, out: Tensor
) -> int:
    """Encode flat float32 ``g`` into the front of ``out``; returns the bytes written."""
    value = float(scale)
    inv = float(layout.top / scale) if 0 < value < math.inf else 0.0
    if not math.isfinite(inv):
        inv = 0.0
    written: int = _kernel().encode(
        g.numpy(),
        inv,
        layout.top,
        layout.planes,
        layout.half,
        layout.random,
        key.words,
        shift,
        FORMS.index(form),
        out.numpy(),
        torch.get_num_threads(),
    )
    return written


def _of(payloads: Sequence[Tensor], forms: Sequence[Form]) -> tuple[list[Any], list[int]]:
    return [p.contiguous().numpy() for p in payloads], [FORMS.index(form) for form in forms]


def decode_mean(
    payloads: Sequence[Tensor],
    forms: Sequence[Form],
    scales: Tensor,
    layout: Layout,
    out: Tensor,
    divisor: int,
) -> None:
    """Write the mean of several payloads, with one scale each, over flat float32 ``out``."""
    units = scales / float(layout.levels)
    factor = float(np.float32(1 / divisor))
    _refused(
        _kernel().decode_mean,
        *_of(payloads, forms),
        units.numpy(),
        layout.planes,
        layout.half,
        out.numpy(),
        factor,
        torch.get_num_threads(),
    )


def sum_codes(
    payloads: Sequence[Tensor], forms: Sequence[Form], numel: int, layout: Layout
) -> Tensor:
    """The exact integer sum of several payloads' codes."""
    out = torch.empty(numel, dtype=layout.sum_type(len(payloads)))
    _refused(
        _kernel().sum_codes,
        *_of(payloads, forms),
        layout.planes,
        layout.half,
        out.numpy(),
        torch.get_num_threads(),
    )
    return out


def pack_sums(sums: Tensor, bits: int, form: Form) -> Tensor:
    """Integer sums to bytes: :func:`gossamer.distribute.wire.planes.pack_sums`."""
    count = groups(sums.numel())
    sparse = form == "sparse"
    head = count + -count % 8 + 8 * count if sparse else 0
    out = torch.empty(head + 8 * bits * count, dtype=torch.uint8)
    return out[: _kernel().pack_sums(sums.contiguous().numpy(), bits, sparse, out.numpy())]


def decode_sums(packed: Tensor, bits: int, form: Form, factor: Tensor, out: Tensor) -> None:
    """Write packed sums times ``factor`` (float32) over flat float32 ``out``."""
    _refused(
        _kernel().decode_sums,
        packed.contiguous().numpy(),
        bits,
        form == "sparse",
        float(factor),
        out.numpy(),
        torch.get_num_threads(),
    )
