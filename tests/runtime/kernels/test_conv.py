"""Sparse convolutions against torch, on every instruction set that this machine can try."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels import conv
from gossamer.runtime.kernels.arrays import LINEAR, RELU, RELU6, dot_products
from gossamer.runtime.kernels.conv import SparseConv, convolve, linear, pack_conv
from gossamer.runtime.kernels.conv_int8 import convolve_int8, pack_conv_int8, weight_codes
from gossamer.runtime.kernels.eight_bits import Scale, from_quads, quantize, to_quads

BUILT = kernel("sparse_conv") is not None
PATHS = ["numpy", *(["scalar", "wide", "avx2"] if BUILT else [])] + ["avx512"] * dot_products()
each_path = pytest.mark.parametrize("path", PATHS, indirect=True)


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setenv("GOSSAMER_NATIVE", "0")
    else:
        monkeypatch.setenv("GOSSAMER_ISA", request.param)
    return request.param


class Case:
    """A random layer and its input."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.groups = int(rng.choice([1, 1, 2, 3]))
        channels, self.rows = int(rng.integers(1, 9)), self.groups * int(rng.integers(1, 40))
        kernel_size = rng.integers(1, 5, 2)
        self.stride, self.padding, self.dilation = (
            tuple(int(v) for v in rng.integers(low, high, 2))
            for low, high in ((1, 4), (0, 4), (1, 3))
        )
        side = rng.integers(8, 36, 2) if seed % 5 else rng.integers(60, 130, 2)
        if seed % 4 == 2:  # narrow maps: rows share a vector
            spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, kernel_size, strict=True)]
            side = np.maximum(rng.integers(1, 14, 2), spans)
        self.image = tuple(int(v) for v in side)
        self.block = [None, 1, 2, 3][seed % 4]
        self.weight = rng.standard_normal((self.rows, channels, *kernel_size)).astype(np.float32)
        self.weight[rng.random(self.weight.shape) < rng.random()] = 0
        batch = int(rng.integers(1, 3))
        self.x = rng.standard_normal((batch, channels * self.groups, *side)).astype(np.float32)
        self.bias = rng.standard_normal(self.rows).astype(np.float32)
        self.rng = rng

    @property
    def settings(self) -> dict[str, object]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }


def cases(count: int) -> Iterator[Case]:
    yield from (Case(seed) for seed in range(count))


@each_path
def test_float_convolutions_are_torchs(path: str) -> None:
    for case in cases(16):
        packed = pack_conv(case.weight, block=case.block, image=case.image, **case.settings)
        assert np.array_equal(packed.dense, case.weight)
        want = torch.conv2d(
            *(torch.from_numpy(a) for a in (case.x, case.weight, case.bias)), **case.settings
        )
        residual = case.rng.standard_normal(want.shape).astype(np.float32)
        want = torch.relu(want + torch.from_numpy(residual)).numpy()
        got = convolve(packed, case.x, bias=case.bias, residual=residual, clamp=RELU)
        np.testing.assert_allclose(got, want, atol=2e-4, rtol=0)
        again = convolve(packed, case.x, bias=case.bias, residual=residual, clamp=RELU, threads=3)
        assert np.array_equal(got, again)


@each_path
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 8, 9])
def test_rows_that_share_a_vector_are_summed_apart(path: str, side: int) -> None:
    """Maps of 1 to 9 columns: 16, 8, 4, 2 and 1 rows a vector, where there are 16 lanes."""
    rng = np.random.default_rng(side)
    for stride, dilation, height in ((1, 1, 13), (2, 1, 26), (1, 2, 11), (3, 2, 20)):
        padding = (dilation, dilation)
        width = (side - 1) * stride + 1
        weight = rng.integers(-9, 10, (6, 5, 3, 3)).astype(np.float32)
        weight[rng.random(weight.shape) < 0.5] = 0
        x = rng.integers(-9, 10, (2, 5, height, width)).astype(np.float32)
        settings = {"stride": stride, "padding": padding, "dilation": dilation}
        want = torch.conv2d(torch.from_numpy(x), torch.from_numpy(weight), **settings).numpy()
        assert want.shape[-1] == side
        got = convolve(pack_conv(weight, image=x.shape[2:], **settings), x)
        assert np.array_equal(got, want)


