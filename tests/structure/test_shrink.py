"""Shrunk networks give what the masked ones give, on networks of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.errors import ArgumentError
from gossamer.nets.language import LSTMLM
from gossamer.nets.resnet import resnet
from gossamer.nets.transformer import GPT
from gossamer.structure import Shrunk, shrink


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def equal(model: nn.Module, example: Any) -> Shrunk:
    """Shrink; the outputs on another batch are the same, and the network is as it was."""
    model.eval()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    result = shrink(model, example)
    torch.manual_seed(1)
    other = nest.mapped(
        lambda t: torch.randn_like(t) if t.is_floating_point() else t.flip(0), example
    )
    with torch.no_grad():
        wanted, got = nest.feed(model, other), nest.feed(result.model, other)
    for a, b in zip(nest.leaves(wanted), nest.leaves(got), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * float(a.abs().max()))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert result.difference <= 1e-5
    return result


def zero_rows(model: nn.Module, part: float, *names: str) -> None:
    """Zero the first rows of these layers' weights, and their biases."""
    with torch.no_grad():
        for name in names:
            layer: Any = model.get_submodule(name)
            count = int(len(layer.weight) * part)
            layer.weight[:count] = 0
            if layer.bias is not None:
                layer.bias[:count] = 0


def test_resnet_20() -> None:
    torch.manual_seed(0)
    net = resnet(20)
    zero_rows(net, 0.5, *[n for n, _ in net.named_modules() if n.endswith("conv1")][1:])
    result = equal(net, torch.randn(2, 3, 32, 32))
    small = shapes(result.model)
    assert small["layer1.0.conv1.weight"] == (8, 16, 3, 3)
    assert small["layer3.2.conv2.weight"] == (64, 32, 3, 3)
    assert type(result.model) is type(net)
    assert "layer3.2.conv2.weight" in str(result)
    assert result.parameters[1] < 0.51 * result.parameters[0]
    before, after = result.macs
    assert before == 40_551_040
    assert after < 0.52 * before


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, width: int, expand: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, expand, 1, bias=False), nn.BatchNorm2d(expand), nn.ReLU6(True),
            nn.Conv2d(expand, expand, 3, 1, 1, groups=expand, bias=False),
            nn.BatchNorm2d(expand), nn.ReLU6(True),
            nn.Conv2d(expand, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(x)
        return out


def mobilenet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), Inverted(8, 24), Inverted(8, 24),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def test_depthwise_convolutions_of_mobilenet() -> None:
    net = mobilenet()
    with torch.no_grad():
        net[1].conv[0].weight[:10] = 0
        for norm in (1, 4):  # what the batch-norms add is zero too
            net[1].conv[norm].bias[:10] = 0
            net[1].conv[norm].weight[:10] = 0
        net[2].conv[6].weight[:, 4:12] = 0
    small = shapes(equal(net, torch.randn(2, 3, 16, 16)).model)
    assert small["1.conv.3.weight"] == (14, 1, 3, 3)
    assert small["1.conv.6.weight"] == (8, 14, 1, 1)
    assert small["2.conv.0.weight"] == (16, 8, 1, 1)


class Dense(nn.Module):
    """DenseNet: every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 4 * i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 4 * i, 4, 3, 1, 1, bias=False) for i in range(4))
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        out: Tensor = self.last(x.mean((2, 3)))
        return out


def test_concatenation_of_densenet() -> None:
    torch.manual_seed(0)
    net = Dense()
    with torch.no_grad():
        net.convs[0].weight[1:3] = 0
        for norm in list(net.norms)[1:]:
            norm.bias[5:7] = 0
    small = shapes(equal(net, torch.randn(2, 3, 8, 8)).model)
    assert small["convs.0.weight"] == (2, 4, 3, 3)
    assert small["convs.3.weight"] == (4, 14, 3, 3)
    assert small["last.weight"] == (3, 18)


class UNet(nn.Module):
    """Down, up by a transposed convolution, and both concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 1, 1)
        self.norm = nn.GroupNorm(4, 8)
        self.up, self.out = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.norm(self.down2(F.max_pool2d(a, 2))))
        out: Tensor = self.out(torch.cat([a, self.up(b)], 1))
        return out


def test_transposed_convolutions_of_a_u_net() -> None:
    torch.manual_seed(0)
    net = UNet()
    with torch.no_grad():
        net.down1.weight[:2] = 0
        net.down1.bias[:2] = 0
        net.down2.weight[2:4] = 0  # a whole group of the norm
        net.down2.bias[2:4] = 0
        net.norm.bias[2:4] = 0
        net.up.weight[:, 3] = 0
        net.up.bias[3] = 0
    model = equal(net, torch.randn(2, 1, 8, 8)).model
    assert shapes(model)["up.weight"] == (6, 5, 2, 2)
    assert shapes(model)["out.weight"] == (2, 9, 3, 3)
    assert (model.norm.num_groups, model.norm.num_channels) == (3, 6)


