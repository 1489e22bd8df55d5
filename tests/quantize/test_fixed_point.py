import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer import nets
from gossamer.core.errors import ArgumentError, DatasetError
from gossamer.pack import load_into, pack_bytes, unpack
from gossamer.quantize import IntegerNetwork, Precision, calibrate
from gossamer.quantize.fixed_point import (
    Format,
    error,
    no_overflow,
    quantize,
    search,
    search_pairs,
    to_fixed_point,
)
from gossamer.quantize.integer import divide_round, shift_round
from gossamer.structure import fold_batchnorm

EIGHT = Precision(8, 8, 8, True)


def two_s_complement(bits: list[int], frac: int) -> float:
    """The paper's equation, least bit first; the last bit counts negative."""
    *lower, sign = bits
    value = sum(b * 2.0**i for i, b in enumerate(lower)) - sign * 2.0 ** len(lower)
    return value * 2.0**-frac


@pytest.mark.parametrize("frac", [-3, 0, 2, 7])
def test_values_are_all_that_two_s_complement_can_say(frac):
    said = {two_s_complement([n >> i & 1 for i in range(4)], frac) for n in range(16)}
    dense = torch.linspace(-20, 20, 4001, dtype=torch.float64) * 2.0**-frac
    assert set(quantize(dense, 4, frac).tolist()) == said


def test_ties_go_to_even_and_large_values_saturate():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 99.0, -99.0])
    expected = torch.tensor([0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 7.0, -8.0])
    assert torch.equal(quantize(x, 4, 0), expected)
    assert not torch.signbit(quantize(torch.tensor([-0.1]), 4, 0)).any()


def test_start_of_the_search_by_hand():
    assert no_overflow(-1.0, 0.0, 8) == 7  # -128 / 128
    assert no_overflow(0.0, 1.0, 8) == 6  # 127 / 128 is too small
    assert no_overflow(0.0, 0.9960, 8) == 7  # 127.49 rounds to 127
    assert no_overflow(-300.0, 5.0, 8) == -2
    assert no_overflow(0.0, 0.0, 8) == 0
    assert no_overflow(0.0, 2.0**900, 8) == -894  # 64; 128 is too large
    assert no_overflow(0.0, 2.0**-900, 8) == 906


def brute(tensor: Tensor, bits: int, target: Tensor | None = None) -> dict[int, float]:
    start = no_overflow(float(tensor.min()), float(tensor.max()), bits)
    # both ends: everything rounds to zero, everything saturates close to zero
    last = start + bits + 3 + tensor.numel().bit_length()
    lengths = range(start - bits - 3, last)
    return {f: error(tensor, bits, f, target=target) for f in lengths}


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=30),
    bits=st.integers(2, 16),
)
def test_the_search_equals_brute_force(values, bits):
    tensor = torch.tensor(values)
    every = brute(tensor, bits)
    found = search(tensor, bits)
    assert every[found] == pytest.approx(min(every.values()), rel=1e-9, abs=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 12), apart=st.sampled_from([0.01, 0.5, 3.0]))
def test_the_search_against_a_target_equals_brute_force(seed, bits, apart):
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(40, generator=g) ** 3
    tensor = target + apart * torch.randn(40, generator=g)
    every = brute(tensor, bits, target)
    found = search(tensor, bits, target=target)
    assert every[found] == pytest.approx(min(every.values()), rel=1e-9)


def test_the_search_trades_saturation_for_rounding():
    w = torch.cat([torch.full((500,), 0.11), torch.tensor([1.0])])
    start = no_overflow(0.11, 1.0, 4)
    assert search(w, 4) > start
    assert error(w, 4, search(w, 4)) < error(w, 4, start)
    # together as apart
    assert search_pairs([(w[:300], w[:300]), (w[300:], w[300:])], 4) == search(w, 4)


def test_a_dead_output_rounds_to_zero():
    noise, dead = torch.tensor([0.0, 0.25, 0.5]), torch.zeros(3)
    assert not quantize(noise, 8, search(noise, 8, target=dead)).any()