@each_path
def test_rows_of_the_same_taps(path: str) -> None:
    """Dense weights, whose rows share loads, four at a time; also with some zeros among them."""
    rng = np.random.default_rng(0)
    for rows, kept in ((4, 1.0), (7, 0.9), (1, 1.0), (130, 0.85)):
        weight = rng.integers(1, 9, (rows, 6, 3, 2)).astype(np.float32)
        weight[rng.random(weight.shape) > kept] = 0
        x = rng.integers(-9, 10, (2, 6, 12, 21)).astype(np.float32)
        want = torch.conv2d(torch.from_numpy(x), torch.from_numpy(weight), stride=(2, 1)).numpy()
        packed = pack_conv(weight, stride=(2, 1), block=[None, 4][rows % 2])
        assert len(packed.taps) == weight.size
        assert np.array_equal(packed.dense, weight)
        assert np.array_equal(convolve(packed, x), want)


@each_path
def test_taps_that_come_twice_are_added_twice(path: str) -> None:
    """As many taps as a full row has, but not its taps."""
    if path == "numpy":
        pytest.skip("numpy multiplies by the dense weight, where the last of the two stands")
    packed = pack_conv(np.arange(1, 9, dtype=np.float32).reshape(2, 1, 2, 2))
    twice = SparseConv(**packed.parts | {"taps": np.array([0, 1, 2, 2, 0, 1, 2, 3], np.uint16)})
    x = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    got = convolve(twice, x)
    assert got[0, 0, 0, 0] == 0 * 1 + 1 * 2 + 3 * 3 + 3 * 4
    assert np.array_equal(got[0, 1], convolve(packed, x)[0, 1])


