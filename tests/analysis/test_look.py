"""A network's layers, what can be done with them, and the bytes to expect."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer import cli
from gossamer.analysis.look import entropy_bytes, look
from gossamer.core.errors import ArgumentError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.lstm, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 50)
        self.tied = nn.Linear(8, 50, bias=False)
        self.tied.weight = self.out.weight
        self.odd = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("mask", torch.ones(4))

    def forward(self, ids: Tensor) -> Tensor:
        if ids.sum() > 0:  # not to be traced
            return self.out(self.lstm(self.table(ids))[0])
        return self.tied(self.table(ids))


def test_every_parameter_is_in_the_table_with_what_can_be_done() -> None:
    torch.manual_seed(0)
    net = Net()
    found = gossamer.look(net)
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.bytes == 4 * found.parameters
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {
        "table.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "out.weight", "odd",
        "biases, norms",
    }  # fmt: skip
    assert rows["table.weight"].prune == rows["table.weight"].quantize == "where named"
    assert rows["lstm.weight_ih_l0"].prune == "yes"
    assert rows["lstm.weight_ih_l0"].shrink == "no: nothing here shrinks LSTM"
    assert rows["out.weight"].shrink == "low rank"
    assert rows["out.weight"].tied == ("tied.weight",)
    assert rows["odd"].prune.startswith("no: not known to be multiplied")
    assert rows["biases, norms"].parameters == 32 + 32 + 50
    assert any("tied.weight is out.weight" in note for note in found.notes)
    assert any("buffers" in note and "16 bytes" in note for note in found.notes)


def test_bytes_are_the_entropy_of_the_rounded_weights() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(20, 30)
    for bits in (8, 4, 2):
        top = 2 ** (bits - 1) - 1
        codes = [round(float(v / (row.abs().max() / top))) for row in matrix for v in row]
        shares = [codes.count(c) / len(codes) for c in set(codes)]
        ideal = -sum(s * math.log2(s) for s in shares) * len(codes) / 8
        assert entropy_bytes(matrix, bits) == math.ceil(ideal) + 4 * 20
    net = nn.Sequential(nn.Linear(30, 20))
    with torch.no_grad():
        net[0].weight.copy_(matrix)
    found = look(net, bits=(8, 2))
    assert found.expected(2) == entropy_bytes(matrix, 2) + 4 * 20
    assert found.expected(2) < found.expected(8) < found.bytes
    with pytest.raises(ArgumentError, match="bits=1 is outside 2 to 16"):
        look(net, bits=(1,))


def test_dead_units_need_a_network_that_can_be_traced() -> None:
    found = look(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)))
    assert [row.shrink for row in found.rows[:2]] == ["dead units", "low rank, dead units"]

    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    found = look(Branching(nn.Conv2d(1, 2, 3)))
    assert found.rows[0].shrink == "no: the network cannot be traced"


def test_it_is_short_to_look_at_and_leaves_the_network() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    found = look(net)
    told = str(found)
    assert told.splitlines()[0].split()[:4] == ["weight", "kind", "shape", "parameters"]
    assert "0: weight is taken as it is" in told
    assert any(line.startswith("total") for line in told.splitlines())
    assert "no prune: vectors are few" in told
    assert found._repr_html_().startswith("<table>")
    assert "\n" not in repr(found)
    assert nn.utils.parametrize.is_parametrized(net[0])


def test_the_command_tells_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main(["look", "lenet-300-100", *arguments])
        assert not done.value.code
        return capsys.readouterr().out

    assert told().splitlines()[1].split()[:3] == ["ip1.weight", "Linear", "300x784"]
    figures = json.loads(told("--json"))
    assert figures["parameters"] == 266610
    assert [*figures["expected"]] == ["8", "4", "2"]
    assert figures["macs"] is None
    assert told("--shape", "1,28,28").splitlines()[1].split()[-1] == "235,200"
    figures = json.loads(told("--shape", "1,28,28", "--json"))
    assert figures["macs"]["macs"] == 266200
