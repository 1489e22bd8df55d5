"""What a network holds beside its tensors: stored, or refused by name; never dropped."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.compression import fresh
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.pack import pack_bytes, unpack


class Scaled(nn.Module):
    """Keeps its scale outside parameters and buffers."""

    def __init__(self, scale: float, kind: str) -> None:
        super().__init__()
        self.fc, self.scale, self.kind = nn.Linear(4, 4), scale, kind

    def get_extra_state(self) -> Any:
        return torch.tensor(self.scale) if self.kind == "tensor" else {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = float(state if self.kind == "tensor" else state["scale"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


def test_extra_state_that_is_a_tensor_travels() -> None:
    for wrap in (lambda m: m, lambda m: nn.Sequential(m, nn.ReLU())):
        net, other = wrap(Scaled(3.0, "tensor")), wrap(Scaled(1.0, "tensor"))
        x = torch.randn(2, 4)
        gossamer.load(pack_bytes(net), other)
        assert torch.equal(other(x), net(x))


def test_extra_state_that_is_none_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'0\._extra_state' is state of type dict.*buffer"):
        pack_bytes(nn.Sequential(Scaled(3.0, "dict")))
    plain = Scaled(1.0, "tensor").fc.state_dict()
    with pytest.raises(ArgumentError, match=r"'_extra_state' of the model is dict"):
        gossamer.load(pack_bytes({f"fc.{n}": t for n, t in plain.items()}), Scaled(1.0, "dict"))


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_torch_quantized_is_refused() -> None:
    net = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, torch.qint8
    )
    with pytest.raises(ArgumentError, match=r"holds tensors alone.*pack the float network"):
        pack_bytes(net)


class Twice(nn.Module):
    """One buffer in two places, the first of which is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        value = torch.randn(4)
        self.register_buffer("a", value, persistent=False)
        self.register_buffer("b", value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.b


def test_a_tied_buffer_is_stored_where_it_is_persistent() -> None:
    net, other = Twice(), Twice()
    assert list(unpack(pack_bytes(net))) == ["b"]
    assert fresh.digest(names.clean_state_dict(net)) != fresh.digest(names.clean_state_dict(other))
    assert torch.equal(gossamer.load(pack_bytes(net), other).b, net.b)
    assert other.a is other.b


def test_what_a_hook_takes_out_of_the_state_is_missed() -> None:
    net = nn.Linear(4, 4)
    net._register_state_dict_hook(lambda module, state, prefix, _: state.__delitem__("bias"))
    with pytest.raises(ArgumentError, match="'bias' is a parameter or buffer that"):
        pack_bytes(net)


def test_an_expanded_parameter_is_no_place_to_load_into() -> None:
    net = nn.Linear(4, 4)
    data = pack_bytes(net)
    net.weight = nn.Parameter(torch.randn(1, 4).expand(4, 4))
    with pytest.raises(ArgumentError, match=r"'weight' is expanded in the model.*Nothing"):
        gossamer.load(data, net)


def test_infinity_is_a_masks_and_no_weights() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.register_buffer("causal", torch.full((4, 4), float("-inf")).triu(1))

    net = Masked()
    assert torch.equal(unpack(pack_bytes(net))["causal"], net.causal)
    net.causal[0, 0] = float("nan")
    with pytest.raises(ArgumentError, match="'causal' holds"):
        pack_bytes(net)
    net = Masked()
    net.norm.running_var[1] = float("inf")
    with pytest.raises(ArgumentError, match=r"'norm\.running_var' holds"):
        pack_bytes(net)
    net = Masked()
    with torch.no_grad():
        net.fc.weight[0, 0] = float("inf")
    with pytest.raises(ArgumentError, match=r"'fc\.weight' holds"):
        pack_bytes(net)
    with pytest.raises(ArgumentError, match="'causal' holds"):  # a mapping has no buffers
        pack_bytes({"causal": net.causal})


def test_extra_state_of_none_is_no_state() -> None:
    class Empty(nn.Linear):
        def get_extra_state(self) -> None:
            return None

        def set_extra_state(self, state: Any) -> None:
            pass

    net, other = Empty(2, 2), Empty(2, 2)
    gossamer.load(pack_bytes(net), other)
    assert torch.equal(net.weight, other.weight)


def test_metadata_are_utf_8_alone() -> None:
    from gossamer.core.errors import FormatError
    from gossamer.pack import Archive
    from gossamer.pack.format.container import Header, file_chunks

    text = '{"a": 1}'
    for encoding in ("utf-16", "utf-32-le"):
        data = b"".join(file_chunks(Header([], [], True), [b"\0" + text.encode(encoding)]))
        with pytest.raises(FormatError), Archive(data) as archive:
            _ = archive.metadata
