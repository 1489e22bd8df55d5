"""The loss-aware loop: by hand, against the projections, and N processes against one."""

from __future__ import annotations

import math
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from gossamer.core.errors import ArgumentError, FormatError, GossamerError
from gossamer.distribute import SQm
from gossamer.distribute.exchange.server import LossAwareLoop, Rule
from gossamer.distribute.exchange.values import pack_values, unpack_values
from gossamer.quantize.loss_aware import binary, linear

RMS = Rule(beta=0.9, momentum=None, eps=1e-8, clip=None)


def plain(parameters: dict[str, Tensor], rule: Rule = RMS, workers: int = 1) -> LossAwareLoop:
    return LossAwareLoop(
        parameters, codec=None, coded=(), projections={}, rule=rule, workers=workers, seed=0
    )


def test_full_precision_is_rmsprop_and_adam() -> None:
    g = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=g)
    gradients = [torch.randn(7, generator=g) for _ in range(5)]
    adam = Rule(beta=0.99, momentum=0.9, eps=1e-8, clip=None)
    for rule, make in (
        (RMS, partial(torch.optim.RMSprop, lr=0.1, alpha=0.9, eps=1e-8)),
        (adam, partial(torch.optim.Adam, lr=0.1, betas=(0.9, 0.99), eps=1e-8)),
    ):
        loop, p = plain({"w": start}, rule), torch.nn.Parameter(start.clone())
        optimizer = make([p])
        for grad in gradients:
            loop.step([{"w": grad}], 0.1)
            p.grad = grad
            optimizer.step()
        torch.testing.assert_close(loop.weights["w"], p.detach(), rtol=1e-6, atol=1e-7)


def test_a_step_by_hand() -> None:
    # two workers, ternary codes that are certain: every |g| is 0 or the largest
    loop = LossAwareLoop(
        {"w": torch.tensor([1.0, -1.0]), "b": torch.tensor([0.0])},
        codec=SQm(2),
        coded=["w"],
        projections={"w": binary},
        rule=Rule(beta=0.75, momentum=None, eps=1e-8, clip=1.0),
        workers=2,
        seed=0,
    )
    assert loop.weights["w"].tolist() == [1.0, -1.0]
    loop.step(
        [
            {"w": torch.tensor([2.0, 0.0]), "b": torch.tensor([1.0])},
            {"w": torch.tensor([0.0, 4.0]), "b": torch.tensor([3.0])},
        ],
        0.25,
    )
    # mean (1, 2), v (.25, 1), sqrt (.5, 1): w (1 - .5, -1 - .5), clipped to (.5, -1)
    alpha = (0.5 * 0.5 + 1 * 1) / 1.5
    torch.testing.assert_close(loop.weights["w"], torch.tensor([alpha, -alpha]))
    torch.testing.assert_close(loop.weights["b"], torch.tensor([-0.25 * 2 / math.sqrt(0.25 * 4)]))


def test_workers_draw_their_own_codes() -> None:
    g = {"w": torch.rand(4000, generator=torch.Generator().manual_seed(1)) - 0.5}
    rule = Rule(beta=0.0, momentum=0.0, eps=1e-8, clip=None)
    loop = LossAwareLoop(
        {"w": torch.zeros(4000)}, codec=SQm(2), coded=["w"], projections={}, rule=rule, workers=4,
        seed=3,
    )  # fmt: skip
    parts = [loop._encode(g, rank)["w"] for rank in range(2)]
    assert not torch.equal(*parts)
    mean = loop._mean("w", [loop._encode(g, rank)["w"] for rank in range(4)])
    # 2N + 1 values, and half the error's size of one worker alone
    assert mean.unique().numel() == 9
    one = (loop._mean("w", [parts[0]] * 4) - g["w"]).norm()
    assert (mean - g["w"]).norm() < 0.6 * one