def test_edges_and_bad_input():
    assert search(torch.zeros(5), 8) == 0
    assert search(torch.zeros(0, 3), 8) == 0
    assert search(torch.tensor(3.0), 8) == 5
    q = to_fixed_point(torch.tensor([0.3, -0.3, 0.0]), 8)
    assert q.codebook.tolist() == [0.0, -77 / 256, 77 / 256]
    for bits in (1, 17, 8.0, True):
        with pytest.raises(ArgumentError, match="outside 2 to 16"):
            quantize(torch.ones(2), bits, 0)
        with pytest.raises(ArgumentError, match="outside 2 to 16"):
            search(torch.ones(2), bits)
    with pytest.raises(ArgumentError, match="weights=20"):
        Precision(20, 8, 8, True)
    for bad in (math.nan, math.inf):
        with pytest.raises(ArgumentError, match="NaN or infinite"):
            search(torch.tensor([1.0, bad]), 8)
        with pytest.raises(ArgumentError, match="NaN or infinite"):
            quantize(torch.tensor([1.0, bad]), 8, 0)
    with pytest.raises(ArgumentError, match="differs"):
        search(torch.ones(2), 8, target=torch.ones(3))
    with pytest.raises(ArgumentError, match="exactly"):
        quantize(torch.tensor([1000.0]).bfloat16(), 10, 0)  # 511 takes 9 bits
    with pytest.raises(ArgumentError, match="frac=600"):
        Format(8, 600)


@given(codes=st.lists(st.integers(-(2**50), 2**50), min_size=1), shift=st.integers(-5, 70))
def test_shift_round_is_exact(codes, shift):
    got = shift_round(torch.tensor(codes), shift).tolist()
    for n, found in zip(codes, got, strict=True):
        if shift > 0:
            down, rest = divmod(n, 1 << shift)
            half = 1 << (shift - 1)
            assert found == down + (rest > half or (rest == half and down % 2 == 1))
        else:
            assert found == max(-(2**22), min(2**22, n)) << -shift


@given(code=st.integers(-(2**30), 2**30), count=st.integers(1, 900), shift=st.integers(-12, 12))
def test_divide_round_is_python_s_rounding_of_fractions(code, count, shift):
    from fractions import Fraction

    exact = round(Fraction(code) / count / Fraction(2) ** shift)
    assert int(divide_round(torch.tensor(code), torch.tensor(count), shift)) == exact


class Zoo(nn.Module):
    """Every operation that has a rule."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, dilation=1, groups=groups)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.act = nn.ReLU(inplace=True)
        self.largest = nn.MaxPool2d(2, ceil_mode=True)
        self.mean = nn.AvgPool2d(3, stride=2, padding=1)
        self.edge = nn.AvgPool2d((3, 2), stride=1, padding=1, count_include_pad=False)
        self.drop = nn.Dropout(0.5)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(80, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))[:, 1:-1]
        y = F.relu(self.grouped(x) + short)
        z = self.largest(F.relu(y)) + self.mean(y)
        z = F.max_pool2d(self.wide(z), 3, 1, 1)
        z = torch.cat([z, self.edge(z)[:, :, :4, :4], F.adaptive_max_pool2d(y, 4)], 1)
        flat = self.drop(self.pool(z)).view(x.size(0), -1)
        more = torch.flatten(torch.mean(z, (2, 3), keepdim=True), 1)
        joined = torch.cat([flat[:, :64], more[:, :-8]], 1).reshape(-1, 80)
        return self.out(self.hidden(joined).relu())


def zoo(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Zoo(groups=(1, 2, 8)[seed % 3])
        net.bn.running_mean.normal_()
        net.bn.running_var.uniform_(0.5, 2)
        nn.init.normal_(net.bn.weight)
        return net.eval()


def images(count: int, seed: int = 9) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("dynamic", [True, False])
def test_integers_equal_the_simulation_bit_for_bit(seed, bits, dynamic):
    folded = fold_batchnorm(zoo(seed))
    net = calibrate(folded, [images(4), images(3, 1)], Precision(bits, bits, bits, dynamic))
    x = images(5, 2) * 1.5
    simulated, whole = net(x), IntegerNetwork(net)
    assert simulated.numpy().tobytes() == whole(x).numpy().tobytes()
    slow = IntegerNetwork(net, oracle=True)
    assert torch.equal(whole.codes(whole.encode(x)), slow.codes(slow.encode(x)))
    assert simulated.unique().numel() > 2 or bits == 3
    if bits == 16 and dynamic:
        exact = folded(x / 1.5).detach()
        assert float((net(x / 1.5) - exact).abs().max()) < 0.01 * float(exact.abs().max())


def test_mixed_bits_and_a_module_called_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(torch.relu(self.a(x))).relu())

    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=g)
    net = calibrate(Twice(), [x], Precision(8, 16, 10, True), weight_bits={"b": 4})
    assert len(net.layer("b").weight.unique()) <= 16
    assert torch.equal(net(x), IntegerNetwork(net, oracle=True)(x))
    assert set(net.values()) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_one_layer_by_hand():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.75, -0.5]]))  # codes 6 and -4 at length 3
        layer.bias.copy_(torch.tensor([0.25]))  # code 4 at length 4
    x = torch.tensor([[1.5, 0.5], [-1.0, 1.0]])  # length 2
    net = calibrate(nn.Sequential(layer), [x], Precision(4, 4, 4, True))
    assert [f.frac for f in net.formats.values()] == [2, 2]
    assert (net.layer("0").form.frac, net.layer("0").bias_form.frac) == (3, 4)
    # 6 * 6 - 4 * 2 + (4 << 1) = 36 at length 5; 36 / 8 = 4.5 rounds to the even 4; 4 / 4
    assert IntegerNetwork(net).codes(torch.tensor([[6, 2], [-4, 4]])).tolist() == [[4], [-4]]
    assert net(x).tolist() == [[1.0], [-1.0]]


def test_earlier_layers_are_quantised_before_later_ones():
    """The second output's length fits what the quantised first layer sends on."""
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        first.weight.fill_(1.0)
        second.weight.fill_(1.0)
    x = torch.tensor([[0.3], [-0.9]])
    net = calibrate(nn.Sequential(first, second), [x], Precision(8, 8, 2, True))
    sent = quantize(quantize(x, 2, net.formats["input_1"].frac), 2, net.formats["0"].frac)
    assert net.formats["1"].frac == search(sent, 2, target=x)


