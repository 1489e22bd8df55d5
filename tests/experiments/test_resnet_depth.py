"""ResNet-20 with fewer residual blocks: the claims can fail, the path runs."""

from pathlib import Path

import pytest
import torch

from gossamer import nets
from gossamer.datasets import Dataset, Split
from gossamer.experiments import Context
from gossamer.experiments.low_rank import network
from gossamer.experiments.structured_sparsity import depth


def row(layers: int, error: float, validation: float) -> dict[str, object]:
    return {"layers": layers, "error": error, "validation": validation, "epochs": 1}


def test_claims_of_depth_hold_and_fall_short() -> None:
    dense = {"layers": 20, "error": 8.3}
    good = {"dense": dense, "trained": [row(18, 8.5, 1.0), row(16, 9.5, 2.0)]}
    assert [c.holds for c in depth._judge(good)] == [True, True]
    bad = {"dense": dense, "trained": [row(19, 8.7, 1.0), row(16, 8.0, 2.0)]}
    assert [c.holds for c in depth._judge(bad)] == [False, False]


def test_a_block_becomes_its_shortcut() -> None:
    net = nets.build("resnet-20", seed=0).eval()
    x = torch.randn(3, 3, 32, 32)
    for name in ("layer1.1", "layer2.0"):  # the second changes size and channels
        with torch.no_grad():
            made = depth.without(net, name)
            block = dict(net.named_modules())[name]
            keep = block.bn2.forward
            block.bn2.forward = torch.zeros_like
            assert torch.allclose(made(x), net(x), atol=1e-4)
            block.bn2.forward = keep
        assert depth._layers(net) - depth._layers(made) == 2
        assert set(depth.blocks(net)) - set(depth.blocks(made)) == {name}


def pictures() -> Dataset:
    g = torch.Generator().manual_seed(0)
    train, validation, test = (
        Split(
            torch.randint(256, (count, 3, 32, 32), generator=g, dtype=torch.uint8),
            torch.randint(10, (count,), generator=g),
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
        )
        for count in (128, 50, 50)
    )
    return Dataset("pictures", train, validation, test, classes=10)


@pytest.mark.slow
def test_the_path_of_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "cifar", lambda quick: pictures())
    monkeypatch.setattr(network, "cifar", lambda quick: pictures())
    monkeypatch.setattr(depth, "_dense", lambda: nets.build("resnet-20", seed=0).eval())
    raw = depth.resnet_depth(Context(tmp_path, (0,), quick=True, say=lambda _: None))
    assert [r["layers"] for r in raw["order"]] == [20, 18]
    assert len(depth._judge(raw)) == 2
