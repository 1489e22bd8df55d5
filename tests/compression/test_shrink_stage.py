"""Shrunk networks through files and recipes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages import job
from torch import nn

import gossamer
from gossamer.compression import records
from gossamer.core.errors import GossamerError
from gossamer.nets.resnet import resnet
from gossamer.nets.transformer import GPT
from gossamer.pack import pack_bytes
from gossamer.structure import shrink


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 6, 2), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.rnn(x)[0])
        return out


def made(kind: str) -> tuple[nn.Module, Any]:
    """A network with dead units, and a batch for it."""
    torch.manual_seed(0)
    if kind == "resnet":
        net: Any = resnet(8)
        net.layer2[0].conv1.weight.data[:20] = 0
        return net.eval(), torch.randn(2, 3, 32, 32)
    if kind == "gpt":
        net = GPT(20, 8, 16, 1, 4, tied=True)
        net.block[0].attention.output.weight.data[:, 4:8] = 0
        return net.eval(), torch.randint(20, (2, 5))
    if kind == "encoder":
        net = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        net.self_attn.out_proj.weight.data[:, 4:8] = 0
        return net.eval(), torch.randn(2, 5, 16)
    if kind == "folded":
        net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2, bias=False))
        net[0].weight.data[1] = 0
        return net.eval(), torch.randn(2, 3)
    net = Levels()
    net.out.weight.data[:, :2] = 0
    net.rnn.weight_hh_l1.data[:, :2] = 0
    return net.eval(), torch.randn(5, 2, 4)


@pytest.mark.parametrize("kind", ["resnet", "gpt", "encoder", "folded", "levels"])
@torch.no_grad()
def test_a_file_makes_the_shrunk_network_of_a_fresh_one(kind: str) -> None:
    net, example = made(kind)
    result = shrink(net, example)
    assert result.parameters[1] < result.parameters[0]
    file = pack_bytes(result.model, metadata=result.metadata())
    fresh, _ = made(kind)
    for p in fresh.parameters():
        p.normal_()
    loaded = gossamer.load(file, fresh).eval()
    assert torch.equal(loaded(example), result.model(example))
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        n: p.shape for n, p in result.model.named_parameters()
    }
    twice = shrink(loaded, example)  # nothing more is dead
    assert twice.removed == {}


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"shapes": {"0.weight": [99, 3]}}, "could be made"),
    ({"shapes": {"0.weight": [4]}}, "could be made"),
    ({"shapes": {"0.weight": [0, 3]}}, "greater than or equal to 1"),
    ({"shapes": {"7.weight": [1, 1]}}, "no tensor '7.weight'"),
    ({"shapes": {"1.bias": [3]}}, "no tensor '1.bias'"),
    ({"shapes": {"2.bias": [1 << 30]}}, "cannot be a bias"),
    ({"numbers": {"0": {"in_features": 99}}}, "could be 99"),
    ({"numbers": {"0": {"training": 1}}}, "could be 1"),
    ({"numbers": {"0": {"__class__": 1}}}, "could be 1"),
    ({"numbers": {"9": {"x": 1}}}, "could be 1"),
    ({"replaced": {"": {"kind": "identity"}}}, "no module ''"),
    ({"replaced": {"0": {"kind": "recurrent", "sizes": [1, 1]}}}, "is Linear"),
    ({"replaced": {"0": {"kind": "heads", "sizes": [1, 1]}}}, "is Linear"),
    ({"replaced": {"0": {"kind": "constant", "sizes": [1 << 30]}}}, "constant"),
    ({"replaced": {"0": {"kind": "pickle"}}}, "damaged"),
    ({"replaced": {"0": {"kind": "lowered", "sizes": [1, 1]}}}, "is Linear"),
]


@pytest.mark.parametrize(("record", "message"), HOSTILE)
def test_hostile_records_leave_the_network_as_it_was(record: dict[str, Any], message: str) -> None:
    net, _ = made("folded")
    before = copy.deepcopy(net.state_dict())
    file = pack_bytes(net, metadata={"structure": [{"kind": "shrunk", **record}]})
    with pytest.raises(GossamerError, match=message):
        gossamer.load(file, net)
    assert [type(m) for m in net] == [nn.Linear, nn.Sigmoid, nn.Linear]
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


def test_the_stage_shrinks_and_later_stages_go_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    with torch.no_grad():
        net[1].weight[:8] = 0
        net[1].bias[:8] = 0.5  # a constant, for the bias behind
        net[5].weight[:, 4:8] = 0
    stages = [
        {"prune": {"density": 0.5}},
        {"shrink": {}},
        {"train": {"epochs": 1, "lr": 0.01, "batch_size": 64}},
    ]
    run = job(stages, net, tmp_path)
    state, rows, _ = run.stages()
    assert state.model[1].out_features <= 16
    assert state.model[3].out_features <= 12
    assert rows[1]["score"] == pytest.approx(rows[0]["score"], abs=1e-6)
    assert rows[1]["shrink"]["parameters"][1] < rows[1]["shrink"]["parameters"][0]
    mask = state.masks["3.weight"]
    assert mask.shape == state.model[3].weight.shape
    assert not bool(state.model[3].weight[~mask].any())  # what was pruned stays pruned
    assert [r.kind for r in state.structure] == ["shrunk"]
    again = records.rebuild(copy.deepcopy(net), state.structure)
    again.load_state_dict(state.model.state_dict())


def test_inspect_says_what_was_done(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from gossamer.cli.program import app
    from gossamer.pack import pack

    net, example = made("levels")
    result = shrink(net, example)
    with pack(result.model, tmp_path / "small.gsm", metadata=result.metadata()):
        pass
    out = CliRunner().invoke(app, ["inspect", str(tmp_path / "small.gsm")])
    assert "changed modules: shrunk: 1 replaced, 1 shapes" in out.output