def test_the_bias_is_aligned_to_the_sums():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(40.0)
        layer.bias.copy_(torch.tensor([0.001, -0.003]))
    net = calibrate(nn.Sequential(layer), [torch.full((2, 3), 50.0)], EIGHT)
    found = net.layer("0")
    assert found.bias_form.frac == found.form.frac + net.formats["input_1"].frac
    assert not found.bias.any()


def test_static_has_one_length_for_weights_and_one_for_data():
    folded = fold_batchnorm(zoo(1))
    net = calibrate(folded, [images(4)], Precision(8, 8, 8, False))
    assert len({f.frac for f in net.formats.values()}) == 1
    assert len({layer.form.frac for layer in net.layers}) == 1
    start = no_overflow(
        min(float(p.min()) for p in folded.state_dict().values()),
        max(float(p.max()) for p in folded.state_dict().values()),
        8,
    )
    assert abs(net.layers[0].form.frac - start) <= 2
    dynamic = calibrate(folded, [images(4)], EIGHT)
    x = images(5, 2)
    exact = folded(x).detach()
    assert (dynamic(x) - exact).abs().mean() < (net(x) - exact).abs().mean()


def test_calibration_takes_inputs_or_tuples_and_leaves_the_model():
    folded = fold_batchnorm(zoo(0)).train()
    before = copy.deepcopy(folded.state_dict())
    a = calibrate(folded, [images(4)], EIGHT)
    b = calibrate(folded, iter([(images(4), torch.zeros(4))]), EIGHT)
    assert a.formats == b.formats
    assert folded.training
    assert all(torch.equal(v, before[n]) for n, v in folded.state_dict().items())
    x = images(2, 3)
    other = calibrate(fold_batchnorm(zoo(2 - 2)), [images(4) * 9], EIGHT)
    other.load_state_dict(a.state_dict())
    assert torch.equal(other(x), a(x))
    assert torch.equal(copy.deepcopy(a)(x), a(x))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.GELU(), r"1 \(GELU\) has no rule"),
        (nn.BatchNorm2d(4), r"1 \(BatchNorm2d\) .*fold_batchnorm"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "reflect"),
        (nn.Conv2d(4, 4, 3, padding="same"), "same"),
        (nn.AvgPool2d(2, divisor_override=3), "divisor_override"),
        (nn.AvgPool2d(2, ceil_mode=True, padding=1), "ceil_mode"),
        (nn.AdaptiveAvgPool2d(3), "equal windows"),
        (nn.Flatten(0), "from 1"),
        (nn.Softmax(1), "Softmax"),
    ],
)
def test_what_has_no_rule_is_named(module, message):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), module)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ArgumentError, match=message):
        calibrate(net, [images(2)], EIGHT)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda net, x: net(x) * 2, "mul"),
        (lambda net, x: net(x) + 1, "add"),
        (lambda net, x: net(x) + net(x)[:, :1], "broadcasting"),
        (lambda net, x: F.dropout(net(x)), "drops in evaluation"),
        (lambda net, x: F.pad(net(x), (1, 1), value=2.0), "zeros"),
        (lambda net, x: net(x)[:, 0], "slices"),
        (lambda net, x: net(x).mean(), "averages over"),
        (lambda net, x: (net(x), x), "one tensor"),
        (lambda net, x: net(x).reshape(-1, 4), "mixes the examples"),
        (lambda net, x: F.linear(x, net.weight[:, :, 0, 0]), "weight"),
        (lambda net, x: net(x).sum() if x.sum() > 0 else x, "cannot be traced"),
    ],
)
def test_calls_without_a_rule_are_named(forward, message):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self.net, x)

    with pytest.raises(ArgumentError, match=message):
        calibrate(Odd(), [images(2)], EIGHT)


