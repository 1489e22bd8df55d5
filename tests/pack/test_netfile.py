"""The published `.net` layout, against bytes written down by hand."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack.netfile import NetLayer, net_tensors, read_net, write_net

SHAPES = {"conv1": (2, 1, 2, 3), "fc1": (2, 20)}


def tensors() -> dict[str, torch.Tensor]:
    conv = torch.zeros(2, 1, 2, 3)
    conv.view(-1)[[0, 5, 11]] = torch.tensor([0.5, -1.0, 0.5])
    fc = torch.zeros(2, 20)
    fc.view(-1)[[3, 22, 38]] = torch.tensor([2.0, 2.0, -4.0])
    return {"conv1": conv, "fc1": fc}


def by_hand() -> bytes:
    """Conv: gaps 0, 4, 5; fc: gaps 3, 18 = filler(15) + 2, 15."""
    data = struct.pack("<2I", 3, 4)
    data += struct.pack("<256f", 0.0, -1.0, 0.5, *[0.0] * 253)
    data += struct.pack("<2f", 0.25, -0.25)
    data += bytes([2, 1, 2])
    data += bytes([0x40, 0x05])
    data += struct.pack("<16f", 0.0, -4.0, 2.0, *[0.0] * 13)
    data += struct.pack("<2f", 1.0, 3.0)
    data += bytes([0x02, 0x12])  # codes 2, 0 (filler), 2, 1
    data += bytes([0xF3, 0xF2])  # gaps 3, 15 (filler), 2, 15
    return data


def layers() -> list[NetLayer]:
    biases = {"conv1": torch.tensor([0.25, -0.25]), "fc1": torch.tensor([1.0, 3.0])}
    return [NetLayer.of(n, w, biases[n]) for n, w in tensors().items()]


def test_written_bytes_are_the_published_ones(tmp_path) -> None:
    path = tmp_path / "x.net"
    assert write_net(path, layers()) == len(by_hand())
    assert path.read_bytes() == by_hand()


def test_read_and_written_again_byte_for_byte(tmp_path) -> None:
    path = tmp_path / "x.net"
    read = read_net(by_hand(), SHAPES)
    state = net_tensors(read)
    assert list(state) == ["conv1.weight", "conv1.bias", "fc1.weight", "fc1.bias"]
    for name, weight in tensors().items():
        assert torch.equal(state[f"{name}.weight"], weight)
    assert state["fc1.bias"].tolist() == [1.0, 3.0]
    write_net(path, read)
    assert path.read_bytes() == by_hand()
    assert read_net(path, SHAPES)[1].bits == 4


def test_every_length_is_checked() -> None:
    data = by_hand()
    for cut in range(len(data)):
        with pytest.raises(FormatError):
            read_net(data[:cut], SHAPES)
    with pytest.raises(FormatError, match="1 bytes too many"):
        read_net(data + b"\0", SHAPES)


def test_gaps_beyond_the_layer_are_refused() -> None:
    data = bytearray(by_hand())
    data[-2:] = b"\xff\xff"
    with pytest.raises(FormatError, match="'fc1': gaps lead to entry 63 of 40"):
        read_net(bytes(data), SHAPES)
    with pytest.raises(FormatError, match="'conv1' stores 99 entries of 12"):
        read_net(struct.pack("<I", 99) + data[4:], SHAPES)
    with pytest.raises(FormatError, match="code book entry 0 is 1"):
        read_net(bytes(data[:8]) + struct.pack("<f", 1) + bytes(data[12:]), SHAPES)


def test_arguments() -> None:
    with pytest.raises(ArgumentError, match=r"16 distinct non-zero weights.*room for 15"):
        NetLayer.of("fc", torch.arange(17.0).view(1, 17))
    with pytest.raises(ArgumentError, match=r"bias is .* must be float32 of shape"):
        NetLayer.of("fc", torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ArgumentError, match=r"weight is torch.float64"):
        NetLayer.of("fc", torch.ones(2, 3).double())
    with pytest.raises(ArgumentError, match="NaN"):
        NetLayer.of("fc", torch.full((2, 3), torch.nan))
    with pytest.raises(ArgumentError, match=r"shapes\['a'\] is \(3,\)"):
        read_net(b"", {"a": (3,)})
    with pytest.raises(ArgumentError, match="max_bytes is 16"):
        read_net(b"", SHAPES, max_bytes=16)


def test_random_layers_round_trip(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.3, 1.0):
        book = np.arange(1, 16, dtype=np.float32)
        weight = book[rng.integers(0, 15, (30, 41))] * (rng.random((30, 41)) < density)
        layer = NetLayer.of("fc", torch.from_numpy(weight))
        write_net(tmp_path / "x.net", [layer])
        state = net_tensors(read_net(tmp_path / "x.net", {"fc": (30, 41)}))
        assert torch.equal(state["fc.weight"], torch.from_numpy(weight))
        assert torch.equal(state["fc.bias"], torch.zeros(30))