@pytest.mark.parametrize("way", ["unread", "zero"])
def test_transformer_of_torch_loses_heads_and_hidden_units(way: str) -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2)
    with torch.no_grad():
        for layer in net.layers:
            attention = layer.self_attn
            attention.in_proj_bias.normal_()
            if way == "unread":
                attention.out_proj.weight[:, 4:8] = 0
            else:
                attention.in_proj_weight[36:40] = 0
                attention.in_proj_bias[36:40] = 0
            layer.linear1.weight[:9] = 0
            layer.linear1.bias[:9] = 0
    model = equal(net, torch.randn(2, 5, 16)).model
    assert model.layers[0].self_attn.num_heads == 3
    assert model.layers[1].linear1.out_features == 15
    pad = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        wanted = net(x, mask=mask, src_key_padding_mask=pad.float().masked_fill(pad, -1e9))
        got = model(x, mask=mask, src_key_padding_mask=pad.float().masked_fill(pad, -1e9))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_gpt_loses_heads_and_hidden_units() -> None:
    torch.manual_seed(0)
    net = GPT(30, 8, 16, 2, 4, tied=True)
    with torch.no_grad():
        for block in net.block:
            block.attention.output.weight[:, 4:12] = 0
            block.contract.weight[:, :40] = 0
    model = equal(net, torch.randint(30, (2, 7))).model
    assert model.block[0].attention.heads == 2
    assert shapes(model)["block.1.attention.packed.weight"] == (24, 16)
    assert shapes(model)["block.1.expand.weight"] == (24, 16)
    assert model.output.weight is model.embedding.weight


def test_lstm_language_model_with_half_its_states() -> None:
    torch.manual_seed(0)
    net = LSTMLM(30, 10, (12, 12))
    with torch.no_grad():
        for layer in net.rnn:
            for w in (layer.weight_ih_l0, layer.weight_hh_l0):
                w.view(4, 12, -1)[:, ::2] = 0  # biases stay, as group lasso leaves them
            layer.weight_hh_l0[:, ::2] = 0
        net.rnn[1].weight_ih_l0[:, ::2] = 0
        net.output.weight[:, ::2] = 0
    model = equal(net, torch.randint(30, (2, 7))).model
    assert [layer.hidden_size for layer in model.rnn] == [6, 6]
    tokens = torch.randint(30, (2, 5))
    states = small = None
    with torch.no_grad():
        for _ in range(2):  # from zero states, and from given ones
            wanted, states = net.advance(tokens, states)
            got, small = model.advance(tokens, small)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


class Levels(nn.Module):
    """A recurrent layer of several levels."""

    def __init__(self, kind: Any, two: bool) -> None:
        super().__init__()
        self.rnn = kind(4, 6, 3, bidirectional=two, batch_first=True)
        self.out = nn.Linear(6 * (1 + two), 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.rnn(x)[0])
        return out


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_levels_of_different_sizes(kind: Any, two: bool) -> None:
    torch.manual_seed(0)
    net = Levels(kind, two)
    with torch.no_grad():
        for level in range(3):
            for name, w in net.rnn.named_parameters():
                if f"_l{level}" in name:
                    gates = len(w) // 6
                    w.view(gates, 6, *w.shape[1:])[:, : level + 1] = 0
    model = equal(net, torch.randn(2, 5, 4)).model
    assert model.rnn.sizes == (5, 4, 3)
    packed = nn.utils.rnn.pack_padded_sequence(
        torch.randn(3, 5, 4), torch.tensor([3, 5, 2]), batch_first=True, enforce_sorted=False
    )
    with torch.no_grad():
        wanted, got = net.rnn(packed), model.rnn(packed)
    kept = [i for i in range(12 if two else 6) if i % 6 > 2]
    torch.testing.assert_close(got[0].data, wanted[0].data[:, kept], rtol=0, atol=1e-6)
    last = wanted[1][0] if kind is nn.LSTM else wanted[1]
    mine = got[1][0] if kind is nn.LSTM else got[1]
    torch.testing.assert_close(mine[-1][:, :3], last[-1][:, 3:], rtol=0, atol=1e-6)


class Custom(nn.Module):
    """Parameters of its own, read by functions, with a mask in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.scale = nn.Parameter(torch.randn(6, 1, 1))
        self.mix = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("mask", torch.ones(6, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight * self.mask, padding=1) * self.scale
        return torch.einsum("nchw,co->nohw", F.silu(x), self.mix).flatten(1)


def test_block_of_the_users_own() -> None:
    torch.manual_seed(0)
    net = Custom()
    example = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        net.weight[2] = 0
    small = shapes(equal(net, example).model)
    assert small == {"weight": (5, 3, 3, 3), "scale": (5, 1, 1), "mix": (5, 4)}


def test_constants_are_folded_forward_and_padding_keeps_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 4, 1, bias=False),
        nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight[1] = 0
        net[3].weight[2] = 0  # after the first fold a constant, which padding dilutes
        net[3].weight[2, 1] = 1.0
    small = shapes(equal(net, torch.randn(2, 2, 7, 7)).model)
    assert small["0.weight"] == (3, 2, 3, 3)
    assert small["3.weight"] == (4, 3, 1, 1)
    assert small["3.bias"] == (4,)


def test_a_layer_without_live_units_keeps_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    assert shapes(equal(net, torch.randn(2, 3)).model)["0.weight"] == (1, 3)


class Fixed(nn.Module):
    """Has its sizes as numbers in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out, self.last = nn.Conv2d(1, 4, 3), nn.Linear(64, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).view(-1, 4 * 4 * 4)
        out: Tensor = self.last(torch.tanh(self.out(x)))
        return out


