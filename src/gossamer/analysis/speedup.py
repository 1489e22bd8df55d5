"""The three speed-up figures of a sparse network: two estimates, and what is measured.

Dettmers and Zettlemoyer, *Sparse Networks from Scratch*, arXiv 1907.04840, section 4.2. With t
the time of a layer computed densely:

- (a) a dense convolution that skips empty channels:
  t * (1 - empty weight channels) * (1 - empty activation channels);
- (b) ideal sparse: t * input density * weight density.

A weight channel is an input channel that no kernel reads; an activation channel is one map of one
example. (a) is of convolutions; linear layers keep their t in it. Both are **estimates**: no
kernel that does this was run, and a channel that is empty in weights and activations counts
twice, as in the authors' code. So there is

- (c) measured: the same network with its linear layers stored as CSR, its convolutions dense.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.analysis.layers import choose, observe
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.core.modes import device_of, modes_kept
from gossamer.core.timing import best_of, one_thread, paired
from gossamer.datasets import Split

__all__ = ["LayerSpeed", "Speedups", "empty_weight_channels", "speedups", "to_csr"]

Patterns = str | Iterable[str] | None


def empty_weight_channels(module: nn.Module) -> float:
    """Fraction of the input channels of a convolution (inputs of a linear layer) without weights.

    Raises :class:`ArgumentError` for other modules.
    """
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        raise ArgumentError(f"{type(module).__name__} is no convolution or linear layer")
    read = module.weight.detach() != 0
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.transposed:  # (in, out / groups, ...)
            used = read.flatten(1).any(1)
        else:  # (out, in / groups, ...): the inputs of one group are read by its outputs only
            used = read.view(module.groups, -1, *read.shape[1:]).flatten(3).any(3).any(1)
    else:
        used = read.any(0)
    return 1 - int(used.sum()) / max(1, used.numel())


@dataclass(frozen=True)
class LayerSpeed:
    """One layer: what fills it, and the milliseconds of a batch.

    Attributes:
        layer, kind: clean module name, class name.
        weight_density, input_density: fraction of non-zeros; of the inputs on real data.
        empty_weight_channels, empty_activation_channels: fractions; 0 for linear layers.
        dense_ms: t, measured.
        channel_ms, ideal_ms: the estimates (a) and (b).
        csr_ms: (c), measured; None for convolutions, which stay dense.
    """

    layer: str
    kind: str
    weight_density: float
    input_density: float
    empty_weight_channels: float
    empty_activation_channels: float
    dense_ms: float
    channel_ms: float
    ideal_ms: float
    csr_ms: float | None


@dataclass(frozen=True)
class Speedups:
    """The three figures.

    Attributes:
        rows: one a layer.
        batch_size: examples in the timed batch.
        dense_ms, csr_ms: the whole network, measured: dense, and with linear layers in CSR; the
            medians of pairs of runs on one thread.
        measured: (c), the median of the pairs' ratios, dense over CSR; None without a linear
            layer, as both networks do the same then, and a ratio would be noise.
        interval: of ``measured``, at 95 %; None for fewer than six pairs.
    """

    rows: tuple[LayerSpeed, ...]
    batch_size: int
    dense_ms: float
    csr_ms: float
    measured: float | None
    interval: tuple[float, float] | None

    @property
    def channel(self) -> float:
        """(a): dense over estimated time of the layers together."""
        return self._dense / sum(row.channel_ms for row in self.rows)

    @property
    def ideal(self) -> float:
        """(b): dense over estimated time of the layers together."""
        least = sum(row.ideal_ms for row in self.rows)
        return self._dense / least if least else float("inf")

    @property
    def _dense(self) -> float:
        return sum(row.dense_ms for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Rows and totals as plain values; JSON takes them."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "batch_size": self.batch_size,
            "dense_ms": self.dense_ms,
            "csr_ms": self.csr_ms,
            "estimated_channel": self.channel,
            "estimated_ideal": self.ideal,
            "measured": self.measured,
            "measured_interval": None if self.interval is None else list(self.interval),
        }

    def table(self) -> str:
        """A row a layer as plain text: densities in percent, milliseconds, then the factors."""
        width = max(len("whole network"), *(len(row.layer) for row in self.rows))
        lines = [f"{'layer':{width}} weights  inputs   dense   (a)     (b)     (c)"]
        for row in self.rows:
            csr = "-" if row.csr_ms is None else f"{row.csr_ms:.4f}"
            lines.append(
                f"{row.layer:{width}}{100 * row.weight_density:8.2f}{100 * row.input_density:8.2f}"
                f"{row.dense_ms:8.4f}{row.channel_ms:8.4f}{row.ideal_ms:8.4f}{csr:>8}"
            )
        lines.append(f"{'whole network':{width}}{'':16}{self.dense_ms:8.4f}{self.csr_ms:24.4f}")
        known = "      -" if self.measured is None else f"{self.measured:7.2f}x"
        lines.append(
            f"{'speed-up':{width}}{'':24}{self.channel:7.2f}x{self.ideal:7.2f}x{known}"
            "   (a), (b) estimated, (c) measured"
        )
        if self.measured is None:
            lines.append("no linear layer: the same operations, so nothing is compared in (c)")
        elif self.interval is None:
            lines.append("too few pairs of runs for an interval of (c)")
        else:
            low, high = self.interval
            told = "" if low > 1 or high < 1 else "; it holds 1: no difference that this shows"
            lines.append(f"95 % interval of (c): {low:.2f}x to {high:.2f}x{told}")
        return "\n".join(lines)


class _Csr(nn.Module):
    """x -> x W' + b with W in compressed sparse rows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR support beta
            self.weight = linear.weight.detach().to_sparse_csr()
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = x.reshape(-1, x.shape[-1])
        # a vector has its own, faster kernel
        out = (
            (self.weight @ flat[0]).unsqueeze(0) if len(flat) == 1 else (self.weight @ flat.t()).t()
        )
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], -1)


