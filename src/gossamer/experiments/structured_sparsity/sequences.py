"""Random recurrent networks, transformers and perceptrons whose dead units are known."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.experiments.structured_sparsity.graphs import Generated

__all__ = ["perceptron", "recurrent", "transformer"]


def _random(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.7, 0.7)


def _some(source: random.Random, size: int) -> list[int]:
    return sorted(source.sample(range(size), source.randint(0, size - 1)))


class Recurrent(nn.Module):
    """Tokens or vectors, a recurrent layer of one to three levels, and a linear layer."""

    def __init__(self, source: random.Random, kind: str, width: int, hidden: int) -> None:
        super().__init__()
        self.levels, self.two = source.randint(1, 3), source.random() < 0.4
        self.first, self.read = source.random() < 0.6, source.choice(("all", "last", "state"))
        self.bias = source.random() < 0.8
        self.given, self.cells = source.random() < 0.2, kind == "lstm"
        self.embedding = nn.Embedding(9, width) if source.random() < 0.5 else None
        made: Any = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
        self.rnn = made(width, hidden, self.levels, bias=self.bias, batch_first=self.first,
                        bidirectional=self.two)  # fmt: skip
        sides = 2 if self.two and self.read != "state" else 1
        self.norm = nn.BatchNorm1d(hidden * sides) if source.random() < 0.3 else None
        if self.read == "all":
            self.norm = None
        self.output = nn.Linear(hidden * sides, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T) or (N, T, width) -> (N, 4), or (N, T, 4)."""
        if self.embedding is not None:
            x = self.embedding(x)
        if not self.first:
            x = x.transpose(0, 1)
        begin: Any = None
        if self.given:
            count = self.levels * (2 if self.two else 1)
            begin = x.new_zeros(count, x.shape[0 if self.first else 1], self.rnn.hidden_size)
            begin = (begin, begin.clone()) if self.cells else begin
        out, state = self.rnn(x, begin) if self.given else self.rnn(x)
        if self.read == "state":
            out = (state[0] if isinstance(state, tuple) else state)[-1]
        elif self.read == "last":
            out = out[:, -1] if self.first else out[-1]
        result: Tensor = self.output(out if self.norm is None else self.norm(out))
        return result


def recurrent(seed: int) -> Generated:
    """A random LSTM, GRU or plain recurrent network, with some states zeroed."""
    source = random.Random(seed)
    torch.manual_seed(seed)
    kind = source.choice(("lstm", "lstm", "gru", "rnn"))
    width, hidden = source.choice((3, 5)), source.choice((4, 6))
    model = Recurrent(source, kind, width, hidden).eval()
    _random(model)
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    sides = 2 if model.two else 1
    # the last states lie in one tensor, for which all layers keep one size
    count = source.randint(0, hidden - 1)
    same = model.read == "state"
    unread = source.random() < 0.5
    sizes: dict[str, tuple[int, ...]] = {}
    inside: int = width
    gone_before: list[int] = []
    rnn = dict(model.rnn.named_parameters())
    with torch.no_grad():
        for level in range(model.levels):
            goes = count if same else source.randint(0, hidden - 1)
            both: list[int] = []
            for side in range(sides):
                gone = sorted(source.sample(range(hidden), goes))
                both += [side * hidden + g for g in gone]
                tail = f"_l{level}" + ("_reverse" if side else "")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    tensor = rnn.get(name + tail)
                    if tensor is None:
                        continue
                    gated = tensor.view(gates, hidden, *tensor.shape[1:])
                    if not unread or name.startswith("weight"):
                        gated[:, gone] = 0
                    if name == "weight_hh":
                        tensor[:, gone] = 0
                    if name == "weight_ih":
                        tensor[:, gone_before] = 0
                    left = hidden - goes
                    shape = [gates * left, left if name == "weight_hh" else inside]
                    sizes[f"rnn.{name}{tail}"] = tuple(shape[: tensor.ndim])
            gone_before, inside = both, sides * (hidden - goes)
        if model.read == "state":
            gone_before = [
                g - hidden * (sides - 1) for g in gone_before if g >= hidden * (sides - 1)
            ]
        model.output.weight[:, gone_before] = 0
        if model.norm is not None and not unread:
            for tensor in (model.norm.weight, model.norm.bias):
                tensor[gone_before] = 0
    size = model.output.in_features - len(gone_before)
    sizes["output.weight"] = (4, size)
    n, t = 2, source.choice((3, 5))
    example = torch.randn(n, t, width) if model.embedding is None else torch.randint(9, (n, t))
    return Generated(model, example, sizes, f"{kind} of {model.levels}")