def _task(seed: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A start, and a linear problem's inputs and targets for three workers."""
    g = torch.Generator().manual_seed(seed)
    start = {"w": torch.randn(6, 33, generator=g) * 0.3, "b": torch.zeros(6)}
    target = torch.randn(6, 33, generator=g)
    x = [torch.randn(16, 33, generator=g) for _ in range(3)]
    return start, [{"x": i, "y": i @ target.T} for i in x]


def _gradients(weights: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
    loss = (data["x"] @ leaves["w"].T + leaves["b"] - data["y"]).square().mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def _loop(start: dict[str, Tensor], workers: int | dist.ProcessGroup) -> LossAwareLoop:
    return LossAwareLoop(
        start,
        codec=SQm(3, clip=3.0, scaler="sigma"),
        coded=["w"],
        projections={"w": partial(linear, bits=3)},
        rule=RMS,
        workers=workers,
        seed=5,
    )


STEPS = 12


def _rank(rank: int, workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", workers)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=workers, timeout=timedelta(seconds=600)
    )
    start, data = _task(0)
    assert dist.group.WORLD is not None
    loop = _loop(start, dist.group.WORLD)
    for t in range(1, STEPS + 1):
        loop.step([_gradients(loop.weights, data[rank])], 0.1 / math.sqrt(t))
    message = ""
    try:
        bad = float("nan") if rank == 1 else 1.0
        loop.step([{n: torch.full_like(w, bad) for n, w in loop.weights.items()}], 0.1)
    except GossamerError as e:
        message = str(e)
    torch.save(
        {"weights": loop.weights, "sent": loop.sent, "message": message}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_thread")
def test_processes_equal_the_simulation_bit_for_bit(tmp_path: Path) -> None:
    spawn(_rank, (2, str(tmp_path)), nprocs=2)
    start, data = _task(0)
    loop = _loop(start, 2)
    for t in range(1, STEPS + 1):
        rate = 0.1 / math.sqrt(t)
        loop.step([_gradients(loop.weights, data[rank]) for rank in range(2)], rate)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in loop.weights.items():
            assert torch.equal(value, found["weights"][name]), (rank, name)
        assert "gradient of w is not finite" in found["message"]
        up, down = found["sent"]
        # 198 weights in 4 groups of 64: three planes of 8 bytes each, a scale; 6 float biases
        assert up == 4 * 3 * 8 + 4 + 6 * 4
        # 7 or 8 values: a byte, 8 values, 3 planes of 25 bytes; biases are 6 different floats
        assert down == (1 + 8 * 4 + 3 * 25) + (1 + 8 * 4 + 3 * 1)


def test_resuming_is_bit_identical() -> None:
    start, data = _task(1)
    whole, half = _loop(start, 3), _loop(start, 3)

    def go(loop: LossAwareLoop, steps: range) -> None:
        for t in steps:
            loop.step([_gradients(loop.weights, d) for d in data], 0.1 / math.sqrt(t))

    go(whole, range(1, 9))
    go(half, range(1, 5))
    other = _loop({n: torch.zeros_like(w) for n, w in start.items()}, 3)
    other.load_state_dict(half.state_dict())
    go(other, range(5, 9))
    assert all(torch.equal(w, other.weights[n]) for n, w in whole.weights.items())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    start, _ = _task(2)
    loop = _loop(start, 2)
    before = {n: w.clone() for n, w in loop.weights.items()}
    bad = {n: torch.zeros_like(w) for n, w in start.items()}
    bad["b"][0] = math.inf
    with pytest.raises(GossamerError, match="gradient of b is not finite"):
        loop.step([{n: torch.zeros_like(w) for n, w in start.items()}, bad], 0.1)
    assert all(torch.equal(w, loop.weights[n]) for n, w in before.items())


def test_bad_arguments_are_named() -> None:
    start = {"w": torch.zeros(3)}
    for change, match in (
        ({"coded": ["v"]}, "v: no parameter"),
        ({"projections": {"v": binary}}, "v: no parameter"),
        ({"workers": 0}, "workers=0"),
    ):
        given = {
            "codec": None, "coded": (), "projections": {}, "rule": RMS, "workers": 1, "seed": 0,
        } | change  # fmt: skip
        with pytest.raises(ArgumentError, match=match):
            LossAwareLoop(start, **given)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="w: not float32"):
        plain({"w": torch.zeros(3).half()})
    loop = plain(start, workers=2)
    with pytest.raises(ArgumentError, match="gradients of 1 workers; 2"):
        loop.step([{"w": torch.zeros(3)}], 0.1)
    with pytest.raises(ArgumentError, match="do not fit"):
        loop.step([{"w": torch.zeros(3)}, {"w": torch.zeros(4)}], 0.1)
    for change in ({"beta": 1.0}, {"momentum": -0.1}, {"eps": 0.0}, {"clip": 0.0}):
        with pytest.raises(ArgumentError, match=f"{next(iter(change))}="):
            Rule(**({"beta": 0.9, "momentum": None, "eps": 1e-8, "clip": None} | change))


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.5, -1.5, math.inf, 3e-40]), max_size=70),
    st.lists(st.floats(width=32), max_size=20),
)
def test_values_come_back_bit_for_bit(few: list[float], any_: list[float]) -> None:
    tensors = {"few": torch.tensor(few), "any": torch.tensor(any_).reshape(1, -1)}
    back = unpack_values(pack_values(tensors), {n: t.shape for n, t in tensors.items()})
    for name, value in tensors.items():
        assert back[name].shape == value.shape
        assert torch.equal(back[name].view(torch.int32), value.view(torch.int32))


def test_values_by_hand_and_broken() -> None:
    packed = pack_values({"w": torch.tensor([2.0, 1.0, 2.0])})
    table = torch.tensor([1.0, 2.0]).view(torch.uint8).tolist()
    assert packed.tolist() == [1, *table, 0b101]
    many = torch.arange(300.0)
    assert pack_values({"w": many}).numel() == 1 + 1200
    with pytest.raises(FormatError, match="end after 9 bytes"):
        unpack_values(packed[:-1], {"w": (3,)})
    with pytest.raises(FormatError, match="1 bytes follow"):
        unpack_values(torch.cat([packed, packed[:1]]), {"w": (3,)})
    with pytest.raises(FormatError, match="9 bits"):
        unpack_values(torch.tensor([9], dtype=torch.uint8), {"w": (3,)})