def expected(case: Case, codes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The convolution of values, in doubles."""
    return torch.conv2d(torch.from_numpy(codes), torch.from_numpy(weight), **case.settings).numpy()


@each_path
@pytest.mark.parametrize("element", ["quads", "pairs", "auto"])
def test_integer_convolutions_are_exact(path: str, element: str) -> None:
    for case in cases(8):
        source = Scale(0.03, int(case.rng.integers(0, 128)))
        codes = quantize(case.x, source)
        packed = pack_conv_int8(
            case.weight, source=source, bias=case.bias, element=element, block=case.block,
            image=case.image, **case.settings,
        )  # fmt: skip
        got = convolve_int8(packed, to_quads(codes), threads=1 + case.rows % 2)
        top = np.abs(case.weight.reshape(case.rows, -1)).max(1).astype(float)
        weight, scale = weight_codes(case.weight)
        step = scale.reshape(-1, 1, 1, 1)
        off = np.abs(case.weight - weight * step).reshape(case.rows, -1).max(1)
        assert (off <= top / 253).all()  # half a step of 127, or less where a row lies on a grid
        value = expected(case, codes.astype(float) - source.zero, weight.astype(float)) * 0.03
        value = value * step[:, 0][None] + case.bias[:, None, None].astype(float)
        np.testing.assert_allclose(got, value, atol=1e-4, rtol=1e-4)


@each_path
def test_requantized_outputs_are_the_twins_bits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in cases(8):
        source, target, other = Scale(0.03, 64), Scale(0.11, 17), Scale(0.2, 5)
        x = to_quads(quantize(case.x, source))
        packed = pack_conv_int8(
            case.weight, source=source, target=target, bias=case.bias,
            element=["quads", "pairs"][case.rows % 2], **case.settings,
        )  # fmt: skip
        shape = convolve_int8(packed, x).shape
        residual = case.rng.integers(0, 128, shape).astype(np.uint8)
        for clamp in (LINEAR, RELU, RELU6):
            got = convolve_int8(packed, x, residual=residual, residual_scale=other, clamp=clamp)
            with monkeypatch.context() as plain:
                plain.setenv("GOSSAMER_NATIVE", "0")
                want = convolve_int8(
                    packed, x, residual=residual, residual_scale=other, clamp=clamp
                )
            assert np.array_equal(from_quads(got, case.rows), from_quads(want, case.rows))


@each_path
def test_the_largest_codes_do_not_saturate(path: str) -> None:
    weight = np.full((4, 8, 3, 3), -1, np.float32)
    source = Scale(1.0, 0)
    x = to_quads(np.full((1, 8, 5, 5), 127, np.uint8))
    for element in ("quads", "pairs"):
        packed = pack_conv_int8(weight, source=source, element=element)
        assert (np.abs(convolve_int8(packed, x) + 127 * 72) < 1e-2).all()


@each_path
def test_a_linear_layer_on_a_batch(path: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((37, 50)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.8] = 0
    packed = pack_conv(weight[:, :, None, None])
    for batch in (0, 1, 5, 33):
        x = rng.standard_normal((batch, 50)).astype(np.float32)
        np.testing.assert_allclose(linear(packed, x), x @ weight.T, atol=1e-4)


@each_path
def test_nan_stays_and_an_empty_batch_is_empty(path: str) -> None:
    packed = pack_conv(np.ones((2, 1, 1, 1), np.float32))
    x = np.array([[[[np.nan, 1.0, -1.0]]]], np.float32)
    y = convolve(packed, x, clamp=RELU)
    assert np.isnan(y[0, :, 0, 0]).all()
    assert np.array_equal(y[0, 0, 0, 1:], np.array([1, 0], np.float32))
    assert convolve(packed, x[:0]).shape == (0, 2, 1, 3)


def test_what_is_refused_is_named() -> None:
    good = np.ones((2, 3, 3, 3), np.float32)
    bad = good.copy()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(ArgumentError, match="weight has entries that are NaN"):
        pack_conv(bad)
    with pytest.raises(ArgumentError, match="weight must be a numpy array of float32"):
        pack_conv(good.astype(np.float64))
    with pytest.raises(ArgumentError, match="groups=3 must divide 2"):
        pack_conv(good, groups=3)
    with pytest.raises(ArgumentError, match="stride=0"):
        pack_conv(good, stride=0)
    packed = pack_conv(good)
    x = np.zeros((1, 3, 5, 5), np.float32)
    for value, match in (
        (x.astype(np.float64), "x must be a numpy array of float32"),
        (x[0], "x has shape"),
        (x[:, :2], "x has shape"),
        (x[:, :, :2], "smaller than the kernel"),
    ):
        with pytest.raises(ArgumentError, match=match):
            convolve(packed, value)
    with pytest.raises(ArgumentError, match="bias has shape"):
        convolve(packed, x, bias=np.zeros(3, np.float32))
    with pytest.raises(ArgumentError, match="clamp="):
        convolve(packed, x, clamp=(1, 0))
    int8 = pack_conv_int8(good, source=Scale(1.0, 0))
    with pytest.raises(ArgumentError, match="codes up to 200"):
        convolve_int8(int8, np.full((1, 1, 5, 5, 4), 200, np.uint8))
    with pytest.raises(ArgumentError, match="x has NaN"):
        quantize(np.array([np.nan], np.float32), Scale(1.0, 0))


@pytest.mark.skipif(not BUILT, reason="the compiled kernel is not built")
def test_arrays_that_lead_outside_are_refused() -> None:
    packed = pack_conv(np.ones((4, 2, 3, 3), np.float32))
    x = np.zeros((1, 2, 5, 5), np.float32)
    for name, change, match in (
        ("taps", lambda a: a + 18, "outside its block"),
        ("starts", lambda a: a[::-1], "do not ascend"),
        ("order", lambda a: a + 1000, "leaves its chunk"),
    ):
        held = {n: getattr(packed, n) for n in ("starts", "order", "taps", "values")}
        held[name] = np.ascontiguousarray(change(held[name]), held[name].dtype)
        with pytest.raises(ValueError, match=match):
            kernel("sparse_conv").Convolution(
                conv.sizes(packed, 1, 2, 5, 5, (3, 3)), *held.values(),
                x.view(np.uint32).reshape(-1), 0, None, None, None, 1.0, 0.0, 1.0, False,
                np.zeros(36, np.uint32), 1,
            )  # fmt: skip


@each_path
@pytest.mark.parametrize("width", [9, 12, 17, 18, 20, 24, 33, 40, 56, 60])
def test_columns_that_do_not_fill_a_vector(path: str, width: int) -> None:
    """Those of several rows share one: every width around a vector's, 3 and 8 rows, two images."""
    rng = np.random.default_rng(width)
    weight = rng.standard_normal((6, 8, 3, 3)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.6] = 0
    for height, stride, threads in ((3, 1, 1), (8, 1, 3), (9, 2, 1)):
        size = (width - 1) * stride + 1  # of the input, for so many columns of the result
        x = rng.standard_normal((2, 8, height, size)).astype(np.float32)
        got = convolve(pack_conv(weight, stride=stride, padding=1), x, threads=threads)
        wanted = torch.nn.functional.conv2d(*map(torch.from_numpy, (x, weight)), None, stride, 1)
        assert got.shape[-1] == width
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)
        source, target = Scale(0.05, 60), Scale(0.2, 64)
        packed = pack_conv_int8(weight, source=source, target=target, stride=stride, padding=1)
        given = to_quads(quantize(x, source))
        codes = convolve_int8(packed, given, threads=threads)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GOSSAMER_NATIVE", "0")
            assert np.array_equal(codes, convolve_int8(packed, given))
