"""Modules that stand in where torch's own cannot have the sizes: same calls, same names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Constant", "Heads", "PartOfLayerNorm", "Stacked"]

_CALLS = {"LSTM": torch._VF.lstm, "GRU": torch._VF.gru, "RNN_TANH": torch._VF.rnn_tanh,
          "RNN_RELU": torch._VF.rnn_relu}  # fmt: skip
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


class Stacked(nn.Module):
    """Recurrent layers of different sizes, called as ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` are.

    Parameters have the names that torch gives them. The last states of all layers lie in one
    tensor as there, those of smaller layers filled up with zeros.

    Args:
        like: the module that it stands in for.
        sizes: hidden size of each layer; of both directions where there are two.
        inputs: of the first layer.
    """

    def __init__(self, like: nn.RNNBase, sizes: Sequence[int], inputs: int) -> None:
        super().__init__()
        self.mode, self.bias, self.batch_first = like.mode, like.bias, like.batch_first
        self.dropout, self.bidirectional = like.dropout, like.bidirectional
        self.num_layers, self.sizes, self.input_size = len(sizes), tuple(sizes), inputs
        self.hidden_size = max(sizes)
        options: dict[str, Any] = {
            "device": like.weight_ih_l0.device,
            "dtype": like.weight_ih_l0.dtype,
        }
        gates, sides = _GATES[self.mode], 2 if self.bidirectional else 1
        for level, size in enumerate(sizes):
            for side in range(sides):
                tail = f"_l{level}" + ("_reverse" if side else "")
                shapes: list[tuple[int, ...]] = [(gates * size, inputs), (gates * size, size)]
                shapes += [(gates * size,), (gates * size,)] if self.bias else []
                names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                for name, shape in zip(names, shapes, strict=False):
                    setattr(self, name + tail, nn.Parameter(torch.zeros(shape, **options)))
            inputs = size * sides
        self.train(like.training)

    def _weights(self, level: int) -> list[Tensor]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        tails = ("", "_reverse") if self.bidirectional else ("",)
        return [getattr(self, f"{n}_l{level}{tail}") for tail in tails for n in names]

    def flatten_parameters(self) -> None:
        """Nothing to do; torch's modules have it."""

    def forward(self, x: Any, hx: Any = None) -> Any:
        """As the module that it stands in for."""
        packed = x if isinstance(x, PackedSequence) else None
        data: Tensor = x if packed is None else packed.data
        single = packed is None and data.ndim == 2
        batch_dim = 0 if self.batch_first else 1
        if single:
            data = data.unsqueeze(batch_dim)
        count = int(packed.batch_sizes[0]) if packed is not None else data.shape[batch_dim]
        states = None if hx is None else list(hx) if isinstance(hx, tuple) else [hx]
        if states is not None and single:
            states = [s.unsqueeze(1) for s in states]
        if states is not None and packed is not None and packed.sorted_indices is not None:
            states = [s.index_select(1, packed.sorted_indices) for s in states]
        sides = 2 if self.bidirectional else 1
        last: list[list[Tensor]] = []
        for level, size in enumerate(self.sizes):
            rows = slice(level * sides, (level + 1) * sides)
            if states is None:
                zero = data.new_zeros(sides, count, size)
                begin = [zero, zero] if self.mode == "LSTM" else [zero]
            else:
                begin = [s[rows, :, :size].contiguous() for s in states]
            given = tuple(begin) if self.mode == "LSTM" else begin[0]
            call: Any = _CALLS[self.mode]
            weights = self._weights(level)
            rest = (self.bias, 1, 0.0, self.training, self.bidirectional)
            if packed is not None:
                out = call(data, packed.batch_sizes, given, weights, *rest)
            else:
                out = call(data, given, weights, *rest, self.batch_first)
            data = out[0]
            last.append([F.pad(s, (0, self.hidden_size - size)) for s in out[1:]])
            if self.dropout and level + 1 < self.num_layers:
                data = F.dropout(data, self.dropout, self.training)
        ends = [torch.cat(one) for one in zip(*last, strict=True)]
        if packed is not None:
            if packed.unsorted_indices is not None:
                ends = [e.index_select(1, packed.unsorted_indices) for e in ends]
            data = PackedSequence(  # type: ignore[assignment]
                data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
            )
        elif single:
            data, ends = data.squeeze(batch_dim), [e.squeeze(1) for e in ends]
        return data, tuple(ends) if self.mode == "LSTM" else ends[0]


class Heads(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with fewer heads than its width holds; the same calls and names.

    Args:
        like: the module that it stands in for.
        heads: that are left.
        width: of a head.
    """

    def __init__(self, like: nn.MultiheadAttention, heads: int, width: int) -> None:
        nn.Module.__init__(self)
        self.embed_dim, self.kdim, self.vdim = like.embed_dim, like.kdim, like.vdim
        self.num_heads, self.head_dim, self.dropout = heads, width, like.dropout
        self.batch_first, self.add_zero_attn = like.batch_first, like.add_zero_attn
        self._qkv_same_embed_dim = False  # torch's fused paths know only whole widths
        inner = heads * width
        options: dict[str, Any] = {
            "device": like.out_proj.weight.device, "dtype": like.out_proj.weight.dtype,
        }  # fmt: skip

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, **options))

        packed = like.in_proj_weight is not None
        self.in_proj_weight: Any = made(3 * inner, like.embed_dim) if packed else None
        for name, size in (("q", like.embed_dim), ("k", like.kdim), ("v", like.vdim)):
            setattr(self, f"{name}_proj_weight", None if packed else made(inner, size))
        self.in_proj_bias = made(3 * inner) if like.in_proj_bias is not None else None
        self.bias_k = self.bias_v = None
        self.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(
            inner, like.embed_dim, bias=like.out_proj.bias is not None, **options
        )
        self.train(like.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``; weights are those of the heads that are left."""
        single = query.ndim == 2
        if single:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if self.in_proj_weight is not None:
            weights: Sequence[Any] = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(t, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for t, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(attn_mask, key_padding_mask, q, int(self.add_zero_attn))
        dropout = self.dropout if self.training else 0.0
        shown = None
        if need_weights:
            score = q @ k.transpose(-2, -1) / self.head_dim**0.5
            shown = (score if mask is None else score + mask).softmax(-1)
            seen = F.dropout(shown, dropout) @ v
            shown = shown.mean(1) if average_attn_weights else shown
        else:
            seen = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(seen.transpose(1, 2).flatten(2))
        if single:
            return out.squeeze(0), None if shown is None else shown.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), shown

    def _mask(self, mask: Tensor | None, pad: Tensor | None, q: Tensor, more: int) -> Tensor | None:
        """Both masks as what is added to the scores, (N or 1, heads or 1, L or 1, S)."""
        total: Tensor | None = None
        for one, view in ((mask, None), (pad, (len(q), 1, 1, -1))):
            if one is None:
                continue
            if one.dtype == torch.bool:
                one = torch.zeros_like(one, dtype=q.dtype).masked_fill_(one, float("-inf"))
            if view is not None:
                one = one.view(view)
            elif one.ndim == 3:
                one = one.view(len(q), -1, *one.shape[1:])
            one = F.pad(one.to(q.dtype), (0, more)) if more else one.to(q.dtype)
            total = one if total is None else total + one
        return total


class PartOfLayerNorm(nn.LayerNorm):
    """A layer norm without values that were zero, which count in its mean and variance.

    Args:
        like: the layer norm that it stands in for.
        kept: values that are left.
    """

    def __init__(self, like: nn.LayerNorm, kept: int) -> None:
        affine = like.weight is not None
        weight = like.weight if affine else torch.zeros(0)
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        bias = like.bias is not None
        super().__init__(kept, like.eps, affine, bias, **options)
        self.count = like.normalized_shape[0]
        self.train(like.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., kept) -> the same shape."""
        mean = x.sum(-1, keepdim=True) / self.count
        apart = x - mean
        zeros = (self.count - x.shape[-1]) * mean.square()
        var = (apart.square().sum(-1, keepdim=True) + zeros) / self.count
        out = apart * torch.rsqrt(var + self.eps)
        out = out if self.weight is None else out * self.weight
        return out if self.bias is None else out + self.bias


class Constant(nn.Module):
    """A branch of which nothing but a constant a channel is left.

    Args:
        value: (channels,).
        axis: of the channels in the output.
        step: how many times shorter the output's other axes are than the input's, but the batch's.
    """

    value: Tensor

    def __init__(self, value: Tensor, axis: int, step: int) -> None:
        super().__init__()
        self.axis, self.step = axis, step
        self.register_buffer("value", value)

    def extra_repr(self) -> str:
        """Its channels."""
        return f"{len(self.value)} channels"

    def forward(self, x: Tensor) -> Tensor:
        """(N, any, ...) -> (N, channels, ...), in memory of its own."""
        shape = [s if d == 0 else -(-s // self.step) for d, s in enumerate(x.shape)]
        axis = self.axis % x.ndim
        shape[axis] = len(self.value)
        view = [-1 if d == axis else 1 for d in range(x.ndim)]
        return self.value.view(view).expand(shape).contiguous()