class Attention(nn.Module):
    """Heads of attention in one of the ways that people write them."""

    def __init__(self, source: random.Random, width: int, heads: int, kv: int) -> None:
        super().__init__()
        self.heads, self.kv = heads, kv
        self.way = source.choice(("fused", "softmax", "repeat"))
        self.causal = source.random() < 0.5
        each = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, kv * each)
        self.value = nn.Linear(width, kv * each)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> the same shape."""
        n, t, _ = x.shape
        q = self.query(x).view(n, t, self.heads, -1).transpose(1, 2)
        k = self.key(x).view(n, t, self.kv, -1).transpose(1, 2)
        v = self.value(x).view(n, t, self.kv, -1).transpose(1, 2)
        if self.way == "fused":
            seen = F.scaled_dot_product_attention(
                q, k, v, is_causal=self.causal, enable_gqa=self.kv != self.heads
            )
        else:
            k = k.repeat_interleave(self.heads // self.kv, 1)
            v = v.repeat_interleave(self.heads // self.kv, 1)
            score = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            if self.causal:
                score = score + torch.full((t, t), -1e9).to(score.dtype).triu(1)
            seen = score.softmax(-1) @ v
        out: Tensor = self.output(seen.transpose(1, 2).reshape(n, t, -1))
        return out


class Block(nn.Module):
    """Attention and a perceptron, each normalised and added."""

    def __init__(self, source: random.Random, width: int, heads: int, kv: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.torchs = source.random() < 0.4
        self.attention: nn.Module = Attention(source, width, heads, kv)
        if self.torchs:
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
            self.weights = source.random() < 0.5
        self.gated = source.random() < 0.3
        hidden = source.choice((6, 10))
        self.expand = nn.Linear(width, hidden * (2 if self.gated else 1))
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> the same shape."""
        y = self.norm1(x)
        if self.torchs:
            x = x + self.attention(y, y, y, need_weights=self.weights)[0]
        else:
            x = x + self.attention(y)
        y = self.expand(self.norm2(x))
        y = F.glu(y) if self.gated else F.gelu(y)
        out: Tensor = x + self.contract(y)
        return out


