"""Bounds of layers' times, by hand, from peaks that are given."""

from __future__ import annotations

import numpy as np
import pytest

from gossamer.runtime.plan.explain import table
from gossamer.runtime.plan.facts import Facts
from gossamer.runtime.plan.graph import Graph, Node, Value
from gossamer.runtime.plan.roofline import peaks, predicted

PEAK = {"multiply-adds": 100.0, "1000": 50.0, "100000": 20.0}


def least(op: str, x: Value, y: Value, weight: np.ndarray, kernel: str, batch: int,
          **attributes: object) -> tuple[float, str]:  # fmt: skip
    count = {"linear": 2, "conv": 2, "linear_int8": 0, "lstm": 2}[op]
    node = Node(op, ("x", "@w", *[""] * count), ("y",), attributes)
    graph = Graph(("x",), ("y",), (node,), {"x": x, "y": y}, {"@w": weight})
    found = predicted(graph, node, kernel, batch, PEAK)
    return found["least"], found["bound"]


def test_layers_by_hand() -> None:
    dense = np.ones((8, 10), np.float32)
    dense[:, ::2] = 0
    x, y = Value((-1, 10)), Value((-1, 8))
    # one example: 80 products; 4 * (80 + 10 + 8) = 392 bytes, of an array of 1000: 7.84 of .8
    assert least("linear", x, y, dense, "numpy", 1) == (pytest.approx(392 / 50), "memory")
    # of 100: 8000 products; 4 * (80 + 1800) = 7520 bytes, more than 1000
    assert least("linear", x, y, dense, "numpy", 100) == (pytest.approx(7520 / 20), "memory")
    # half of the weights, 6 bytes each: 240 and 4 * 18
    assert least("linear", x, y, dense, "sparse", 1) == (pytest.approx(312 / 50), "memory")
    # two values: two bits, 20 bytes and 72; and bytes, a quarter of their products
    assert least("linear", x, y, dense, "few-bits", 1)[0] == pytest.approx(92 / 50)
    bytes_ = dense.astype(np.int8)
    kinds = Value((-1, 10), "uint8"), Value((-1, 8))
    assert least("linear_int8", *kinds, bytes_, "numpy", 1)[0] == pytest.approx((80 + 10 + 32) / 50)
    # a map of 20 x 20: 9 * 6 weights 400 times; 4 * (54 + 2 * 400 + 3 * 400) bytes
    conv = np.ones((3, 2, 3, 3), np.float32)
    maps = Value((-1, 2, 20, 20)), Value((-1, 3, 20, 20))
    assert least("conv", *maps, conv, "numpy", 1) == (pytest.approx(8216 / 20), "memory")
    wide = np.ones((30, 20, 3, 3), np.float32)
    maps = Value((-1, 20, 20, 20)), Value((-1, 30, 20, 20))
    found = least("conv", *maps, wide, "numpy", 1)
    assert found == (pytest.approx(5400 * 400 / 100), "arithmetic")
    # five steps read 4 * 16 bytes of a matrix each, of what a cache of 1000 holds
    steps = Value((5, -1, 8)), Value((6, -1, 2))
    matrix = np.ones((8, 2), np.float32)
    assert least("lstm", *steps, matrix, "numpy", 1)[0] == pytest.approx((64 * 5 + 160 + 48) / 50)


def test_peaks_and_tables() -> None:
    found = peaks(1)
    assert found is peaks(1)
    assert all(v > 0 for v in found.values())
    assert len(found) == 4
    x = Value((-1, 4))
    node = Node("unary", ("x",), ("y",), {"activation": ["relu"]})
    turn = Node("reshape", ("y",), ("z",), {"shape": [-1, 4]})
    graph = Graph(("x",), ("z",), (node, turn), {"x": x, "y": x, "z": x}, {})
    assert predicted(graph, turn, "numpy", 1, PEAK) == {}
    row = {"layer": "y", "op": "unary", "shape": "(N, 4)", "density": None, "kernel": "numpy",
           "ms": {"numpy": 0.5}, "refused": {}}  # fmt: skip
    facts = Facts("plan", "a processor", 1, 1, rows=[row])
    assert "0.6400 memory" not in table(graph, facts)  # as files of before have it
    facts.rows = [{**row, **predicted(graph, node, "numpy", 1, PEAK)}]
    assert "0.6400 memory" in table(graph, facts)