def to_csr(model: nn.Module, layers: Iterable[str]) -> nn.Module:
    """A copy for inference whose named linear layers are stored as CSR; the rest as it was.

    ``layers``: names as ``model.named_modules()`` gives them. Raises :class:`ArgumentError` for a
    name that is no linear layer.
    """
    twin = copy.deepcopy(model)
    found = dict(twin.named_modules(remove_duplicate=False))
    for name in layers:
        module = found.get(name)
        if not isinstance(module, nn.Linear):
            raise ArgumentError(f"layers names {name!r}, which is no linear layer of the model")
        parent, _, attribute = name.rpartition(".")
        setattr(found[parent], attribute, _Csr(module))
    return twin


def speedups(
    model: nn.Module,
    split: Split,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    batch_size: int = 1,
    rounds: int = 30,
) -> Speedups:
    """The three figures of a model whose removed weights are zeros; it ends as it was.

    Args:
        split: real data; input densities and empty activation channels are means over it.
        include, exclude: patterns over the names of convolutions and linear layers.
        batch_size: examples in the timed batch, the first of the split.
        rounds: of timing, on one thread; the least counts for a layer, and the median of the
            pairs' ratios for the network. Densities do not depend on it.

    Raises :class:`ArgumentError` for no layers or others than convolutions and linear ones, an
    empty split, a batch size or rounds under 1; :class:`~gossamer.core.errors.GossamerError` when
    CSR and dense outputs differ.
    """
    if batch_size < 1 or rounds < 1:
        raise ArgumentError(f"batch_size={batch_size}, rounds={rounds} must be at least 1")
    layers = choose(model, include, exclude)
    empty = {name: empty_weight_channels(module) for name, module in layers.items()}
    counts: dict[str, Tensor] = {}

    def count(name: str, module: nn.Module, x: Tensor, output: Any, targets: Tensor) -> None:
        filled = x != 0
        found = [int(filled.sum()), x.numel(), 0, 1]
        if isinstance(module, nn.modules.conv._ConvNd):
            maps = filled.flatten(2).any(2)
            found[2:] = [maps.numel() - int(maps.sum()), maps.numel()]
        counts[name] = counts.get(name, torch.zeros(4, dtype=torch.int64)) + torch.tensor(found)

    seen = observe(model, layers, split, count, batch_size=1000, every=include is not None)
    inputs: dict[str, list[Tensor]] = {name: [] for name in seen}
    timed = split.take(slice(0, batch_size))
    observe(
        model,
        {name: layers[name] for name in seen},
        timed,
        lambda name, module, x, *_: inputs[name].append(x.clone()),
        batch_size=batch_size,
        every=True,
    )
    # by identity: clean names are not what named_modules() says of wrapped models
    chosen = {id(layers[name]) for name in seen}
    linear = [
        n
        for n, m in model.named_modules(remove_duplicate=False)
        if id(m) in chosen and isinstance(m, nn.Linear)
    ]
    device, rows = device_of(model), []
    with torch.inference_mode(), modes_kept(model), one_thread():
        model.eval()
        for name in seen:
            module, xs = layers[name], inputs[name]
            runs = [_over(module, xs)]
            if isinstance(module, nn.Linear):
                runs.append(_over(_Csr(module), xs))
            dense, *csr = best_of(runs, rounds, device=device)
            rows.append(_row(name, module, empty[name], counts[name], dense, *csr))
        whole = timed.batch(slice(None))[0].to(device)
        twin = to_csr(model, linear)
        _check(model(whole), twin(whole))
        network = paired(
            lambda: model(whole),
            lambda: twin(whole),
            pairs=rounds,
            seconds=float("inf"),
            device=device,
        )
    return Speedups(
        tuple(rows),
        len(timed),
        network.first * 1e3,
        network.second * 1e3,
        network.ratio if linear else None,
        network.interval if linear else None,
    )


def _over(module: nn.Module, xs: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for x in xs:
            module(x)

    return run


def _row(
    name: str,
    module: nn.Module,
    empty: float,
    counts: Tensor,
    dense: float,
    csr: float | None = None,
) -> LayerSpeed:
    filled, entries, maps_empty, maps = counts.tolist()
    weight = module.weight
    assert isinstance(weight, Tensor)  # choose() and empty_weight_channels() saw to that
    density = int(torch.count_nonzero(weight)) / max(1, weight.numel())
    if isinstance(module, nn.Linear):
        empty = 0.0
    return LayerSpeed(
        layer=name,
        kind=type(module).__name__,
        weight_density=density,
        input_density=filled / entries,
        empty_weight_channels=empty,
        empty_activation_channels=maps_empty / maps,
        dense_ms=dense * 1e3,
        channel_ms=dense * 1e3 * (1 - empty) * (1 - maps_empty / maps),
        ideal_ms=dense * 1e3 * (filled / entries) * density,
        csr_ms=None if csr is None else csr * 1e3,
    )


def _check(dense: Any, csr: Any) -> None:
    if isinstance(dense, Tensor):
        scale = float(dense.abs().max())
        if not torch.allclose(dense, csr, rtol=1e-3, atol=1e-3 * scale):
            raise GossamerError("CSR and dense outputs differ; this is a bug of a sparse kernel")