class Transformer(nn.Module):
    """An embedding, blocks, and an output that may share the embedding's weights."""

    def __init__(self, source: random.Random, width: int, heads: int, kv: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(9, width), nn.Embedding(6, width)
        layers = source.randint(1, 2)
        self.block = nn.ModuleList(Block(source, width, heads, kv) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 9, bias=False)
        if source.random() < 0.5:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) -> (N, T, 9)."""
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.block:
            x = block(x)
        out: Tensor = self.output(self.norm(x))
        return out


def transformer(seed: int) -> Generated:
    """A random transformer, with some heads and hidden units zeroed."""
    source = random.Random(seed)
    torch.manual_seed(seed)
    heads = source.choice((2, 4))
    kv = source.choice((heads, heads, heads // 2))
    width = heads * source.choice((2, 3))
    model = Transformer(source, width, heads, kv).eval()
    _random(model)
    sizes: dict[str, tuple[int, ...]] = {}
    each = width // heads
    with torch.no_grad():
        for i, block in enumerate(model.block):
            assert isinstance(block, Block)
            shared = 1 if block.torchs else heads // kv
            gone = _some(source, heads // shared)  # groups of heads that share their keys
            queries = [h for g in gone for h in range(g * shared, (g + 1) * shared)]
            rows, few = _rows(queries, each), _rows(gone, each)
            left, small = width - len(rows), (0 if block.torchs else kv * each) - len(few)
            at = f"block.{i}.attention"
            unread = source.random() < 0.5
            if block.torchs:
                mha: Any = block.attention
                mha.out_proj.weight[:, rows] = 0
                mha.in_proj_weight[[2 * width + r for r in rows]] = 0
                mha.in_proj_bias[[2 * width + r for r in rows]] = 0
                sizes[f"{at}.in_proj_weight"] = (3 * left, width)
                sizes[f"{at}.out_proj.weight"] = (width, left)
            else:
                own: Any = block.attention
                if unread:
                    own.output.weight[:, rows] = 0
                else:
                    own.value.weight[few] = 0
                    own.value.bias[few] = 0
                sizes[f"{at}.query.weight"] = (left, width)
                sizes[f"{at}.key.weight"] = sizes[f"{at}.value.weight"] = (small, width)
                sizes[f"{at}.output.weight"] = (width, left)
            hidden = block.contract.in_features
            gone = _some(source, hidden)
            if unread:
                block.contract.weight[:, gone] = 0
            else:
                block.expand.weight[gone] = 0
                block.expand.bias[gone] = 0
            twice = 2 if block.gated else 1
            sizes[f"block.{i}.expand.weight"] = ((hidden - len(gone)) * twice, width)
            sizes[f"block.{i}.contract.weight"] = (width, hidden - len(gone))
    return Generated(model, torch.randint(9, (2, 5)), sizes, "transformer")


def _rows(heads: list[int], each: int) -> list[int]:
    return [r for h in heads for r in range(h * each, (h + 1) * each)]


class Perceptron(nn.Module):
    """Linear layers; some used twice, some called as functions, some on parameters of their own."""

    def __init__(self, source: random.Random, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.ways = [source.choice(("call", "function", "matmul", "twice")) for _ in self.layers]
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(w) if source.random() < 0.4 else nn.Identity() for w in widths[1:]
        )
        self.scale = nn.Parameter(torch.ones(widths[1]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) -> (N, classes)."""
        layers: Any = self.layers
        for i, (layer, norm) in enumerate(zip(layers, self.norms, strict=True)):
            way = self.ways[i]
            if way == "function":
                x = F.linear(x, layer.weight, layer.bias)
            elif way == "matmul":
                x = x @ layer.weight.t() + layer.bias
            elif way == "twice":
                x = layer(x) + torch.tanh(layer(x * 0.5))
            else:
                x = layer(x)
            if i + 1 < len(self.layers):
                x = F.relu_(norm(x)) * self.scale if i == 0 else F.relu(norm(x))
        return x


def perceptron(seed: int) -> Generated:
    """A random perceptron; some units give constants, which go into the biases behind."""
    source = random.Random(seed)
    torch.manual_seed(seed)
    widths = [4, *[source.choice((4, 7)) for _ in range(source.randint(1, 3))], 3]
    model = Perceptron(source, widths).eval()
    _random(model)
    sizes: dict[str, tuple[int, ...]] = {}
    before = 0
    with torch.no_grad():
        for norm in model.norms:
            if isinstance(norm, nn.BatchNorm1d):
                norm.get_buffer("running_mean").uniform_(-1, 1)
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, nn.Linear)
            last = i + 1 == len(model.layers)
            gone = [] if last else _some(source, layer.out_features)
            layer.weight[gone] = 0
            # a constant can only go into the bias of a layer that is used once, as a layer
            folds = not last and model.ways[i + 1] in ("call", "function")
            if not folds:
                layer.bias[gone] = 0
                for tensor in model.norms[i].parameters():
                    tensor[gone] = 0
            sizes[f"layers.{i}.weight"] = (
                layer.out_features - len(gone),
                layer.in_features - before,
            )
            before = len(gone)
    return Generated(model, torch.randn(3, 4), sizes, "perceptron")
