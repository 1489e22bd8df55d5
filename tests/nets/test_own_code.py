"""A user's own module that ends the program, raises or gives no values is told of."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer import cli, nets
from gossamer.analysis.look import look
from gossamer.core.errors import ArgumentError

OWN = """
import sys
import torch
from torch import nn

def ends():
    sys.exit(0)

def empty():
    with torch.device("meta"):
        return nn.Linear(2, 2)
"""


@pytest.mark.parametrize(
    ("name", "text", "function", "words"),
    [
        ("own_ends", OWN, "ends", r"fails at .*own_ends\.py, line 7: SystemExit"),
        ("own_empty", OWN, "empty", "'weight' is on the meta device"),
        ("own_divides", "x = 1 / 0\n", "f", r"fails at .*own_divides\.py, line 1: ZeroDivision"),
        ("own_quits", "raise SystemExit\n", "f", r"fails at .*own_quits\.py, line 1: SystemExit"),
    ],
)
def test_what_a_users_module_does(
    tmp_path: Path, name: str, text: str, function: str, words: str
) -> None:
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(ArgumentError, match=words):
        nets.build(f"{tmp_path / name}.py:{function}")


def test_a_command_does_not_end_well_where_the_users_code_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_exit.py").write_text(OWN)
    with pytest.raises(SystemExit) as done:
        cli.main(["look", f"{tmp_path / 'own_exit'}.py:ends"])
    assert done.value.code == 1
    assert "SystemExit" in capsys.readouterr().err


def test_a_network_without_values_is_not_looked_at() -> None:
    with pytest.raises(ArgumentError, match=r"'0\.weight' has no shape yet"):
        look(nn.Sequential(nn.LazyLinear(3)))
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight[0, 0] = float("nan")
    with pytest.raises(ArgumentError, match="'weight' holds NaN"):
        look(net)


def test_trained_weights_are_written_under_a_name_that_is_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (tmp_path / "w.pt", Path()):
        with pytest.raises(SystemExit):
            cli.main(["train", "-m", "mlp-64-9-10", "-d", "digits", "--out", str(out)])
        assert "end its name in .safetensors" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
