"""What a network holds, layer by layer, and what compression can do with it, before any work."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gossamer import nets
from gossamer.core import flops, names
from gossamer.core.columns import columns
from gossamer.core.errors import ArgumentError
from gossamer.core.graph import trace
from gossamer.core.plain import copied, plain

__all__ = ["Look", "Row", "entropy_bytes", "look"]

BITS = (8, 4, 2)
_STEP = 4  # bytes of a row's step
_VECTORS = "biases, norms"


@dataclass(frozen=True)
class Row:
    """A matrix of a network; the vectors together are one row.

    Attributes:
        name: clean, of the weight.
        kind: of the module that owns it.
        shape: of the weight; empty for the vectors.
        parameters: how many.
        bytes: as they are.
        density: the fraction that is not zero.
        prune, shrink, quantize: ``yes``, what does it, or ``no: `` and why not.
        expected: bits -> bytes (:func:`entropy_bytes`).
        tied: other names of the same weight.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    density: float
    prune: str
    shrink: str
    quantize: str
    expected: dict[int, int]
    tied: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Look:
    """A network's layers and what to expect of it.

    Attributes:
        network: its class.
        rows: its weights, in definition order, then the vectors.
        notes: what holds for all of it.
        operations: multiplications of one example, where one was given.
    """

    network: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    operations: flops.Flops | None = None

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(row.parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        """Of the parameters as they are."""
        return sum(row.bytes for row in self.rows)

    def expected(self, bits: int) -> int:
        """Bytes of all parameters with the weights at so many bits; what cannot be stays."""
        return sum(row.expected.get(bits, row.bytes) for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        widths = sorted({b for row in self.rows for b in row.expected}, reverse=True)
        return {
            "network": self.network,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "expected": {bits: self.expected(bits) for bits in widths},
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
            "macs": None if self.operations is None else self.operations.as_dict(),
        }

    def _cells(self) -> list[list[str]]:
        widths = [*self.as_dict()["expected"]]
        head = ["weight", "kind", "shape", "parameters", "density", "prune", "shrink", "quantize",
                "bytes", *(f"at {b} bits" for b in widths)]  # fmt: skip
        macs: dict[str, float] = {}
        for layer in () if self.operations is None else self.operations.rows:
            macs[layer.name] = macs.get(layer.name, 0.0) + layer.macs
        if self.operations is not None:
            head.append("MACs")
        lines = [head]
        for row in self.rows:
            size = "x".join(map(str, row.shape))
            sizes = [f"{row.expected.get(b, row.bytes):,}" for b in widths]
            if self.operations is not None:
                sizes.append(f"{macs.get(row.name, 0):,.0f}")
            done = [row.prune, row.shrink, row.quantize, f"{row.bytes:,}", *sizes]
            held = [size, f"{row.parameters:,}", f"{row.density:.3f}"]
            lines.append([row.name, row.kind, *held, *done])
        sizes = [f"{self.expected(b):,}" for b in widths]
        if self.operations is not None:
            sizes.append(f"{self.operations.macs:,.0f}")
        total = ["total", self.network, "", f"{self.parameters:,}", "", "", "", ""]
        return [*lines, [*total, f"{self.bytes:,}", *sizes]]

    def __str__(self) -> str:
        """A table; what cannot be done stands below it with its reason."""
        cells = self._cells()
        reasons: dict[str, list[str]] = {}
        for line in cells[1:]:
            for i in (5, 6, 7):
                if line[i].startswith("no: "):
                    reasons.setdefault(f"{cells[0][i]}: {line[i][4:]}", []).append(line[0])
                    line[i] = "no"
        told = columns(cells, (0, 1, 2, 5, 6, 7))
        for why, those in reasons.items():
            more = f" and {len(those) - 3} more" if len(those) > 3 else ""
            told.append(f"no {why} ({', '.join(those[:3])}{more})")
        return "\n".join([*told, *self.notes])

    def __repr__(self) -> str:
        return f"<Look at {self.network}: {self.parameters:,} parameters, {self.bytes:,} bytes>"

    def _repr_html_(self) -> str:
        """The table, in a notebook."""
        first, *rest = self._cells()
        head = "".join(f"<th>{html.escape(c)}</th>" for c in first)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in rest
        )
        notes = "".join(f"<p>{html.escape(n)}</p>" for n in self.notes)
        return f"<table><tr>{head}</tr>{body}</table>{notes}"


@torch.no_grad()
def entropy_bytes(matrix: Tensor, bits: int) -> int:
    """Bytes of a matrix rounded to nearest, each row with a step of its own, in an ideal code.

    The entropy of all codes, -n..n with n = 2^(bits - 1) - 1, and 4 bytes a row: about what a file
    holds after plain rounding. Rounding that looks at inputs changes errors, hardly bytes.

    >>> entropy_bytes(torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    10

    Raises :class:`ArgumentError` for bits outside 2 to 16.
    """
    if not 2 <= bits <= 16:
        raise ArgumentError(f"bits={bits} is outside 2 to 16")
    rows = matrix.detach().reshape(len(matrix), -1).float()
    top = (1 << (bits - 1)) - 1
    step = rows.abs().amax(1, keepdim=True) / top
    codes = (rows / step.masked_fill(step == 0, 1.0)).round().clamp(-top, top).long() + top
    counts = codes.reshape(-1).bincount().double()
    shares = counts[counts > 0] / codes.numel()
    return math.ceil(-float((shares * shares.log2()).sum()) * codes.numel() / 8) + _STEP * len(rows)


def _check_values(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ArgumentError(
                f"{name!r} has no shape yet (a lazy module): call the network on an example first"
            )
        if p.is_floating_point() and not p.is_meta and not bool(p.isfinite().all()):
            raise ArgumentError(
                f"{name!r} holds NaN or infinity, so that nothing can be said of its bytes; find "
                "where training diverged"
            )


def look(model: nn.Module | str, *, bits: Sequence[int] = BITS, example: Any = None) -> Look:
    """What a network holds, what can be pruned, shrunk and quantized, and the bytes to expect.

    Args:
        model: a network, which is left as it is; or a name for :func:`gossamer.nets.build`.
        bits: the widths whose bytes are told.
        example: one batch of inputs, of which multiplications are counted
            (:mod:`gossamer.core.flops`).

    >>> print(look(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))).rows[0].prune)
    yes

    Raises :class:`ArgumentError` for a name or network that cannot be taken.
    """
    made = nets.build(model) if isinstance(model, str) else model
    _check_values(made)
    network, told = plain(copied(made))
    every, layers = names.parameters(network), names.matrices(network)
    aliases, traced = names.tied(network), _traced(network)
    owners = {id(p): m for m in network.modules() for p in m.parameters(recurse=False)}
    rows, vectors = [], []
    for name, p in every.items():
        if p.ndim < 2:
            vectors.append(p)
            continue
        owner = owners[id(p)]
        prune = _prunable(name in layers, owner)
        rows.append(
            Row(
                name=name,
                kind=type(owner).__name__,
                shape=tuple(p.shape),
                parameters=p.numel(),
                bytes=p.numel() * p.element_size(),
                density=_density([p]),
                prune=prune,
                shrink=_shrinkable(owner, traced),
                quantize=prune,
                expected={b: entropy_bytes(p, b) for b in bits},
                tied=tuple(a for a, n in aliases.items() if n == name),
            )
        )
    if vectors:
        count = sum(p.numel() for p in vectors)
        dense = sum(p.numel() * p.element_size() for p in vectors)
        no, small = "no: vectors are few and needed", "biases to 8 bits"
        rows.append(
            Row(
                _VECTORS,
                f"{len(vectors)} vectors",
                (),
                count,
                dense,
                _density(vectors),
                no,
                no,
                small,
                {},
            )
        )
    held = sum(b.numel() * b.element_size() for b in network.buffers())
    notes = [*told, *(f"{a} is {n}: tied, stored and treated once" for a, n in aliases.items())]
    if held:
        notes.append(f"buffers (running statistics, constants): {held:,} bytes, stored as they are")
    counted = None if example is None else flops.count(network, example)
    if counted is not None:
        notes.append(
            f"{counted.macs:,.0f} multiplications an example, {counted.nonzero:,.0f} by weights "
            f"that are not zero, {counted.live:,.0f} left without dead rows and columns"
        )
    return Look(type(network).__name__, tuple(rows), tuple(notes), counted)


def _density(tensors: Sequence[Tensor]) -> float:
    total = sum(t.numel() for t in tensors)
    return sum(int(torch.count_nonzero(t)) for t in tensors) / max(1, total)


def _prunable(known: bool, owner: nn.Module) -> str:
    if known:
        return "yes"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "where named"
    return "no: not known to be multiplied with; obs finds out, other stages take it where named"


def _traced(model: nn.Module) -> bool:
    try:
        trace(model)
    except ArgumentError:
        return False
    return True


def _shrinkable(owner: nn.Module, traced: bool) -> str:
    """By what a layer gets smaller shapes: truncated singular values, units that are cut off."""
    found = ["low rank"] if type(owner) is nn.Linear else []
    if isinstance(owner, (nn.Linear, nn.Conv2d)) and traced:
        found.append("dead units")
    if found:
        return ", ".join(found)
    if isinstance(owner, nn.Conv2d):
        return "no: the network cannot be traced"
    return f"no: nothing here shrinks {type(owner).__name__}"
