"""Commands on files: nothing is lost or overwritten without a word."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer import cli
from gossamer.compression.records import LowRank, load, metadata
from gossamer.pack import Archive, pack


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as done:
        cli.main([str(a) for a in arguments])
    return int(done.value.code or 0)


def factored(path: Path) -> Path:
    net = nn.Sequential(nn.Linear(8, 6))
    net[0] = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 6))
    pack(net, path, metadata=metadata([LowRank(ranks={"0": 2})]))
    return path


def test_packing_a_packed_file_again_keeps_what_it_tells_of_the_network(tmp_path: Path) -> None:
    first, again = factored(tmp_path / "a.gsm"), tmp_path / "b.gsm"
    assert run("pack", first, again, "--profile", "huffman") == 0
    with Archive(first) as a, Archive(again) as b:
        assert a.metadata == b.metadata != {}
    made = load(again, nn.Sequential(nn.Linear(8, 6))).get_submodule("0")
    assert isinstance(made, nn.Sequential)
    assert len(made) == 2


def test_unpacking_a_changed_network_says_what_the_tensors_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("unpack", factored(tmp_path / "a.gsm"), tmp_path / "a.safetensors") == 0
    assert "whose modules were changed (low-rank: 1 ranks)" in capsys.readouterr().err
    pack(nn.Linear(2, 2), tmp_path / "b.gsm")
    assert run("unpack", tmp_path / "b.gsm", tmp_path / "b.safetensors") == 0
    assert capsys.readouterr().err == ""


def test_a_packed_file_ends_in_gsm_so_that_no_source_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "w.pt"
    torch.save(nn.Linear(2, 2).state_dict(), source)
    before = source.read_bytes()
    assert run("pack", source, source) == 1
    assert "end its name in .gsm" in capsys.readouterr().err
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [
        ["sensitivity", "-m", "mlp-64-9-10", "-d", "digits", "--plot"],
        ["bench", "mlp-64-9-10", "--shape", "1,8,8", "--plot"],
    ],
)
def test_the_ending_of_a_picture_is_looked_at_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert run(*command, tmp_path / "x.xyz") == 1
    assert "end its name in one of .png, .svg" in capsys.readouterr().err


def test_a_packed_file_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", tmp_path / "no.gsm", "--to", tmp_path / "x.onnx") == 1
    assert f"there is no file {tmp_path / 'no.gsm'}" in capsys.readouterr().err
