"""A transformer that reads from left to right (Radford et al. 2019, GPT-2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.errors import ArgumentError

__all__ = ["GPT", "gpt"]


class _Attention(nn.Module):
    """Heads of causal self-attention; ``packed`` makes queries, keys and values at once."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.packed = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> the same shape; a place sees those before it and itself."""
        n, t, _ = x.shape
        # the width of a head is what is left over, so that heads can be taken out
        parts = self.packed(x).view(n, t, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (N, heads, T, width of a head)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.output(seen.transpose(1, 2).flatten(2))
        return out


class _Block(nn.Module):
    """Attention and a perceptron of four times the width, each normalised before and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> the same shape."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.contract(F.gelu(self.expand(self.norm2(x)), approximate="tanh"))
        return out


class GPT(nn.Module):
    """``embedding`` and ``position``, blocks ``block.0``, ``block.1``, ..., ``norm``, ``output``.

    Args:
        vocabulary: number of tokens.
        context: tokens of the longest window.
        width: of the residual stream; a multiple of ``heads``.
        layers, heads: blocks, and attention heads of each.
        tied: output and embedding share their weights, as GPT-2's do.
    """

    def __init__(
        self, vocabulary: int, context: int, width: int, layers: int, heads: int, tied: bool
    ) -> None:
        super().__init__()
        if min(vocabulary, context, width, layers, heads) < 1 or width % heads:
            raise ArgumentError(
                f"vocabulary={vocabulary}, context={context}, width={width}, layers={layers}, "
                f"heads={heads}: each must be at least 1, and width a multiple of heads"
            )
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.block = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.block.modules():  # so that the sum of all blocks has the variance of one
            if isinstance(module, _Attention):
                nn.init.normal_(module.output.weight, std=0.02 / (2 * layers) ** 0.5)
            if isinstance(module, _Block):
                nn.init.normal_(module.contract.weight, std=0.02 / (2 * layers) ** 0.5)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) token ids -> (N, T, vocabulary) logits of the next token.

        Raises :class:`ArgumentError` for windows longer than the context.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ArgumentError(
                f"windows of {length} tokens are longer than context={self.context}; cut them, or "
                "build the network with a longer context"
            )
        x = self.embedding(tokens) + self.position(torch.arange(length, device=tokens.device))
        for block in self.block:
            x = block(x)
        out: Tensor = self.output(self.norm(x))
        return out


def gpt(
    *,
    classes: int = 50_257,
    in_shape: tuple[int, ...] | None = None,
    context: int = 1024,
    width: int = 768,
    layers: int = 12,
    heads: int = 12,
    tied: bool = True,
) -> nn.Module:
    """A :class:`GPT` of GPT-2's size, 124 M parameters, unless told otherwise.

    ``classes``: the vocabulary. ``in_shape`` is accepted as every network accepts it: windows of
    up to ``context`` tokens will do.
    """
    if in_shape is not None and len(in_shape) != 1:
        raise ArgumentError(f"gpt takes in_shape=(tokens,), got {tuple(in_shape)}")
    return GPT(classes, context, width, layers, heads, tied)
