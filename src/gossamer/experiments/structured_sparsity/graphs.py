"""Random networks of convolutions whose dead channels are known by how they were made.

A network is a list of steps on a list of values. Every value's channels are stretches of *spaces*:
what is added has one space, what is concatenated has several. Channels of a space are zeroed in
all that write them, so that they are zero wherever they are read, and all of them can go.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Generated", "Graph", "graph"]

Piece = tuple["Space", int, int]  # a space, first and last + 1 of its channels


@dataclass(eq=False)
class Space:
    """Channels that live and die together wherever they are.

    Attributes:
        size: number of channels.
        cut: in how many parts some step cuts it, each of which must lose equally many.
        grouped: channels of a group norm's group, which only goes as a whole; 0: none.
        fixed: none of it can go.
        gone: the channels that are zeroed.
    """

    size: int
    cut: int = 1
    grouped: int = 0
    fixed: bool = False
    gone: list[int] = field(default_factory=list)

    def choose(self, source: random.Random) -> None:
        """Zero some channels, such as can go."""
        if self.fixed or (self.cut > 1 and self.grouped) or source.random() < 0.2:
            return
        if self.grouped:
            first = source.randrange(self.size // self.grouped) * self.grouped
            self.gone = [*range(first, first + self.grouped)] if self.grouped < self.size else []
            return
        part = self.size // self.cut
        local = source.sample(range(part), source.randint(0, part - 1))
        self.gone = sorted(at + part * p for at in local for p in range(self.cut))


@dataclass
class Value:
    """A tensor of the network: whose channels, and its length along each other axis."""

    pieces: list[Piece]
    length: int

    @property
    def size(self) -> int:
        """Its channels."""
        return sum(stop - start for _, start, stop in self.pieces)

    @property
    def space(self) -> Space | None:
        """The space that it is all of."""
        whole = len(self.pieces) == 1 and self.pieces[0][2] - self.pieces[0][1]
        return self.pieces[0][0] if whole == self.pieces[0][0].size else None


@dataclass
class Generated:
    """A network, a batch for it, and the sizes that its parameters must come to.

    Attributes:
        sizes: parameter -> its shape where all that was zeroed has gone.
        kind: of the network.
        parts: what it is built of.
    """

    model: nn.Module
    example: Any
    sizes: dict[str, tuple[int, ...]]
    kind: str
    parts: tuple[str, ...] = ()


_ACTIVATIONS: list[Any] = [
    F.relu, torch.tanh, F.gelu, F.silu, F.hardswish, F.leaky_relu, F.elu, nn.ReLU(inplace=True),
    nn.ReLU6(), nn.Mish(), lambda x: x.relu_(), lambda x: x * 0.5, lambda x: x.clamp(-1, 1),
    lambda x: x.mul_(2), lambda x: x / 3, lambda x: -x, lambda x: F.relu(x, inplace=True),
]  # fmt: skip


class Graph(nn.Module):
    """Runs the steps: (operation, indices of what it reads, its layer or None)."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, list[int], Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, classes)."""
        values = [x]
        for op, reads, what in self.steps:
            values.extend(self._step(op, [values[i] for i in reads], what))
        return values[-1]

    def _step(self, op: str, given: list[Tensor], what: Any) -> Sequence[Tensor]:
        x = given[0]
        if op == "layer":
            return [self.layers[what](x)]
        if op == "functional":  # the same convolution, as a call on its parameters
            layer = self.layers[what]
            call = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
            return [call(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)]
        if op == "activation":
            return [_ACTIVATIONS[what](x.clone() if what in (7, 11, 13, 16) else x)]
        if op == "add":
            return [x + given[1] if what else x.clone().add_(given[1])]
        if op == "gate":
            s = x.mean(dim=list(range(2, x.ndim)), keepdim=True)
            return [x * torch.sigmoid(self.layers[what](s))]
        if op == "cat":
            return [torch.cat(given, 1)]
        if op == "split":
            return x.chunk(2, 1) if what else x.split(x.shape[1] // 2, 1)
        if op == "shuffle":
            n, c = x.shape[:2]
            return [x.view(n, 2, c // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)]
        if op == "pool":
            kind = (F.max_pool1d, F.max_pool2d, F.max_pool3d) if what else (
                F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)  # fmt: skip
            return [kind[self.dims - 1](x, 2)]
        if op == "pad":
            return [F.pad(x, (1, 1) * self.dims)]
        if op == "upsample":
            return [F.interpolate(x, scale_factor=2.0)]
        if op == "flatten":
            return [x.flatten(1) if what else x.reshape(x.shape[0], -1)]
        if op == "mean":
            return [x.mean(dim=list(range(2, x.ndim)))]
        raise AssertionError(op)


class _Builder:
    """Adds random steps."""

    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.dims = source.choice((1, 2, 2, 2, 3))
        self.net = Graph(self.dims)
        self.rows: list[tuple[nn.Module, list[Piece], list[Piece], str]] = []
        length = {1: 12, 2: 8, 3: 5}[self.dims]
        image = Space(source.choice((1, 3)), fixed=True)
        self.values = [Value([(image, 0, image.size)], length)]
        self.same: dict[Space, Space] = {}

    def step(self, op: str, reads: list[int], what: Any, *made: Value) -> int:
        """One step; the index of its first value."""
        self.net.steps.append((op, reads, what))
        self.values.extend(made)
        return len(self.values) - len(made)

    def layer(self, module: nn.Module) -> int:
        """Its number."""
        self.net.layers.append(module)
        return len(self.net.layers) - 1

    def conv(self, at: int, out: Space | None = None, keep: bool = False) -> int:
        """A convolution of any kind; ``keep``: the length stays."""
        s, x = self.source, self.values[at]
        kinds = ["plain", "plain", "grouped", "depthwise", "transposed", "functional"]
        kind = s.choice(kinds)
        space = out or Space(s.choice((4, 6, 8)))
        pieces = [(space, 0, space.size)]
        kernel = s.choice((1, 3)) if x.length >= 3 else 1
        pad, stride, dilation = s.choice((0, kernel // 2)), 1, 1
        if not keep and x.length >= 6:
            stride = s.choice((1, 1, 2))
            if kernel == 3 and pad == 0 and x.length >= 6:
                dilation = s.choice((1, 2))
        pad = kernel // 2 if keep else pad
        groups, step = 1, "layer"
        if kind == "grouped" and x.space is not None and not x.space.fixed and out is None:
            if x.size % 2 == 0:
                groups, x.space.cut, space.cut = 2, 2, 2
        elif kind == "depthwise" and not any(p[0].fixed for p in x.pieces) and out is None:
            groups, pieces = x.size, x.pieces
        elif kind == "functional":
            step = "functional"
        size = sum(stop - start for _, start, stop in pieces)
        bias = s.random() < 0.6
        if kind == "transposed" and groups == 1 and not keep and x.length <= 8:
            stride = s.choice((1, 2))
            up: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[self.dims - 1]
            layer: Any = up(x.size, size, kernel, stride, pad, bias=bias)
            length = (x.length - 1) * stride - 2 * pad + kernel
        else:
            cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dims - 1]
            layer = cls(x.size, size, kernel, stride, pad, dilation, groups, bias)
            length = (x.length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        kind = "transposed" if layer.transposed else "depthwise" if groups > 2 or (
            groups == x.size) else "grouped" if groups == 2 else "plain"  # fmt: skip
        self.rows.append((layer, x.pieces, pieces, kind))
        number = self.layer(layer)
        return self.step(step, [at], number, Value(list(pieces), length))

    def norm(self, at: int) -> int:
        """A batch, instance or group norm."""
        s, x = self.source, self.values[at]
        kind = s.choice(("batch", "batch", "instance", "group"))
        module: nn.Module
        if kind == "group" and x.space is not None and x.size % 2 == 0 and not x.space.fixed:
            if x.space.grouped not in (0, x.size // 2):
                return at
            x.space.grouped = x.size // 2
            module = nn.GroupNorm(2, x.size)
        elif kind == "instance" and x.length > 1:
            cls: Any = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[self.dims - 1]
            module = cls(x.size, affine=s.random() < 0.5)
        else:
            module = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.dims - 1](x.size)
        self.rows.append((module, x.pieces, x.pieces, "norm"))
        return self.step("layer", [at], self.layer(module), Value(x.pieces, x.length))

    def more(self) -> None:
        """One random thing, on one of the last values."""
        s = self.source
        at = len(self.values) - 1 - (s.randrange(2) if len(self.values) > 2 else 0)
        x = self.values[at]
        what = s.choice(("conv", "conv", "norm", "act", "residual", "residual", "cat", "split",
                         "gate", "pool", "upsample", "pad", "shuffle"))  # fmt: skip
        free = not any(p[0].fixed for p in x.pieces)
        if what == "norm" and free:
            at = self.norm(at)
        elif what == "act":
            at = self.step("activation", [at], s.randrange(len(_ACTIVATIONS)), x)
        elif what == "residual" and x.space is not None and free:
            at = self.residual(at)
        elif what == "cat":
            near = [i for i, v in enumerate(self.values) if v.length == x.length and i != at]
            if near and x.size < 16:
                other = s.choice(near)
                both = Value(x.pieces + self.values[other].pieces, x.length)
                at = self.step("cat", [at, other], None, both)
        elif what in ("split", "shuffle") and x.space is not None and free and x.size % 2 == 0:
            if what == "split":
                space, half = x.space, x.size // 2
                space.cut = 2
                self.step("split", [at], s.random() < 0.5, Value([(space, 0, half)], x.length),
                          Value([(space, half, x.size)], x.length))  # fmt: skip
        elif what == "gate" and free and x.space is not None:
            layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dims - 1](x.size, x.size, 1)
            self.rows.append((layer, x.pieces, x.pieces, "gate"))
            at = self.step("gate", [at], self.layer(layer), x)
        elif what == "pool" and x.length >= 4:
            at = self.step("pool", [at], s.random() < 0.5, Value(x.pieces, x.length // 2))
        elif what == "upsample" and x.length <= 4:
            at = self.step("upsample", [at], None, Value(x.pieces, x.length * 2))
        elif what == "pad" and x.length <= 6:
            at = self.step("pad", [at], None, Value(x.pieces, x.length + 2))
        else:
            self.conv(at)

    def residual(self, at: int) -> int:
        """One or two convolutions that keep the shape, added to what they began with."""
        s, x = self.source, self.values[at]
        inside = self.conv(at, keep=True)
        if s.random() < 0.7:
            inside = self.norm(inside)
        inside = self.step(
            "activation", [inside], s.randrange(len(_ACTIVATIONS)), self.values[inside]
        )
        last = self.conv(inside, out=x.space, keep=True)
        if s.random() < 0.5:
            last = self.norm(last)
        return self.step("add", [last, at], s.random() < 0.5, Value(x.pieces, x.length))

    def end(self) -> None:
        """A linear layer on all of it, or on the means."""
        s, at = self.source, len(self.values) - 1
        x = self.values[at]
        classes = Space(3, fixed=True)
        flat = s.random() < 0.5
        each = x.length**self.dims if flat else 1
        step = ("flatten", s.random() < 0.5) if flat else ("mean", None)
        at = self.step(step[0], [at], step[1], x)
        linear = nn.Linear(x.size * each, 3)
        self.rows.append((linear, x.pieces, [(classes, 0, 3)], f"linear {each}"))
        self.step("layer", [at], self.layer(linear), Value([(classes, 0, 3)], 1))


def graph(seed: int) -> Generated:
    """A random network of convolutions, with some channels zeroed."""
    source = random.Random(seed)
    torch.manual_seed(seed)
    builder = _Builder(source)
    builder.conv(0)
    for _ in range(source.randint(2, 7)):
        builder.more()
    builder.end()
    seen: list[Space] = []
    for _, ins, outs, _ in builder.rows:
        seen += [p[0] for p in (*ins, *outs) if p[0] not in seen]
    for space in seen:
        space.choose(source)
    sizes: dict[str, tuple[int, ...]] = {}
    names = {id(m): f"layers.{i}" for i, m in enumerate(builder.net.layers)}
    with torch.no_grad():
        for buffer in builder.net.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
        for p in builder.net.parameters():
            p.uniform_(-0.7, 0.7)
        for layer, ins, outs, kind in builder.rows:
            _zero(layer, outs, kind)
            sizes |= {
                f"{names[id(layer)]}.{k}": v for k, v in _sizes(layer, ins, outs, kind).items()
            }
    builder.net.eval()
    shape = (2, builder.values[0].size, *[builder.values[0].length] * builder.dims)
    parts = {row[3].split()[0] for row in builder.rows} | {s[0] for s in builder.net.steps}
    kind = f"graph {builder.dims}d"
    return Generated(builder.net, torch.randn(shape), sizes, kind, tuple(sorted(parts)))


def _gone(pieces: list[Piece]) -> list[int]:
    """Zeroed channels of a value."""
    found, base = [], 0
    for space, start, stop in pieces:
        found += [base + at - start for at in space.gone if start <= at < stop]
        base += stop - start
    return found


def _zero(layer: Any, outs: list[Piece], kind: str) -> None:
    at = _gone(outs)
    if kind == "norm":
        for tensor in (layer.weight, layer.bias, getattr(layer, "running_mean", None)):
            if tensor is not None:
                tensor[at] = 0
    elif kind == "transposed":
        layer.weight[:, at] = 0
    elif kind != "gate":
        layer.weight[at] = 0
    if kind not in ("norm", "gate") and layer.bias is not None:
        layer.bias[at] = 0


def _sizes(
    layer: Any, ins: list[Piece], outs: list[Piece], kind: str
) -> dict[str, tuple[int, ...]]:
    less_in, less_out = len(_gone(ins)), len(_gone(outs))
    found = {}
    for name, tensor in layer.named_parameters():
        shape = list(tensor.shape)
        if kind == "transposed" and name == "weight":
            shape[0] -= less_in
            shape[1] -= less_out
        else:
            shape[0] -= less_out
            if name == "weight" and kind == "grouped":
                shape[1] -= less_in // layer.groups
            elif name == "weight" and kind.startswith("linear"):
                shape[1] -= less_in * int(kind.split()[1])
            elif name == "weight" and kind in ("plain", "gate"):
                shape[1] -= less_in
        found[name] = tuple(shape)
    return found
