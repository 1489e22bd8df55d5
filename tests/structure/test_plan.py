"""What is done to a network, done again from a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gossamer
from gossamer.compression.records import Smaller, parse
from gossamer.core.errors import ArgumentError
from gossamer.pack import pack
from gossamer.structure.surgery.plan import Plan, apply


class Shifted(nn.Module):
    """A table of positions that is computed, not stored, as wide as the layer."""

    table: Tensor
    line: Tensor

    def __init__(self, *, stored: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("table", torch.arange(24.0).view(3, 8) - 9, persistent=stored)
        self.register_buffer("line", torch.arange(8.0), persistent=stored)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 6) -> (N, 3, 3)."""
        made: Tensor = self.b(F.relu(self.a(x)) * self.table + self.line * 0)
        return made


def _dead(net: Shifted) -> Shifted:
    with torch.no_grad():
        for unit in (1, 5):
            net.a.weight[unit] = 0
            net.a.bias[unit] = 0
    return net.eval()


@pytest.mark.parametrize("stored", [False, True])
def test_buffers_that_no_file_holds_keep_the_right_entries(tmp_path: Path, stored: bool) -> None:
    # they were zeros in the loaded network, which then gave other outputs without a word
    torch.manual_seed(0)
    net = _dead(Shifted(stored=stored))
    x = torch.randn(4, 3, 6)
    made = gossamer.shrink(net, x)
    assert made.model.table.shape == (3, 6)
    assert ("picked" in made.plan.as_dict()) == (not stored)
    pack(made.model, tmp_path / "small.gsm", metadata=made.metadata())
    again = gossamer.load(tmp_path / "small.gsm", Shifted(stored=stored)).eval()
    assert torch.equal(again.table, made.model.table)
    assert torch.equal(again(x), made.model(x))
    torch.testing.assert_close(again(x), net(x))


def test_a_plan_without_such_buffers_is_written_as_before() -> None:
    plan = Plan(shapes={"a.weight": (6, 6)})
    assert set(plan.as_dict()) == {"kind", "replaced", "shapes", "numbers"}
    (record,) = parse([plan.as_dict()])
    assert record.model_dump(mode="json") == json.loads(json.dumps(plan.as_dict()))
    told = Smaller(**dataclasses.replace(plan, picked={"line": ((0, 2),)}).as_dict())
    assert told.model_dump(mode="json")["picked"] == {"line": [[0, 2]]}


@pytest.mark.parametrize(
    "picked", [((), ()), ((0, 8),), ((2, 1, 3, 4, 5, 6),), ((0, 0, 1, 2, 3, 4),), ((0, 1),)]
)
def test_entries_that_a_buffer_has_not_are_refused(picked: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ArgumentError, match="line"):
        apply(Shifted(), Plan(shapes={"line": (6,)}, picked={"line": picked}))
