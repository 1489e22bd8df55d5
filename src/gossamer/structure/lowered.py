"""Convolutions as products of matrices without the rows and columns that are zero.

Wen et al., Learning Structured Sparsity in Deep Neural Networks (2016), section 4 and figure 2: a
convolution lowered to ``W (filters, channels * height * width) @ im2col(x)`` loses the rows of
zero filters and the columns of zero shape fibres, and the matrix that is left is dense. Deviation:
the lowered input is made of kept columns alone, tap by tap, in place of the whole im2col.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError

__all__ = ["LoweredConv2d", "live"]


def live(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Rows and columns of a convolution's lowered matrix that are not all zero; at least one each.

    Columns are numbered ``(channel * height + i) * width + j``.
    """
    matrix = conv.weight.detach().flatten(1) != 0
    rows, columns = matrix.any(1).nonzero().flatten(), matrix.any(0).nonzero().flatten()
    return (rows if len(rows) else rows.new_zeros(1)), (
        columns if len(columns) else columns.new_zeros(1)
    )


class LoweredConv2d(nn.Module):
    """What an ``nn.Conv2d`` computes, with some rows and columns of its lowered matrix.

    Parameters: ``weight`` (rows, columns) and ``bias`` (out_channels,) where the convolution has
    one. Filters whose rows are left out give their bias.

    Args:
        conv: of one group, padded with zeros (or not).
        rows, columns: those that are kept, ascending; by default :func:`live`.

    Raises :class:`ArgumentError` for another convolution, or rows and columns that it has not.
    """

    def __init__(
        self, conv: nn.Conv2d, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> None:
        super().__init__()
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ArgumentError(
                f"a lowered convolution has groups=1 and padding by zeros in numbers; this one has "
                f"groups={conv.groups}, padding={conv.padding!r}, {conv.padding_mode!r}"
            )
        found = live(conv)
        rows = found[0] if rows is None else rows
        columns = found[1] if columns is None else columns
        self.out_channels, self.in_channels = conv.out_channels, conv.in_channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation
        for name, kept, size in (
            ("rows", rows, conv.out_channels),
            ("columns", columns, conv.weight[0].numel()),
        ):
            plain = kept.tolist()
            if not plain or plain != sorted(set(plain)) or plain[0] < 0 or plain[-1] >= size:
                raise ArgumentError(f"{name} must ascend, below {size}, and hold one at least")
        self.kept_rows, self.kept_columns = tuple(rows.tolist()), tuple(columns.tolist())
        height, width = self.kernel_size
        by_tap = sorted(self.kept_columns, key=lambda c: (c % (height * width), c))
        self._order = [self.kept_columns.index(c) for c in by_tap]
        self._taps = [
            (*divmod(tap, width), [c // (height * width) for c in some])
            for tap, some in groupby(by_tap, key=lambda c: c % (height * width))
        ]
        matrix = conv.weight.detach().flatten(1)[rows][:, columns]
        self.weight = nn.Parameter(matrix.clone())
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        self.train(conv.training)

    def extra_repr(self) -> str:
        """Sizes of the matrix, of those that it had."""
        whole = self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        rows, columns = self.weight.shape
        return f"{rows} of {self.out_channels} rows, {columns} of {whole} columns"

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W'); or both without N."""
        if x.ndim == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        (up, side), (down, across), (high, wide) = self.padding, self.stride, self.dilation
        x = F.pad(x, (side, side, up, up)) if up or side else x
        height, width = self.kernel_size
        out_h = (x.shape[2] - high * (height - 1) - 1) // down + 1
        out_w = (x.shape[3] - wide * (width - 1) - 1) // across + 1
        parts = []
        for i, j, channels in self._taps:
            seen = x[:, :, i * high : i * high + down * (out_h - 1) + 1 : down]
            seen = seen[..., j * wide : j * wide + across * (out_w - 1) + 1 : across]
            whole = len(channels) == self.in_channels
            parts.append(seen if whole else seen[:, channels])
        lowered = torch.cat(parts, 1).flatten(2)  # (N, columns, H' * W')
        out = self.weight[:, self._order] @ lowered
        if len(self.kept_rows) < self.out_channels:
            full = out.new_zeros(len(x), self.out_channels, out.shape[2])
            out = full.index_copy(1, torch.tensor(self.kept_rows, device=x.device), out)
        if self.bias is not None:
            out = out + self.bias[:, None]
        return out.unflatten(2, (out_h, out_w))
