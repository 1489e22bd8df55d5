"""Small compiled operators against numpy, and chains of compiled calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.eight_bits import Scale
from gossamer.runtime.plan import small, sparse_int8
from gossamer.runtime.plan.chains import chained
from gossamer.runtime.plan.graph import Graph, Node, Value
from gossamer.runtime.plan.program import Program, steps_of

pytestmark = pytest.mark.skipif(
    kernel("small") is None, reason="the compiled kernels are not built"
)

TYPES = ["float32", "float64", "int64", "int32", "int16", "uint8", "bool"]


def bound(
    op: str, x: np.ndarray, y: np.ndarray, *constants: np.ndarray | None, **a: object
) -> None:
    node = Node(op, ("x", *(f"@{i}" if c is not None else "" for i, c in enumerate(constants))),
                ("y",), a)  # fmt: skip
    small.bind([None, *constants], [node], [x], [y], len(x))()


@given(st.data())
@settings(max_examples=80)
def test_elements_are_moved_exactly(data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x = rng.integers(0, 100, shape).astype(draw(st.sampled_from(TYPES)))
    index = []
    for size in shape:
        begin = draw(st.integers(0, size - 1))
        end = draw(st.integers(begin + 1, size))
        index.append([begin, end, draw(st.integers(1, 3))])
    wanted = x[tuple(slice(*part) for part in index)]
    y = np.zeros(wanted.shape, x.dtype)
    bound("slice", x, y, index=index)
    assert np.array_equal(y, wanted)
    axes = draw(st.permutations(range(len(shape))))
    wanted = x.transpose(axes)
    y = np.zeros(wanted.shape, x.dtype)
    bound("permute", x, y, axes=list(axes))
    assert np.array_equal(y, wanted)
    pads = [[draw(st.integers(0, 2)), draw(st.integers(0, 2))] for _ in shape]
    value = draw(st.sampled_from([0.0, 1.0, 3.0]))
    wanted = np.pad(x, pads, constant_values=x.dtype.type(value))
    y = np.full(wanted.shape, 7, x.dtype)
    bound("pad", x, y, pads=pads, value=value)
    assert np.array_equal(y, wanted)


def test_codes_are_moved_as_words() -> None:
    x = np.random.default_rng(0).integers(0, 128, (2, 3, 6, 6, 4)).astype(np.uint8)
    y = np.zeros((2, 3, 3, 3, 4), np.uint8)
    whole = [None, None, None]
    bound("slice", x, y, index=[whole, whole, [None, None, 2], [None, None, 2], whole])
    assert np.array_equal(y, x[:, :, ::2, ::2])
    wide = np.full((2, 5, 6, 6, 4), 9, np.uint8)
    bound("pad", x, wide, pads=[[0, 0], [1, 1], [0, 0], [0, 0], [0, 0]], value=0.0)
    assert np.array_equal(wide[:, 1:4], x)
    assert not wide[:, [0, 4]].any()


@given(st.data())
@settings(max_examples=40)
def test_means_and_linear_layers(data: st.DataObject) -> None:
    draw = data.draw
    n, m, k = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 50))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x = rng.standard_normal((n, m, k)).astype(np.float32)
    y = np.zeros((n, m, 1), np.float32)
    bound("mean", x, y, axes=[2], keep=True)
    np.testing.assert_allclose(y, x.mean(2, keepdims=True, dtype=np.float64), atol=1e-6)
    weight = rng.standard_normal((m, k)).astype(np.float32)
    bias = rng.standard_normal(m).astype(np.float32) if draw(st.booleans()) else None
    kind = draw(st.sampled_from([None, ["relu"], ["clamp", -1.0, 1.0]]))
    y = np.zeros((n, m, m), np.float32)
    bound("linear", x, y, weight, bias, None, activation=kind)
    wanted = x.astype(np.float64) @ weight.T.astype(np.float64) + (0 if bias is None else bias)
    ends = {None: (-np.inf, np.inf), "relu": (0, np.inf), "clamp": (-1, 1)}[kind and kind[0]]
    np.testing.assert_allclose(y, np.clip(wanted, *ends), atol=2e-5)


@given(st.data())
@settings(max_examples=60)
def test_pools(data: st.DataObject) -> None:
    draw = data.draw
    sizes = [draw(st.integers(4, 40)) for _ in range(2)]
    window = [draw(st.integers(1, 3)) for _ in range(2)]
    stride = [draw(st.integers(1, 4)) for _ in range(2)]
    before = [draw(st.integers(0, k // 2)) for k in window]
    spread = [draw(st.integers(1, 2)) if max(sizes) < 9 else 1 for _ in range(2)]
    x = torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    pads = [[p, p] for p in before]
    if all((k - 1) * d < s for k, d, s in zip(window, spread, sizes, strict=True)):
        wanted = F.max_pool2d(x, window, stride, before, spread)
        y = np.zeros(wanted.shape, np.float32)
        bound("max_pool", x.numpy(), y, kernel=window, stride=stride, padding=pads, dilation=spread)
        assert np.array_equal(y, wanted.numpy())
    wanted = F.avg_pool2d(x, window, stride, before)
    y = np.zeros(wanted.shape, np.float32)
    bound("avg_pool", x.numpy(), y, kernel=window, stride=stride, padding=pads, counted=True)
    np.testing.assert_allclose(y, wanted.numpy(), atol=1e-6)


@pytest.mark.parametrize("function", ["add", "sub", "mul", "div", "maximum", "minimum"])
@given(data=st.data())
@settings(max_examples=25)
def test_arrays_of_other_shapes_are_stretched(function: str, data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    pair = []
    for _ in range(2):
        own = [1 if draw(st.booleans()) else d for d in shape][draw(st.integers(0, len(shape))) :]
        pair.append(rng.standard_normal(own).astype(np.float32) + np.float32(5))
    y = np.full(np.broadcast_shapes(*(g.shape for g in pair), shape), 7, np.float32)
    node = Node("binary", ("x", "z"), ("y",), {"function": function, "activation": ["relu"]})
    small.bind([None, None], [node], pair, [y], 1)()
    names = {"sub": "subtract", "mul": "multiply", "div": "divide"}
    wanted = getattr(np, names.get(function, function))(*pair)
    wanted = np.broadcast_to(np.maximum(wanted, 0), y.shape)
    np.testing.assert_allclose(y, wanted, rtol=1e-6)


def test_hidden_places_count_for_nothing() -> None:
    x = np.array([[1.0, -np.inf, 2.0, -1e30], [-np.inf] * 4], np.float32)
    y = np.zeros_like(x)
    bound("softmax", x, y, axis=1)
    whole = np.exp(1) + np.exp(2)
    np.testing.assert_allclose(y[0], [np.exp(1) / whole, 0, np.exp(2) / whole, 0], rtol=1e-6)
    assert np.isnan(y[1]).all()  # as torch


def test_not_a_number_stays() -> None:
    x = np.array([[1.0, np.nan], [1.0, 2.0]], np.float32)
    y = np.zeros((2, 1), np.float32)
    bound("linear", x, y, np.ones((1, 2), np.float32), None, None, activation=["relu"])
    assert np.isnan(y[0, 0])
    assert y[1, 0] == 3
    for function in ("maximum", "minimum"):
        for pair in ((x, np.ones_like(x)), (np.ones_like(x), x)):
            z = np.zeros_like(x)
            node = Node("binary", ("x", "z"), ("y",), {"function": function, "activation": None})
            small.bind([None, None], [node], list(pair), [z], 2)()
            assert np.isnan(z[0, 1])
            assert np.isfinite(z[[0, 1, 1], [0, 0, 1]]).all()
    maps = np.array([[[[np.nan, 3.0, 1.0]]]], np.float32)
    most = np.zeros((1, 1, 1, 1), np.float32)
    window = {"kernel": [1, 3], "stride": [1, 1], "padding": [[0, 0]] * 2, "dilation": [1, 1]}
    bound("max_pool", maps, most, **window)
    assert np.isnan(most).all()


REFUSED = [
    ("mean", {"axes": [1], "keep": False}, (-1, 3, 4), "other axes than the last"),
    ("softmax", {"axis": 1}, (-1, 3, 4), "other axes than the last"),
    ("permute", {"axes": list(range(9))}, (-1, *[1] * 8), "9 dimensions"),
    ("unary", {"activation": ["exp"]}, (-1, 3), "exp is not compiled"),
    ("max_pool", {"kernel": [2], "stride": [1], "padding": [[0, 0]], "dilation": [1]}, (-1, 3, 4),
     "maps of 1 dimensions"),
    ("avg_pool", {"kernel": [2, 2], "stride": [1, 1], "padding": [[0, 0], [0, 1]],
                  "counted": False}, (-1, 3, 4, 4), "padding that does not count"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "attributes", "shape", "why"), REFUSED)
def test_what_is_not_for_them(op: str, attributes: dict, shape: tuple, why: str) -> None:
    node = Node(op, ("x",), ("y",), attributes)
    graph = Graph(("x",), ("y",), (node,), {"x": Value(shape), "y": Value(shape)}, {})
    assert why in small.refuses(graph, node)
    double = {n: v._replace(dtype="float64") for n, v in graph.values.items()}
    if op not in small.MOVES:
        assert small.refuses(graph._replace(values=double), node) == "of float64"


def test_products_and_tables_that_are_not_for_them() -> None:
    values = {"x": Value((-1, 4, 2, 3)), "z": Value((-1, 1, 3, 5)), "y": Value((-1, 4, 2, 5)),
              "i": Value((-1,), "int32"), "e": Value((-1, 3))}  # fmt: skip
    product = Node("matmul", ("x", "z"), ("y",), {})
    graph = Graph(("x", "z"), ("y",), (product,), values, {})
    assert small.refuses(graph, product) == "one matrix for several products"
    lookup = Node("embedding", ("@w", "i"), ("e",), {})
    table = {"@w": np.ones((4, 3), np.float32)}
    graph = Graph(("i",), ("e",), (lookup,), values, table)
    assert small.refuses(graph, lookup) == "indexes of int32"


def test_an_index_beyond_a_table() -> None:
    table, index = np.arange(6, dtype=np.float32).reshape(3, 2), np.array([2, 0])
    y, module = np.zeros((2, 2), np.float32), kernel("small")
    node = Node("embedding", ("@w", "i"), ("y",), {})
    rows = small.bind([table, None], [node], [index], [y], 2)
    (call,) = chained([rows, module.Copy(np.zeros(1), np.zeros(1))])
    call()
    assert y.tolist() == [[4, 5], [0, 1]]
    for bad in (3, -1):
        index[1] = bad
        with pytest.raises(IndexError, match="beyond the 3 rows of an embedding"):
            call()


def of(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


FITS = [
    ("small", lambda m: m.Copy(np.zeros(3), np.zeros(4)), "differ in shape"),
    ("small", lambda m: m.Copy(np.zeros((1, 3)), np.zeros(3)), "differ in dimensions"),
    ("small", lambda m: m.Copy(np.zeros(3), np.zeros(3, np.float32)), "or in their elements"),
    ("small", lambda m: m.Copy(np.zeros(3, "c16"), np.zeros(3, "c16")), "1, 2, 4 or 8 bytes"),
    ("small", lambda m: m.Fill(np.zeros(4)[::2], bytes(8)), "in one piece"),
    ("small", lambda m: m.Fill(np.zeros(4), bytes(4)), "another size"),
    ("floats", lambda m: m.Mean(of(2, 0), of(2)), "differ in"),
    ("floats", lambda m: m.Linear(of(2, 3), of(4, 5), of(0), of(2, 4)), "differ in"),
    ("floats", lambda m: m.Linear(of(2, 3), of(4, 3), of(3), of(2, 4)), "differ in"),
    ("floats", lambda m: m.LayerNorm(of(2, 3), of(2), of(0), 1e-5, of(2, 3)), "differ in"),
    ("floats", lambda m: m.Softmax(of(2, 3), of(3, 2)), "differ in"),
    ("floats", lambda m: m.Products(of(1, 2, 3), of(1, 2, 3), of(1, 2, 3)), "differ in"),
    ("floats", lambda m: m.Unary("exp", 0, 0, of(2), of(2)), "no function is called exp"),
    ("floats", lambda m: m.Unary("relu", 0, 0, of(2), of(3)), "differ in"),
    ("floats", lambda m: m.Binary("add", of(2, 1), of(2, 3), of(2, 3)), "differ in"),
    ("floats", lambda m: m.Binary("pow", of(2), of(2), of(2)), "is called pow"),
    ("floats", lambda m: m.Embedding(of(4, 3), np.zeros(2, np.int64), of(2, 4)), "differ in"),
    ("floats", lambda m: m.Pool(True, [1] * 7, 1, of(1, 2, 2), of(1, 2, 2)), "wrong length"),
    ("floats", lambda m: m.Pool(True, [0] * 8, 1, of(1, 2, 2), of(1, 2, 2)), "out of range"),
    ("floats", lambda m: m.Pool(True, [1] * 8, 1, of(1, 2, 2), of(2, 2, 2)), "differ in"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "match"), FITS)
def test_arrays_that_do_not_fit(name: str, make: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(kernel(name))  # type: ignore[operator]


def test_a_chain_takes_what_can_be_called_by_step_alone() -> None:
    module = kernel("small")
    with pytest.raises(AttributeError, match="step"):
        module.Chain([lambda: None])
    other = type("Other", (), {"step": kernel("small")})()
    with pytest.raises(RuntimeError):
        module.Chain([other])


def test_compiled_calls_that_follow_each_other_are_one() -> None:
    module = kernel("small")
    a, b, c, d = (np.zeros(3) for _ in range(4))
    seen: list[float] = []
    calls = [
        module.Fill(a, np.float64(2).tobytes()), module.Copy(a, b), lambda: seen.append(b[0]),
        module.Copy(b, c), module.Copy(c, d),
    ]  # fmt: skip
    made = chained(calls)
    assert len(made) == 3
    assert made[1] is calls[2]
    for call in made:
        call()
    assert seen == [2.0]
    assert d.tolist() == [2.0] * 3
    assert chained(calls[:1]) == calls[:1]


def test_a_call_in_a_chain_that_refuses_its_input_says_why() -> None:
    packed = sparse_int8._Packed(None, np.float32(1), np.float32(0), 1)
    x, y = np.ones((1, 4, 2, 2), np.float32), np.zeros((1, 1, 2, 2, 4), np.uint8)
    after = np.zeros_like(y)
    (call,) = chained([sparse_int8._quantize(packed, x, y), kernel("small").Copy(y, after)])
    call()
    assert after.tolist() == np.ones_like(y).tolist()
    x[0, 1, 1, 0] = np.nan
    with pytest.raises(ArgumentError, match="NaN or infinite, which no code of an int8 plan"):
        call()


def test_a_refusal_stands_where_memory_was_used_again() -> None:
    packed = sparse_int8._Packed(None, np.float32(1), np.float32(0), 1)
    given, x = np.full((1, 4, 2, 2), np.nan, np.float32), np.zeros((1, 4, 2, 2), np.float32)
    copy, y = kernel("small").Copy, np.zeros((1, 1, 2, 2, 4), np.uint8)
    calls = [copy(given, x), copy(np.zeros_like(x), given), sparse_int8._quantize(packed, x, y)]
    with pytest.raises(ArgumentError, match="NaN or infinite, which no code of an int8 plan"):
        chained(calls)[0]()


def test_a_program_of_compiled_calls_is_one_call() -> None:
    scale = Scale(0.1, 5)
    a = {"scale": scale.scale, "zero": scale.zero}
    codes = Value((-1, 1, 4, 4, 4), "uint8")
    whole = [None, None, None]
    even = {"index": [whole, whole, [None, None, 2], [None, None, 2], whole]}
    nodes = (
        Node("quantize", ("x",), ("q",), a), Node("slice", ("q",), ("s",), even),
        Node("dequantize", ("s",), ("y",), {**a, "channels": 4}),
    )  # fmt: skip
    values = {"x": Value((-1, 4, 4, 4)), "q": codes, "s": codes._replace(shape=(-1, 1, 2, 2, 4)),
              "y": Value((-1, 4, 2, 2))}  # fmt: skip
    graph = Graph(("x",), ("y",), nodes, values, {}).check()
    chosen = {"q": "sparse-int8", "s": "small", "y": "sparse-int8"}
    program = Program(graph, steps_of(graph, chosen, 1))
    block = program.block(2)
    assert len(block.calls) == 1
    assert not block.warns
    x = np.linspace(-0.5, 3, 2 * 64, dtype=np.float32).reshape(2, 4, 4, 4)
    (found,) = program([x], 2)
    plain = Program(graph, steps_of(graph, dict.fromkeys(chosen, "numpy"), 1))
    assert plain.block(2).warns
    assert np.array_equal(found, plain([x], 2)[0])


def test_a_chain_may_be_part_of_another() -> None:
    module = kernel("small")
    a, b, c = np.zeros(2), np.zeros(2), np.zeros(2)
    (inner,) = chained([module.Fill(a, np.float64(3).tobytes()), module.Copy(a, b)])
    (outer,) = chained([inner, module.Copy(b, c)])
    outer()
    assert c.tolist() == [3.0, 3.0]


def test_bytes_are_rounded_as_numpy_rounds() -> None:
    x = np.arange(0, 127.6, 0.25, np.float32)
    y = np.zeros(len(x), np.uint8)
    kernel("small").Round(x, y)()
    assert np.array_equal(y, np.rint(x).astype(np.uint8))
    with pytest.raises(ValueError, match="differ in number"):
        kernel("small").Round(x, y[1:])


@given(st.integers(0, 200), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
@settings(max_examples=60)
def test_every_value_that_is_not_finite_is_seen(size: int, bad: float, data: st.DataObject) -> None:
    x = np.random.default_rng(size).uniform(-3e38, 3e38, size).astype(np.float32)
    module = kernel("small")
    assert module.finite(x)
    if size:
        x[data.draw(st.integers(0, size - 1))] = bad
        assert not module.finite(x)
