from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gossamer import nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError, DatasetError, FormatError
from gossamer.nets import build
from gossamer.nets.resnet import Shortcut
from gossamer.nets.vision import WithinChannelNorm


def count(model):
    return sum(p.numel() for p in names.weights(model).values())


# Weights that multiply, from the papers' tables or counted by hand.
SIZES = {
    "mlp": 64 * 300 + 300 * 100 + 100 * 10,
    "lenet-300-100": 266_200,
    "lenet-5": 430_500,
    "conv-2": 4_300_992,
    "conv-4": 2_425_024,
    "conv-6": 2_261_184,
    "convnet": 25 * (3 * 32 + 32 * 32 + 32 * 64) + 1024 * 10,
    "cifarnet": 25 * (3 * 64 + 64 * 64) + 2304 * 384 + 384 * 192 + 1920,
    "vgg-16": 14_710_464 + 5120,
    "resnet-20": 268_336,
}


@pytest.mark.parametrize("name", ["mlp", "lenet-300-100", "lenet-5", "convnet", "cifarnet"])
def test_small_nets_have_the_published_number_of_weights(name):
    assert count(build(name)) == SIZES[name]


def test_a_narrower_conv_2_keeps_its_layout():
    net = build("conv-2", filters=8, hidden=64)
    assert count(net) == 9 * (3 * 8 + 8 * 8) + 8 * 16 * 16 * 64 + 64 * 64 + 640
    with pytest.raises(ArgumentError, match="filters=0"):
        build("conv-2", filters=0)


def test_large_nets_have_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in build("alexnet").parameters()) == 60_965_224
        assert count(build("conv-2")) == SIZES["conv-2"]
        assert count(build("conv-4")) == SIZES["conv-4"]
        assert count(build("conv-6")) == SIZES["conv-6"]
        assert count(build("vgg-16")) == SIZES["vgg-16"]
        assert count(build("resnet-20")) == SIZES["resnet-20"]
        assert build("alexnet", in_shape=(3, 227, 227)).fc6.in_features == 9216
        assert build("alexnet").fc6.in_features == 9216
        # 11.0 M and 1.5 M in the paper's table
        assert sum(p.numel() for p in build("wrn-16-8").parameters()) == 10_961_370
        assert sum(p.numel() for p in build("wrn-28-2").parameters()) == 1_467_610


@pytest.mark.parametrize(
    ("name", "in_shape", "classes"),
    [
        ("mlp", (1, 8, 8), 10),
        ("lenet-300-100", (1, 8, 8), 7),
        ("lenet-5", (1, 28, 28), 10),
        ("lenet-5", (3, 32, 31), 3),
        ("conv-4", (3, 32, 32), 10),
        ("convnet", (3, 32, 32), 10),
        ("convnet", (3, 31, 29), 10),
        ("cifarnet", (3, 24, 24), 10),
        ("cifarnet", (3, 32, 32), 10),
        ("alexnet", (3, 64, 80), 5),
        ("vgg-11", (3, 32, 32), 4),
        ("resnet-20", (3, 32, 32), 10),
        ("resnet-8", (1, 28, 28), 5),
        ("wrn-10-1", (3, 32, 32), 10),
    ],
)
def test_forward_fits_the_shape(name, in_shape, classes):
    model = build(name, in_shape=in_shape, classes=classes, seed=0).eval()
    with torch.no_grad():
        out = model(torch.randn(2, *in_shape, generator=torch.Generator().manual_seed(0)))
    assert out.shape == (2, classes)
    assert torch.isfinite(out).all()
    assert not torch.equal(out[0], out[1])


def test_layer_names():
    assert list(names.weights(build("lenet-5"))) == [
        "conv1.weight",
        "conv2.weight",
        "ip1.weight",
        "ip2.weight",
    ]
    assert list(names.weights(build("lenet-300-100"))) == [f"ip{i}.weight" for i in (1, 2, 3)]
    resnet = list(names.parameters(build("resnet-20")))
    assert "layer3.2.bn2.weight" in resnet
    assert "layer1.0.conv1.weight" in resnet
    assert resnet[-1] == "linear.bias"


