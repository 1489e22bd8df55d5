"""Few-bit weights in training by two processes: equal on both, and what their state says."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from gossamer.core.quantizer import Quantizer
from gossamer.quantize import LSQ, TTQ, FixedWeights, LossAware, Projected, quantize_activations_

QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "ttq": lambda: TTQ(
        threshold=0.05, start="fit", weight_decay=0.0, lr_factor=0.1, every=2, ends=True
    ),
    "laq-3": lambda: LossAware("laq-3", beta=None, clip=1.0, ends=True),
    "twn": lambda: Projected("twn", clip=None, ends=True),
    "lsq": lambda: LSQ(bits=3, weight_decay=0.0, ends=True),
    "fixed point": lambda: FixedWeights(4, every=2),
}


def begun(name: str) -> tuple[nn.Module, torch.optim.Optimizer, Quantizer]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    quantize_activations_(model, 2, estimator="clipped", form="ceil", learned=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return model, optimizer, QUANTIZERS[name]().attach(model, optimizer)


def inputs(rank: int, step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(8, 1, 4, 4, generator=g), torch.randint(0, 3, (8,), generator=g)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in QUANTIZERS:
        model, optimizer, method = begun(name)
        whole = DistributedDataParallel(model)
        for step in range(4):
            x, y = inputs(rank, step)
            optimizer.zero_grad()
            F.cross_entropy(whole(x), y).backward()
            optimizer.step()
        mine = {**dict(model.named_parameters()), **method.values()}
        torch.save(
            {
                "weights": {n: t.detach() for n, t in mine.items()},
                "state": model.state_dict(),
                "method": method.state_dict(),
                "answers": model.eval()(inputs(0, 99)[0]).detach(),
            },
            f"{folder}/{name}-{rank}.pt",
        )
    dist.destroy_process_group()


def test_two_processes_keep_the_same_weights(tmp_path: Path) -> None:
    multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    for name in QUANTIZERS:
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert first["weights"].keys() == second["weights"].keys()
        start = {n: p.detach() for n, p in begun(name)[0].named_parameters()}
        for n, weight in first["weights"].items():
            assert torch.equal(weight, second["weights"][n]), (name, n)
            assert n not in start or not torch.equal(weight, start[n]), (name, n)
        model, _, method = begun(name)
        model.load_state_dict(first["state"])
        method.load_state_dict(first["method"])
        assert torch.equal(model.eval()(inputs(0, 99)[0]), first["answers"]), name
        values = method.values()
        assert all(torch.equal(value, first["weights"][n]) for n, value in values.items()), name
        method.finish()
        assert torch.equal(model(inputs(0, 99)[0]), first["answers"]), name
