"""Class specialization of features: is a channel there for one class or for all?

Dettmers and Zettlemoyer, *Sparse Networks from Scratch*, arXiv 1907.04840, section 5.2: the
absolute activation of a channel is summed by class over a data set; channels that together hold
the last 5 % of a layer's activation are dropped; a channel's class specialization is the largest
share that one class has in its sum. 1 / classes is a channel that serves all alike, 1 is one that
serves a single class.

Deviations: linear layers are looked at too, unit by unit. The shares are of plain sums, so on
classes of unequal size the larger ones have larger shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.analysis import plots
from gossamer.analysis.layers import channels, choose, observe
from gossamer.core.errors import ArgumentError
from gossamer.datasets import Split

__all__ = ["Comparison", "Specialization", "class_shares", "compare", "specialization"]

Patterns = str | Iterable[str] | None


def class_shares(activation: Tensor, *, last: float = 0.05) -> Tensor:
    """The largest class share of each channel, without those that hold the last of the activation.

    Args:
        activation: (channels, classes), sums of absolute activations.
        last: the least active channels that hold at most this fraction together are dropped.

    Returns float64, one score for each channel that stays, in the channels' order; empty where
    there is no activation.

    >>> class_shares(torch.tensor([[60.0, 20.0], [10.0, 10.0], [0.0, 1.0]])).tolist()
    [0.75, 0.5]

    Raises :class:`ArgumentError` for a ``last`` outside [0, 1), or sums that are negative or not
    finite.
    """
    if not 0 <= last < 1:
        raise ArgumentError(f"last={last} is outside [0, 1) (the fraction of activation dropped)")
    sums = activation.double().cpu()
    if not torch.isfinite(sums).all() or (sums < 0).any():
        raise ArgumentError("activation holds negative or non-finite sums; sum absolute values")
    totals = sums.sum(1)
    order = torch.argsort(totals, stable=True)
    running = totals[order].cumsum(0)
    kept = torch.ones(len(totals), dtype=torch.bool)
    # <=, so that channels without activation go even at last=0
    kept[order[running <= last * totals.sum()]] = False
    return sums[kept].amax(1) / totals[kept]


@dataclass(frozen=True)
class Specialization:
    """What :func:`specialization` found.

    Attributes:
        scores: layer -> (channels kept,) float64, each in [1 / classes, 1].
        channels: layer -> channels in all.
        classes: number of classes.
    """

    scores: dict[str, Tensor]
    channels: dict[str, int]
    classes: int

    def histogram(self, layer: str | None = None, bins: int = 20) -> tuple[Tensor, Tensor]:
        """Edges (bins + 1,) from 1 / classes to 1, and counts (bins,), of one layer or of all.

        Raises :class:`ArgumentError` for an unknown layer or no bins.
        """
        if layer is not None and layer not in self.scores:
            raise ArgumentError(f"layer {layer!r} is not one of {', '.join(self.scores)}")
        if bins < 1:
            raise ArgumentError(f"bins={bins} must be at least 1")
        values = _joined(self.scores) if layer is None else self.scores[layer]
        edges = torch.linspace(1 / self.classes, 1, bins + 1, dtype=torch.float64)
        # a share of 1 / classes may be rounded to just below it
        counts = torch.histogram(values.clamp(float(edges[0]), 1), edges).hist
        return edges, counts.long()

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Layer -> channels, dropped, mean, median, largest, scores; plain numbers."""
        return {
            name: {
                "channels": self.channels[name],
                "dropped": self.channels[name] - len(s),
                "mean": float(s.mean()) if len(s) else None,
                "median": float(s.quantile(0.5)) if len(s) else None,
                "largest": float(s.max()) if len(s) else None,
                "scores": s.tolist(),
            }
            for name, s in self.scores.items()
        }

    def table(self) -> str:
        """A row a layer as plain text; scores in percent."""
        width = max(len("layer"), *(len(name) for name in self.scores))
        lines = [f"{'layer':{width}} channels  dropped    mean  median  largest"]
        for name, row in self.as_dict().items():
            cells = [
                f"{100 * row[k]:.2f}" if row[k] is not None else "-"
                for k in ("mean", "median", "largest")
            ]
            lines.append(
                f"{name:{width}} {row['channels']:8} {row['dropped']:8}"
                f"{cells[0]:>8}{cells[1]:>8}{cells[2]:>9}"
            )
        return "\n".join(lines)

    def plot(self, path: str | Path, *, bins: int = 20) -> Path:
        """Histograms by layer; the suffix decides the format."""
        return plots.histograms({"": self.scores}, path, low=1 / self.classes, bins=bins)