def test_option_a_shortcut_by_hand():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    y = Shortcut(1, 3, 2)(x)
    assert torch.equal(y[0, 1], torch.tensor([[0.0, 2.0], [8.0, 10.0]]))
    assert not y[0, [0, 2]].any()


def test_within_channel_norm_by_hand():
    x = torch.zeros(1, 2, 3, 3)
    x[0, 0] = torch.arange(9.0).view(3, 3)
    y = WithinChannelNorm(3, alpha=0.5, beta=0.75)(x)
    assert y[0, 0, 1, 1] == pytest.approx(4 * (1 + 0.5 * 204 / 9) ** -0.75)
    # the corner sees 0, 1, 3 and 4, and zeros beyond the border
    assert y[0, 0, 0, 1] == pytest.approx(1 * (1 + 0.5 * (1 + 4 + 9 + 16 + 25) / 9) ** -0.75)
    assert not y[0, 1].any()


def test_cifarnet_norm_is_tensorflows():
    x = torch.randn(1, 12, 1, 1, generator=torch.Generator().manual_seed(0))
    y = build("cifarnet").norm1(x).reshape(-1)
    flat = x.reshape(-1).double()
    for i in range(12):
        window = flat[max(0, i - 4) : i + 5]
        expected = flat[i] / (1 + 0.001 / 9 * (window**2).sum()) ** 0.75
        assert float(y[i]) == pytest.approx(float(expected), rel=1e-5)


def test_seeds_repeat_and_leave_the_global_generator():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a, b, c = (build("lenet-5", seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["ip1.weight"], c["ip1.weight"])


def test_glorot_has_its_variance_and_zero_biases():
    model = nets.glorot_(nn.Linear(400, 600), torch.Generator().manual_seed(0))
    assert float(model.weight.detach().std()) == pytest.approx((2 / 1000) ** 0.5, rel=0.01)
    assert not model.bias.any()


def test_mlp_sizes():
    assert [p.shape[0] for n, p in build("mlp-784-500-300-10").named_parameters()] == [
        *(500, 500, 300, 300, 10, 10)
    ]
    assert build("mlp", sizes=(4, 3)).fc1.weight.shape == (3, 4)
    with pytest.raises(ArgumentError, match="takes 784 inputs"):
        build("mlp-784-10", in_shape=(1, 8, 8))


def test_lstm_is_causal_carries_its_state_and_ties():
    model = build("lstm-lm", classes=11, embedding=6, hidden=(5, 6), seed=0).eval()
    tokens = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(0))
    out = model(tokens)
    assert out.shape == (3, 8, 11)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    after = model(changed)
    assert torch.equal(out[:, :5], after[:, :5])
    assert not torch.allclose(out[:, 5:], after[:, 5:])
    first, state = model.advance(tokens[:, :3])
    second, _ = model.advance(tokens[:, 3:], state)
    assert torch.allclose(torch.cat([first, second], 1), out, atol=1e-6)
    tied = build("lstm-lm", classes=11, embedding=6, hidden=6, tied=True)
    assert tied.output.weight is tied.embedding.weight
    assert len(tied.rnn) == 2
    with pytest.raises(ArgumentError, match="tied=True"):
        build("lstm-lm", embedding=6, hidden=5, tied=True)