def test_bad_calibration_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ArgumentError, match="batches is empty"):
        calibrate(net, [], EIGHT)
    with pytest.raises(ArgumentError, match="batches is empty"):
        calibrate(net, [images(2)[:0]], EIGHT)
    for batch, kind in (({"x": images(2)}, "dict"), (images(2).numpy(), "ndarray"), ((), "tuple")):
        with pytest.raises(ArgumentError, match=f"calibration batch 1 is {kind}; give a tensor"):
            calibrate(net, [images(2), batch], EIGHT)
    with pytest.raises(ArgumentError, match=r"are torch\.float16, the network is torch\.float32"):
        calibrate(net, [images(2).half()], EIGHT)
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        calibrate(net, [images(2) / 0], EIGHT)
    with pytest.raises(ArgumentError, match="int64"):
        calibrate(net, [images(2).long()], EIGHT)
    with pytest.raises(ArgumentError, match="matches nothing"):
        calibrate(net, [images(2)], EIGHT, weight_bits={"fc": 4})
    with pytest.raises(ArgumentError, match="outside 2 to 16"):
        calibrate(net, [images(2)], EIGHT, weight_bits={"0": 1})
    whole = IntegerNetwork(calibrate(net, [images(2)], EIGHT))
    with pytest.raises(ArgumentError, match=r"encode\(\)"):
        whole.codes(images(2))
    with pytest.raises(ArgumentError, match="-128 to 127"):
        whole.codes(torch.full((1, 3, 16, 16), 128))
    with torch.no_grad():
        net[0].weight.mul_(2.0**-40)
        net[0].bias.fill_(1.0)
    with pytest.raises(ArgumentError, match=r"0: sums may reach .* 2\^53"):
        calibrate(net, [images(2)], EIGHT)
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
    with pytest.raises(ArgumentError, match=r"0\.weight holds 9 values"):
        calibrate(net, [images(2)], EIGHT)


def test_eight_bit_weights_pack_at_eight_bits_a_weight():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 50))
        nn.init.uniform_(net[0].weight)  # uniform: nothing for an entropy coder to gain
    fixed = calibrate(net, [torch.rand(8, 100, generator=torch.Generator())], EIGHT)
    values = fixed.values()
    data = pack_bytes(values)
    count = sum(v.numel() for v in values.values())
    assert len(data) <= count + 1500  # 30,250 bytes, and code books of 256 float32 values
    assert all(torch.equal(t, values[n]) for n, t in unpack(data).items())
    copied = copy.deepcopy(net)
    load_into(data, copied)
    assert torch.equal(copied[0].weight, values["0.weight"])


def test_on_trained_resnet_20_and_test_images():
    from gossamer.datasets import load

    try:
        data = load("cifar10", download=False)
        model = nets.build("resnet-20", pretrained=True)
    except DatasetError as e:
        pytest.skip(str(e))
    folded = fold_batchnorm(model)
    x, _ = data.test.batch(slice(0, 16))
    with torch.no_grad():
        exact = model.eval()(x)
        torch.testing.assert_close(folded(x), exact, rtol=1e-3, atol=1e-3)
    calibration = [data.train.batch(slice(0, 16))]
    for bits in (8, 16):
        net = calibrate(folded, calibration, Precision(bits, bits, bits, True))
        got = net(x)
        assert got.numpy().tobytes() == IntegerNetwork(net)(x).numpy().tobytes()
        assert (got.argmax(1) != exact.argmax(1)).sum() <= (1 if bits == 8 else 0)
    slow = IntegerNetwork(net, oracle=True)
    assert torch.equal(slow(x[:1]), got[:1])