def _joined(scores: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(scores.values()))


def specialization(
    model: nn.Module,
    split: Split,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    rectified: bool = True,
    last: float = 0.05,
    batch_size: int = 1000,
) -> Specialization:
    """Class specialization of the channels of every convolution and the units of linear layers.

    The model ends as it was. Exclude the classifier: its units are the classes.

    Args:
        split: with class indices as targets.
        include, exclude: patterns over module names; where batch-norm stands between a layer and
            its non-linearity, name the batch-norm.
        rectified: a negative output counts as 0, as the ReLU behind the layer passes it on;
            False takes absolute values.
        last: as :func:`class_shares` takes it.

    Raises :class:`ArgumentError` for targets that are no class indices, no layers, a layer that is
    not called or whose channels are not known, and as :func:`class_shares` does.
    """
    if split.targets.ndim != 1 or split.targets.is_floating_point():
        raise ArgumentError(
            f"split has targets of shape {tuple(split.targets.shape)} and {split.targets.dtype}; "
            "class specialization needs one class index an example"
        )
    if not 0 <= last < 1:
        raise ArgumentError(f"last={last} is outside [0, 1) (the fraction of activation dropped)")
    layers = choose(model, include, exclude)
    classes = int(split.targets.max()) + 1 if len(split) else 0
    sums: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, _: Tensor, output: Any, targets: Tensor) -> None:
        found = channels(name, module, output)
        found = found.clamp_min(0) if rectified else found.abs()
        by_class = torch.zeros(classes, found.shape[1], dtype=torch.float64)
        by_class.index_add_(0, targets.cpu(), found.sum(2, dtype=torch.float64).cpu())
        sums[name] = sums[name] + by_class if name in sums else by_class

    seen = observe(model, layers, split, see, batch_size=batch_size, every=include is not None)
    return Specialization(
        {name: class_shares(sums[name].t(), last=last) for name in seen},
        {name: sums[name].shape[1] for name in seen},
        classes,
    )


@dataclass(frozen=True)
class Comparison:
    """Scores of a sparse network against a dense one.

    Attributes:
        rows: layer, or "all" for all layers together -> sparse and dense mean; difference of the
            means, sparse minus dense; ks, the Kolmogorov-Smirnov statistic (largest distance of
            the two distribution functions, in [0, 1]); higher, the probability that a sparse
            channel scores above a dense one, ties half (Mann-Whitney's U / mn; .5: no
            difference). None where a side has no channel left.
    """

    rows: dict[str, dict[str, float | None]]

    def table(self) -> str:
        """A row a layer as plain text; means in percent."""
        width = max(len("layer"), *(len(name) for name in self.rows))
        lines = [f"{'layer':{width}}  sparse   dense    diff     KS  P(sparse > dense)"]
        for name, row in self.rows.items():
            shown = {k: 1.0 if k in ("ks", "higher") else 100.0 for k in row}
            cell = {k: "-" if v is None else f"{shown[k] * v:.2f}" for k, v in row.items()}
            lines.append(
                f"{name:{width}}{cell['sparse']:>8}{cell['dense']:>8}{cell['difference']:>8}"
                f"{cell['ks']:>7}{cell['higher']:>19}"
            )
        return "\n".join(lines)


def compare(sparse: Specialization, dense: Specialization) -> Comparison:
    """Layer by layer and all together; raises :class:`ArgumentError` when the layers differ."""
    if list(sparse.scores) != list(dense.scores):
        raise ArgumentError(
            f"sparse has the layers {', '.join(sparse.scores)}, dense {', '.join(dense.scores)}; "
            "compare the same ones"
        )
    pairs = {name: (s, dense.scores[name]) for name, s in sparse.scores.items()}
    pairs["all"] = (_joined(sparse.scores), _joined(dense.scores))
    return Comparison({name: _compared(a, b) for name, (a, b) in pairs.items()})


def _compared(a: Tensor, b: Tensor) -> dict[str, float | None]:
    if not len(a) or not len(b):
        return dict.fromkeys(("sparse", "dense", "difference", "ks", "higher"))
    a, b = a.sort().values, b.sort().values
    points = torch.cat([a, b])
    below = [torch.searchsorted(x, points, right=True).double() / len(x) for x in (a, b)]
    less = torch.searchsorted(b, a).double()
    ties = torch.searchsorted(b, a, right=True).double() - less
    return {
        "sparse": float(a.mean()),
        "dense": float(b.mean()),
        "difference": float(a.mean() - b.mean()),
        "ks": float((below[0] - below[1]).abs().max()),
        "higher": float((less + ties / 2).mean() / len(b)),
    }
