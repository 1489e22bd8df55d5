"""Batch-norm statistics measured anew, kept where held-back inputs say so."""

import copy

import torch
from torch import Tensor, nn

from gossamer.training.renorm import distance, reestimate


def net() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    made(1 + torch.randn(400, 6))
    for _ in range(60):
        made(1 + torch.randn(400, 6))
    return made.eval()


def test_statistics_follow_what_changed_and_nothing_else() -> None:
    original = net()
    changed = copy.deepcopy(original)
    with torch.no_grad():
        changed[0].weight.mul_(1.5)
    batches, held = [1 + torch.randn(200, 6) for _ in range(3)], [1 + torch.randn(200, 6)]
    counted = changed[1].num_batches_tracked.clone()
    before = distance(changed, original, held)
    assert reestimate(changed, original, batches, held) is True
    assert distance(changed, original, held) < before / 10
    seen = torch.cat([changed[0](b) for b in batches]).detach()
    torch.testing.assert_close(changed[1].running_mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    assert changed[1].num_batches_tracked == counted
    assert changed[1].momentum == 0.1
    assert not any(m.training for m in changed.modules())


def test_what_does_not_help_is_undone() -> None:
    original = net()
    same = copy.deepcopy(original)
    far = [torch.randn(50, 6) - 4]
    assert reestimate(same, original, far, [1 + torch.randn(200, 6)]) is False
    for a, b in zip(original.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    # a single value has no variance: nothing is measured
    assert reestimate(same, original, [torch.randn(1, 6)], far) is False
    for a, b in zip(original.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_networks_without_running_statistics_have_nothing_to_measure() -> None:
    plain = nn.Linear(3, 2)
    assert reestimate(plain, plain, [torch.ones(2, 3)], [torch.ones(2, 3)]) is None
    assert reestimate(net(), net(), [torch.ones(2, 6)], []) is None


def test_distance_reads_every_floating_output() -> None:
    class Several(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"a": [x, (self.factor * x,)], "b": torch.ones(2, dtype=torch.int64)}

    x = torch.ones(4)
    assert distance(Several(2.0), Several(2.0), [x]) == 0
    assert distance(Several(3.0), Several(2.0), [x]) == 1 / 5