def test_what_the_forward_has_as_numbers_stays_and_is_named() -> None:
    torch.manual_seed(0)
    net = Fixed()
    zero_rows(net, 0.5, "conv")
    with pytest.raises(ArgumentError, match=r"2 of conv.weight: the forward pass then fails"):
        shrink(net, torch.randn(2, 1, 6, 6))
    zero_rows(net, 0.5, "out")
    result = equal(net, torch.randn(2, 1, 6, 6))
    assert shapes(result.model)["out.weight"] == (3, 64)
    assert [(p.tensor, p.count) for p in result.pinned] == [("conv.weight", 2)]


class Rolled(nn.Module):
    """Moves channels about."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.conv(x).roll(1, 1))
        return out


def test_operations_that_cannot_be_followed_are_named_with_their_line() -> None:
    net = Rolled()
    zero_rows(net, 0.5, "conv")
    with pytest.raises(ArgumentError, match=r"2 of conv.weight: roll .*test_shrink.py:\d+"):
        shrink(net, torch.randn(2, 1, 6, 6))


class Branches(nn.Module):
    """Takes another way for other values."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) if x.sum() > 0 else -self.a(x)
        return out


def test_control_flow_by_values_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"from the values of its inputs .*test_shrink.py"):
        shrink(Branches(), torch.randn(2, 3))


def test_inputs_that_do_not_fit_are_refused() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(ArgumentError, match="holds no tensor"):
        shrink(net, None)
    with pytest.raises(ArgumentError, match="does not take example_inputs"):
        shrink(net, torch.randn(2, 4))


def test_nothing_dead_is_no_error() -> None:
    torch.manual_seed(0)
    result = shrink(nn.Linear(3, 2), torch.randn(2, 3))
    assert result.removed == {}
    assert "nothing is dead" in str(result)


class Several(nn.Module):
    """Two inputs by name, and a mapping as output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(2, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.a(x)) * torch.sigmoid(self.b(y))
        return {"scores": self.c(h), "mean": self.c(h).mean(1)}


def test_several_inputs_and_outputs_and_training_mode() -> None:
    torch.manual_seed(0)
    net = Several()
    zero_rows(net, 0.5, "a")
    example = {"x": torch.randn(4, 3), "y": torch.randn(4, 2)}
    result = equal(net, example)
    assert shapes(result.model)["b.weight"] == (3, 2)
    net.train()
    assert shrink(net, example).model.training


class InPlace(nn.Module):
    """A block as torchvision writes it: the sum is made in place."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv2, self.relu = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.ReLU(inplace=True)
        self.down = nn.Conv2d(width, width, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.down is None else self.down(x)
        result: Tensor = self.relu(out)
        return result


@pytest.mark.parametrize("stride", [1, 2])
def test_a_dead_residual_block_becomes_its_shortcut(stride: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), InPlace(6, stride), InPlace(6, 1))
    with torch.no_grad():
        net[1].conv2.weight.zero_()
        nn.init.normal_(net[1].bn2.bias)
    result = equal(net, torch.randn(2, 3, 8, 8))
    block = result.model[1]
    layers = [block.conv1, block.bn1, block.conv2, block.bn2]
    assert not [p for layer in layers for p in layer.parameters()]
    assert sum(p.numel() for p in result.model[2].parameters()) == 672


@pytest.mark.parametrize("affine", [True, False])
def test_zeros_of_a_layer_norm_go_on_counting(affine: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 8), nn.LayerNorm(8, elementwise_affine=affine), nn.GELU(), nn.Linear(8, 2)
    )
    zero_rows(net, 0.4, "0")
    with torch.no_grad():
        net[3].weight[:, :2] = 0  # of three zero ones two are unread
    model = equal(net, torch.randn(4, 3)).model
    assert shapes(model)["0.weight"] == (6, 3)
    assert (model[1].normalized_shape, model[1].count) == ((6,), 8)


def test_weight_norm_loses_its_rows() -> None:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 8))
    net = nn.Sequential(normed, nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[2].weight[:, :3] = 0
    assert equal(net, torch.randn(4, 3)).model[0].weight.shape == (5, 3)


class Outputs:
    """What libraries give: tensors as attributes."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.loss = logits, None


class Selects(nn.Module):
    """Rows by a condition on the inputs, and outputs as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.b = nn.Linear(3, 8), nn.PReLU(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(self.b(self.p(self.a(x))[x[:, 0] > 0]))


def test_outputs_as_attributes() -> None:
    torch.manual_seed(0)
    net = Selects()
    zero_rows(net, 0.5, "a")
    result = shrink(net, torch.randn(6, 3))
    assert result.model.p.num_parameters == 4
