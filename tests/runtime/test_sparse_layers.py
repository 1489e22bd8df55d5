"""Sparse layers in place of a network's own, and their operators in torch's own tools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.runtime import operators
from gossamer.runtime.sparse_layers import SparseConv2d, SparseLinear, TernaryLinear, sparsify


def pruned(layer: Any, density: float = 0.2) -> Any:
    with torch.no_grad():
        layer.weight *= torch.rand_like(layer.weight) < density
    return layer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = pruned(nn.Conv2d(3, 8, 3, padding="same", bias=False))
        self.norm = nn.BatchNorm2d(8)
        self.second = pruned(nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2))
        self.head = pruned(nn.Linear(12, 5))
        self.dense = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.dense(self.head(self.second(x).mean((2, 3))))


def test_a_network_gets_sparse_layers_and_gives_the_same() -> None:
    net, x = Net().eval(), torch.randn(6, 3, 9, 9)
    with torch.no_grad():
        want = net(x)
        records = sparsify(net, x)
        assert [r.name for r in records] == ["first", "second", "head"]
        assert isinstance(net.first, SparseConv2d)
        assert isinstance(net.head, SparseLinear)
        assert type(net.dense) is nn.Linear
        torch.testing.assert_close(net(x), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net(x[:1]), want[:1], atol=1e-5, rtol=1e-5)
        assert net(x[:0]).shape == (0, 4)
    state = net.state_dict()
    assert all(isinstance(v, Tensor) for v in state.values())


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_linear_layers_keep_leading_dimensions(batch: int) -> None:
    weight = pruned(nn.Linear(40, 12)).weight.detach()
    bias, x = torch.randn(12), torch.randn(batch, 3, 40)
    want = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(SparseLinear(weight, bias)(x), want, atol=1e-5, rtol=1e-5)
    near = SparseLinear(weight, bias, precision="int8")(x)
    assert (near - want).abs().max() < 0.03 * want.abs().max()
    signs = weight.sign() * 0.25
    want = nn.functional.linear(x, signs, bias)
    assert (TernaryLinear(signs, bias)(x) - want).abs().max() < 0.03 * want.abs().max()


def test_eight_bits_choose_ternary_where_it_is() -> None:
    net = nn.Sequential(pruned(nn.Linear(30, 20)), nn.ReLU(), pruned(nn.Linear(20, 6)))
    with torch.no_grad():
        net[2].weight.sign_()
    sparsify(net, torch.randn(4, 30), precision="int8")
    assert isinstance(net[0], SparseLinear)
    assert isinstance(net[2], TernaryLinear)


def test_what_reads_a_weight_itself_is_refused_untouched() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = pruned(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) @ self.head.weight

    net = Tied()
    with pytest.raises(ArgumentError, match="does not run with its layers replaced"):
        sparsify(net, torch.randn(2, 6))
    assert type(net.head) is nn.Linear


def test_a_layer_that_differs_is_named_and_nothing_changes() -> None:
    net = nn.Sequential(nn.Flatten(), pruned(nn.Linear(30, 20)), nn.ReLU())
    with pytest.raises(ArgumentError, match="1: SparseLinear differs by"):
        sparsify(net, torch.randn(4, 30), precision="int8", tolerance=1e-6)
    assert type(net[1]) is nn.Linear


def test_hooked_dense_and_unused_layers_stay() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), pruned(nn.Linear(4, 4), 0.1)
            self.hooked = pruned(nn.Linear(4, 4), 0.1)
            self.hooked.register_forward_hook(lambda m, i, o: o + 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.hooked(self.used(x))

    net = Part()
    assert sparsify(net, torch.randn(2, 4)) == []
    assert {type(m) for m in net.children()} == {nn.Linear}


def test_export_and_compile_carry_the_operators() -> None:
    net, x = Net().eval(), torch.randn(3, 3, 9, 9)
    sparsify(net, x)
    with torch.no_grad():
        want = net(x)
        exported = torch.export.export(net, (x,))
        assert "gossamer.sparse_conv2d" in str(exported.graph)
        torch.testing.assert_close(exported.module()(x), want)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want)


def test_operators_pass_torchs_own_checks() -> None:
    weight = pruned(nn.Linear(20, 6)).weight.detach()
    checks = ("test_schema", "test_faketensor")
    rows, bits = SparseLinear(weight), SparseLinear(weight, precision="int8")
    x, inf = torch.randn(5, 20), float("inf")
    torch.library.opcheck(
        operators.sparse_linear,
        (
            x,
            [rows.row_starts, rows.row_columns, rows.row_values],
            [rows.panel_starts, rows.panel_order, rows.panel_taps, rows.panel_values],
            None, 6, rows.block, -inf, inf,
        ),
        test_utils=checks,
    )  # fmt: skip
    torch.library.opcheck(
        operators.sparse_bytes_linear,
        (
            x, bits.starts, bits.data, None, bits.order, bits.scale, bits.sums, torch.randn(6),
            bits.width, -inf, inf,
        ),
        test_utils=checks,
    )  # fmt: skip
    three = TernaryLinear(weight.sign())
    torch.library.opcheck(
        operators.few_bits_linear,
        (x, three.codes, None, three.scale, three.sums, None, 0.0, inf),
        test_utils=checks,
    )
    layer = SparseConv2d(torch.ones(2, 3, 3, 3), stride=2, padding=1)
    torch.library.opcheck(
        operators.sparse_conv2d,
        (
            torch.randn(2, 3, 8, 7), layer.starts, layer.order, layer.taps, layer.values, None,
            layer.shape, layer.stride, layer.padding, layer.dilation, 1, layer.block, -inf, inf,
        ),
        test_utils=checks,
    )  # fmt: skip


def test_bad_input_is_named() -> None:
    layer = SparseLinear(torch.ones(2, 3))
    with pytest.raises(ArgumentError, match="x must be a numpy array of float32"):
        layer(torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="x has shape"):
        SparseConv2d(torch.ones(2, 3, 3, 3))(torch.ones(1, 2, 8, 8))
    with pytest.raises(ArgumentError, match="weight must have 2 dimensions"):
        SparseLinear(torch.ones(2))
    with pytest.raises(ArgumentError, match="row 1 of weight"):
        TernaryLinear(torch.tensor([[1.0, -1.0], [1.0, 2.0]]))
    with pytest.raises(ArgumentError, match="precision='int4'"):
        SparseLinear(torch.ones(2, 3), precision="int4")
