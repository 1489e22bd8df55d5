"""Networks that are graphs: what an exported program multiplies with, TorchScript as a module."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.made import Scripted, mark
from gossamer.core.plain import copied, plain


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(9, 4), nn.LSTM(4, 5, batch_first=True)
        self.free, self.out = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 2)
        self.shift = nn.Parameter(torch.randn(3, 5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.lstm(self.table(ids))[0] + self.shift
        return self.out(x @ self.free.t())


def scripted(net: nn.Module) -> Scripted:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return Scripted(torch.jit.script(net))


WEIGHTS = {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "out.weight"}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 4), nn.LayerNorm([3, 4])
        self.up, self.out = nn.Conv1d(3, 3, 1), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.norm(self.table(ids))) @ self.out.weight[:2].t()


def test_modules_of_an_exported_program_say_what_they_multiply_with() -> None:
    net, ids = Plain().eval(), torch.randint(0, 9, (2, 3))
    graph = mark(torch.export.export(net, (ids,)).module())
    assert names.matrices(graph) == {"up.weight", "out.weight"}
    made, told = plain(copied(graph))
    assert names.matrices(made) == names.matrices(graph)
    assert told == []
    assert torch.equal(made(ids), graph(ids))


def test_torchscript_as_a_module_writes_through_and_copies() -> None:
    torch.manual_seed(0)
    net, ids = Net(), torch.randint(0, 9, (2, 3))
    found = scripted(net)
    assert set(found.state_dict()) == set(net.state_dict())
    assert names.matrices(found) == WEIGHTS
    other = copy.deepcopy(found)
    with torch.no_grad():
        found.out.weight.zero_()
        found.out.bias.fill_(3.0)
    assert torch.equal(found(ids), torch.full((2, 3, 2), 3.0))
    torch.testing.assert_close(other(ids), other._script[0](ids))
    assert not torch.equal(other(ids), found(ids))
    found.load_state_dict(other.state_dict())
    assert torch.equal(found(ids), other(ids))
    found(ids).sum().backward()
    assert found.free.grad is not None
    assert not found.eval()._script[0].training


def test_what_the_script_would_not_see_is_refused() -> None:
    found = scripted(Net())
    found.out.weight = nn.Parameter(torch.zeros(2, 5))
    with pytest.raises(ArgumentError, match=r"out\.weight has been replaced"):
        found(torch.zeros(1, 3, dtype=torch.int64))
