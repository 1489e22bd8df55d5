"""What a layer's responses are, seen in the network: shapes, what follows, and samples of them."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gossamer.core import names, nest
from gossamer.core.errors import ArgumentError
from gossamer.core.graph import check_same, shapes, trace, undisturbed
from gossamer.structure.factors import CONVOLUTIONS, macs, matrix
from gossamer.training.layer_inputs import Pick, Use, feed

__all__ = ["Follower", "Geometry", "Layer", "Positions", "Sample", "followers", "geometry"]

_PASSED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_RELU: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Geometry:
    """Of a layer on one example.

    Attributes:
        before, after: positions along each axis of its input and output (H, W); of a linear layer
            its positions, mostly ``()``.
        calls: in one forward pass.
        shape: of its input, without the batch.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    calls: int
    shape: tuple[int, ...]


def geometry(model: nn.Module, batch: Any) -> dict[str, tuple[nn.Module, Geometry]]:
    """Every convolution and linear layer that a batch meets, by clean name, in that order.

    A layer that is called several times has the shapes of the first call.
    """
    found: dict[str, tuple[nn.Module, Geometry]] = {}
    known = names.cleaned(model)
    handles = []

    def seen(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        calls = found[name][1].calls if name in found else 0
        if isinstance(module, nn.Linear):
            made = Geometry(tuple(x.shape[1:-1]), tuple(y.shape[1:-1]), 1, tuple(x.shape[1:]))
        else:
            made = Geometry(tuple(x.shape[2:]), tuple(y.shape[2:]), 1, tuple(x.shape[1:]))
        if calls:
            first = found[name][1]
            made = Geometry(first.before, first.after, calls + 1, first.shape)
        found[name] = module, made

    kinds = (nn.Linear, *CONVOLUTIONS, *_TRANSPOSED)
    for raw, module in model.named_modules():
        if isinstance(module, kinds):

            def hook(m: nn.Module, args: Any, kw: Any, out: Tensor, name: str = known[raw]) -> None:
                seen(name, m, args[0] if args else kw["input"], out)

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        with undisturbed(model):
            feed(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class Follower:
    """What is behind a layer.

    Attributes:
        scale, shift: (d,), float64: of the batch-norm that alone reads the layer, in evaluation.
        relu: whether only a ReLU reads what comes then.
    """

    scale: Tensor
    shift: Tensor
    relu: bool


def followers(model: nn.Module, example: Any) -> tuple[dict[str, Follower], str]:
    """By clean name: what a graph says is behind each layer that is called once.

    Also why there is none, in words, where the network cannot be traced; else an empty string.

    Raises :class:`ArgumentError` where the network does not compute on the example what its graph
    says (:func:`gossamer.core.graph.check_same`).
    """
    try:
        graph = trace(model)
        ranks = {n.name: len(s) for n, s in shapes(graph, example).items()}
    except ArgumentError as e:
        return {}, f"what follows each layer is not known, so all are fitted linearly ({e})"
    check_same(model, graph, example, "the traced network")
    modules, known = dict(graph.named_modules()), names.cleaned(model)
    calls = Counter(id(modules[str(n.target)]) for n in graph.graph.nodes if n.op == "call_module")
    found: dict[str, Follower] = {}
    for node in graph.graph.nodes:
        layer: Any = modules.get(str(node.target)) if node.op == "call_module" else None
        if layer is None or not isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            continue
        if calls[id(layer)] == 1:
            found[known[str(node.target)]] = _behind(node, layer, modules, calls, ranks)
    return found, ""


def _behind(
    node: fx.Node, layer: Any, modules: Mapping[str, nn.Module], calls: Counter[int], ranks: Any
) -> Follower:
    outputs = len(layer.weight)
    scale = torch.ones(outputs, dtype=torch.float64, device=layer.weight.device)
    shift, normed = torch.zeros_like(scale), False
    at = node
    while len(at.users) == 1:
        (after,) = at.users
        if after.args[:1] != (at,):
            break
        module: Any = modules.get(str(after.target)) if after.op == "call_module" else None
        if type(module) is nn.ReLU or (module is None and after.target in _RELU):
            return Follower(scale, shift, True)
        axis = isinstance(layer, CONVOLUTIONS) or ranks.get(at.name) == 2
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not normed and axis:
            mean, variance = module.running_mean, module.running_var
            if mean is None or variance is None or module.num_features != outputs:
                break
            if calls[id(module)] > 1:
                break
            scale = 1 / torch.sqrt(variance.detach().double() + module.eps)
            shift = -mean.detach().double() * scale
            if module.affine:
                scale = scale * module.weight.detach().double()
                shift = shift * module.weight.detach().double() + module.bias.detach().double()
            normed = True
        elif not isinstance(module, _PASSED):
            break
        at = after
    return Follower(scale, shift, False)


@dataclass
class Layer:
    """A layer that is to be approximated.

    Attributes:
        name: clean, of the module.
        module: an ``nn.Linear`` or a convolution.
        geometry: on one example.
        follower: what is behind it.
    """

    name: str
    module: Any
    geometry: Geometry
    follower: Follower = field(repr=False)

    @property
    def whole(self) -> tuple[int, int]:
        """Multiply-adds and parameters of the layer as it is."""
        where = self.geometry
        products = where.calls * macs(self.module, None, (), where.before, where.after)
        return products, sum(p.numel() for p in self.module.parameters())

    @property
    def kind(self) -> str:
        """What its responses are fitted through: ``relu`` or ``linear``."""
        return "relu" if self.follower.relu else "linear"

    @property
    def scale(self) -> Tensor:
        """Of the batch-norm behind it, (d,); one where there is none."""
        return self.follower.scale

    @property
    def offset(self) -> Tensor:
        """What the responses are for inputs of zero: bias and batch-norm, (d,)."""
        bias = self.module.bias
        if bias is None:
            return self.follower.shift
        return self.scale * bias.detach().double() + self.follower.shift

    def responses(self, inputs: Tensor, kernel: Tensor | None = None) -> Tensor:
        """(n, c * taps) -> (n, d), behind the batch-norm; ``kernel``: in place of the layer's."""
        found = matrix(self.module) if kernel is None else kernel
        return inputs.double() @ (self.scale[:, None] * found).T + self.offset


class Sample:
    """Responses of a layer at some positions: now, and in the original network.

    Args:
        layer: whose responses.
        kernel: (d, c * taps) in place of the layer's, for the responses now.
        asymmetric: False: the responses now are to the original network's inputs too.
    """

    def __init__(self, layer: Layer, kernel: Tensor | None = None, asymmetric: bool = True) -> None:
        self._layer, self._kernel, self._asymmetric = layer, kernel, asymmetric
        self._now: list[Tensor] = []
        self._wanted: list[Tensor] = []

    def add(self, now: Use, before: Use | None, rows: int, *, held: bool = False) -> None:
        """As :meth:`gossamer.training.moments.Moments.add`.

        Raises :class:`ArgumentError` for a use that is not the layer's as it stands, and responses
        that are not finite.
        """
        name, layer = self._layer.name, self._layer
        if len(now.inputs) != 1 or now.rows != (0, rows) or before is None:
            raise ArgumentError(
                f"{name} is used in parts, or otherwise than in the original network, so that its "
                "responses are not those of one layer; exclude it"
            )
        x, y = now.inputs[0], before.inputs[0]
        self._now.append(layer.responses(x if self._asymmetric else y, self._kernel))
        self._wanted.append(layer.responses(y))
        if not bool(self._now[-1].isfinite().all() and self._wanted[-1].isfinite().all()):
            raise ArgumentError(
                f"the calibration inputs give {name} responses that are NaN or infinite; clean "
                "the inputs, or the weights before it"
            )

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Now and wanted, (n, d) each, float64; raises :class:`ArgumentError` for none."""
        if not self._now:
            raise ArgumentError(f"no batch reaches {self._layer.name}; exclude it")
        return torch.cat(self._now), torch.cat(self._wanted)


class Positions:
    """Random positions: the same for a layer and a batch whenever they are asked for.

    Args:
        batches: inputs; a layer's rows are those of each example, one after another.
        count: of each example, at most.
        generator: is drawn from once.
    """

    def __init__(self, batches: Sequence[Any], count: int, generator: torch.Generator) -> None:
        if count < 1:
            raise ArgumentError(f"positions={count} must be at least 1")
        self._examples, self._count = [nest.count(b) for b in batches], count
        self._seed = int(torch.randint(1 << 40, (1,), generator=generator))

    def __call__(self, number: int) -> Pick:
        """Of one batch, by its place among all: name and rows -> which."""
        examples = self._examples[number]

        def pick(name: str, rows: int) -> Tensor:
            mixed = zlib.crc32(f"{self._seed} {number} {name}".encode())
            generator = torch.Generator().manual_seed(mixed)
            if rows % examples:
                return torch.randperm(rows, generator=generator)[: examples * self._count]
            each = rows // examples
            if each <= self._count:
                return torch.arange(rows)
            chosen = torch.rand(examples, each, generator=generator).topk(self._count, 1).indices
            return (chosen + each * torch.arange(examples)[:, None]).reshape(-1)

        return pick