def test_gpt_has_the_published_size_is_causal_and_ties():
    with torch.device("meta"):
        whole = build("gpt")
    assert sum(p.numel() for p in whole.parameters()) == 124_439_808
    model = build("gpt", classes=11, context=8, width=6, layers=2, heads=2, seed=0).eval()
    assert model.output.weight is model.embedding.weight
    tokens = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(0))
    out = model(tokens)
    assert out.shape == (3, 8, 11)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    after = model(changed)
    assert torch.allclose(out[:, :5], after[:, :5], atol=1e-6)
    assert not torch.allclose(out[:, 5:], after[:, 5:])
    assert torch.allclose(model(tokens[:, :5]), out[:, :5], atol=1e-6)
    # a block, written down: attention and a perceptron, each normalised before and added
    block, x = model.block[0], torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(1))
    q, k, v = block.attention.packed(block.norm1(x)).split(6, -1)
    heads = []
    for q1, k1, v1 in zip(q.split(3, -1), k.split(3, -1), v.split(3, -1), strict=True):
        scores = (q1 @ k1.mT / 3**0.5).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v1)
    y = x + block.attention.output(torch.cat(heads, -1))
    y = y + block.contract(F.gelu(block.expand(block.norm2(y)), approximate="tanh"))
    torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-6)
    with pytest.raises(ArgumentError, match="longer than context=8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ArgumentError, match="multiple of heads"):
        build("gpt", width=6, heads=4)
    with pytest.raises(ArgumentError, match="in_shape"):
        build("gpt", in_shape=(1, 8, 8))


def test_pretrained_files_load_and_are_checked(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "resnet-cifar10"
    folder.mkdir()
    state = build("resnet-20", seed=3).state_dict()
    kept = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    save_file(kept, folder / "resnet20.safetensors")
    model = build("resnet-20", pretrained=True, root=tmp_path, seed=4)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in kept.items())
    with pytest.raises(ArgumentError, match=r"does not fit.*linear"):
        build("resnet-20", pretrained=True, root=tmp_path, classes=7)
    (folder / "resnet20.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError, match=r"resnet20\.safetensors"):
        build("resnet-20", pretrained=True, root=tmp_path)
    with pytest.raises(DatasetError, match=r"resnet32\.safetensors.*root="):
        build("resnet-32", pretrained=True, root=tmp_path)
    with pytest.raises(ArgumentError, match="no pretrained weights"):
        build("lenet-5", pretrained=True)


def test_a_users_own_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_own_net.py").write_text(
        "from torch import nn\n"
        "def make(classes=2, width=3):\n    return nn.Linear(width, classes)\n"
        "def wrong():\n    return 1\n"
    )
    assert build("my_own_net:make", classes=5, width=4).weight.shape == (5, 4)
    assert build("my_own_net:make", in_shape=(9,)).weight.shape == (2, 3)
    with pytest.raises(ArgumentError, match=r"not an nn\.Module"):
        build("my_own_net:wrong")
    with pytest.raises(ArgumentError, match="takes no pretrained="):
        build("my_own_net:make", pretrained=True)
    with pytest.raises(ArgumentError, match="height"):
        build("my_own_net:make", height=4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet", {}, "lenet-300-100"),
        ("resnet-21", {}, r"6n \+ 2"),
        ("wrn-27-2", {}, r"6n \+ 4"),
        ("vgg-12", {}, "vgg-16"),
        ("lenet-5", {"in_shape": (1, 8, 8)}, "16 x 16"),
        ("resnet-20", {"in_shape": (64,)}, "channels, height, width"),
        ("mlp", {"classes": 0}, "classes=0"),
        ("lenet-5", {"depth": 3}, "depth"),
    ],
)
def test_bad_names_and_options(name, options, message):
    with pytest.raises(ArgumentError, match=message):
        build(name, **options)


def test_resnet_block_adds_its_input():
    block = build("resnet-8", seed=0).eval().layer1[0]
    with torch.no_grad():
        block.conv2.weight.zero_()
        x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(block(x), F.relu(x))


def test_a_network_made_already_is_no_function(tmp_path, monkeypatch):
    (tmp_path / "made_already.py").write_text("from torch import nn\nraw = nn.Linear(3, 3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArgumentError, match="is a Linear that is made already; name a function"):
        nets.build("made_already:raw")
