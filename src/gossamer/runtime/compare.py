"""How near what a runtime gives is to what torch gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError

__all__ = ["Closeness", "altered", "closeness", "compared", "probes"]


@dataclass(frozen=True)
class Closeness:
    """Outputs of a runtime beside torch's.

    Attributes:
        relative: largest difference over the largest magnitude, the worst output.
        cosine: of each example's output with torch's, the mean over examples, the worst output.
        agreement: fraction of equal argmax of the first output (over the last dimension, of maps
            (N, C, H, W) over the channels); None where there is nothing to choose between.
        examples: how many.
    """

    relative: float
    cosine: float
    agreement: float | None
    examples: int

    def __str__(self) -> str:
        same = (
            "" if self.agreement is None else f", the same argmax on {100 * self.agreement:.2f} %"
        )
        return (
            f"relative difference {self.relative:.2g}, cosine {self.cosine:.5f}{same} "
            f"({self.examples:,} examples)"
        )


def closeness(wanted: Sequence[Tensor], got: Sequence[Tensor], who: str) -> Closeness:
    """Compare outputs; ``who`` names the runtime in messages.

    Raises :class:`ArgumentError` for another number of outputs, another shape, or numbers that are
    not finite in one of the two alone.
    """
    if len(wanted) != len(got):
        raise ArgumentError(f"{who} gives {len(got)} outputs where torch gives {len(wanted)}")
    relative, cosine = 0.0, 1.0
    for number, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if a.shape != b.shape:
            raise ArgumentError(
                f"output {number} is {tuple(b.shape)} in {who} and {tuple(a.shape)} in torch"
            )
        x, y = a.detach().double(), b.detach().double()
        bad = ~x.isfinite()
        if not torch.equal(bad, ~y.isfinite()) or not torch.equal(
            x[bad].nan_to_num(), y[bad].nan_to_num()
        ):
            raise ArgumentError(f"output {number} is not finite in torch and {who} alike")
        x, y = x.masked_fill(bad, 0), y.masked_fill(bad, 0)
        if not x.numel():
            continue
        most = float(x.abs().max())
        relative = max(
            relative, float((x - y).abs().max()) / most if most else float(y.abs().max())
        )
        rows, others = (t.reshape(len(t) if t.ndim else 1, -1) for t in (x, y))
        same = (rows == others).all(1)
        each = torch.nn.functional.cosine_similarity(rows, others, dim=1)
        cosine = min(cosine, float(torch.where(same, torch.ones_like(each), each).mean()))
    first = wanted[0]
    return Closeness(relative, cosine, _agreement(first, got[0]), len(first) if first.ndim else 1)


@torch.no_grad()
def compared(
    network: Callable[..., Sequence[Tensor]],
    batches: Sequence[Sequence[Tensor]],
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    who: str,
) -> Closeness:
    """A runtime beside torch over batches: the worst difference, the means of the rest."""
    found = [closeness(network(*batch), run(batch), who) for batch in batches]
    counts = sum(c.examples for c in found)
    same = [(c.agreement, c.examples) for c in found if c.agreement is not None]
    return Closeness(
        max(c.relative for c in found),
        sum(c.cosine * c.examples for c in found) / max(1, counts),
        sum(a * n for a, n in same) / max(1, sum(n for _, n in same)) if same else None,
        counts,
    )


def _agreement(wanted: Tensor, got: Tensor) -> float | None:
    dim = 1 if wanted.ndim == 4 else -1
    if wanted.ndim < 2 or wanted.shape[dim] < 2 or not wanted.is_floating_point():
        return None
    return float((wanted.argmax(dim) == got.argmax(dim)).double().mean())


def altered(tensors: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """Another batch of ``count`` examples out of these: in another order, floats scaled by .7.

    An export that has kept a value or the size of the batch gives something else on it.
    """
    picks = torch.arange(count).flip(0)
    rows = [t[picks % len(t)] for t in tensors]
    return tuple(t * 0.7 if t.is_floating_point() else t for t in rows)


def probes(
    network: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """The example, a batch of another size, and one of one, which torch's capture never sees.

    A batch of one that the network does not take is left out.
    """
    count = len(tensors[0])
    found = [tuple(tensors), altered(tensors, 4 if count == 3 else 3)]
    if count == 1:
        return found
    one = altered(tensors, 1)
    try:
        with torch.no_grad():
            network(*(t.clone() for t in one))
    except Exception:  # the user's own forward, which may raise anything
        return found
    return [*found, one]
