"""Triton's kernels against plain torch: on CUDA where there is one, else by its interpreter."""

import importlib
import math
import os
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gossamer.distribute import DoReFa, GradCodec, Key, SignSGD, SQm, TernGrad
from gossamer.distribute.codecs import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
pytest.importorskip("triton", reason="triton is not installed")
# numpy, which interprets, warns of the wrap-around that a hash is made of
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return importlib.import_module("gossamer.distribute.codecs.triton_kernels")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits but for those inside a NaN."""
    a, b = a.cpu().reshape(-1), b.cpu().reshape(-1)
    number = ~a.isnan()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[number], b[number])


@pytest.mark.parametrize("n", [1, 65, 4500])
def test_statistics(kernels: ModuleType, n: int) -> None:
    g = torch.randn(n, generator=torch.Generator().manual_seed(n))
    for x in (g, g * 1e38, torch.full((n,), math.nan)):
        for absolute in (False, True):
            found = kernels.statistics(x.to(DEVICE), absolute)
            oracle = eager.statistics(x, absolute)
            assert all(same(a, b) for a, b in zip(oracle, found, strict=True))


@pytest.mark.parametrize(
    "codec", [TernGrad(), SQm(4), SQm(8), SignSGD("mean"), DoReFa(1), DoReFa(3)], ids=repr
)
@pytest.mark.parametrize("shift", [0, 50_000])
def test_codes(kernels: ModuleType, codec: GradCodec, shift: int) -> None:
    n, layout, key = 1100, codec.layout, Key(1, 2, 3, 4)
    g = torch.randn(n, generator=torch.Generator().manual_seed(n))
    for scale in (codec.scale(g), torch.tensor(0.7), torch.tensor(0.0), torch.tensor(math.nan)):
        for form in codec.forms:
            room = torch.zeros(codec.payload_bytes(n, form), dtype=torch.uint8)
            size = eager.encode(g, scale, layout, key, shift, form, room)
            other = torch.zeros_like(room).to(DEVICE)
            moved = g.to(DEVICE), scale.to(DEVICE)
            assert kernels.encode(*moved, layout, key, shift, form, other) == size
            assert torch.equal(room, other.cpu())
            payloads, scales = [room[:size]] * 3, torch.stack([torch.tensor(1.5), scale, scale / 3])
            mean, found = torch.empty(n), torch.empty(n, device=DEVICE)
            eager.decode_mean(payloads, [form] * 3, scales, layout, mean, 3)
            payloads = [p.to(DEVICE) for p in payloads]
            kernels.decode_mean(payloads, [form] * 3, scales.to(DEVICE), layout, found, 3)
            assert same(mean, found)
