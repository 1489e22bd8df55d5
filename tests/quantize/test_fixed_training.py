"""Training in fixed point: grids, gradients, and the deployed network after it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.quantize import (
    FixedReLU,
    FixedWeights,
    Precision,
    calibrate,
    fixed_activations_,
)
from gossamer.quantize.fixed_point import Format, quantize, search, to_codes
from gossamer.quantize.fixed_training import fixed_relu
from gossamer.structure import fold_batchnorm


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (32,), generator=g)
    return torch.randn(32, 1, 4, 4, generator=g) + y.view(-1, 1, 1, 1), y


@pytest.mark.parametrize("frac", [-2, 0, 3, 20])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_activations_are_what_codes_in_double_precision_say(bits: int, frac: int) -> None:
    form = Format(bits, frac)
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * form.step * 2 ** (bits - 1)
    x[:40] = torch.arange(-20, 20) / 2 * form.step  # ties
    x.requires_grad_()
    y = fixed_relu(x, form)
    assert torch.equal(y.double(), to_codes(x.detach().clamp(min=0), form) * form.step)
    y.sum().backward()
    most = form.high * form.step
    assert torch.equal(x.grad, ((x > 0) & (x < most)).float())


def test_weights_stand_on_their_grids_and_move_straight_through() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = FixedWeights(4, every=None).attach(model, optimizer)
    start = {n: held.parameter.detach().clone() for n, held in method._held.items()}
    lengths = dict(method.lengths)
    assert lengths == {n: search(w, 4) for n, w in start.items()}
    x, y = batch(0)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    plain = copy.deepcopy(model)
    values = method.values()
    optimizer.step()
    for name, w in start.items():
        assert torch.equal(values[name], quantize(w, 4, lengths[name]))
        held = method._held[name].parameter
        assert torch.allclose(held, w - 0.1 * held.grad)
        assert torch.equal(method.values()[name], quantize(held.detach(), 4, lengths[name]))
    assert torch.equal(plain(x), plain(x))
    assert all(len(q.codebook) <= 16 for q in method.quantized().values())
    method.finish()
    assert set(names.weights(model)) == set(start)


def test_lengths_are_searched_again_when_asked() -> None:
    def lengths(every: int | None) -> list[int]:
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        method = FixedWeights(6, every=every).attach(model, optimizer)
        seen = [method.lengths["weight"]]
        for _ in range(4):
            for p in model.parameters():
                p.grad = -p.detach().clone()  # doubles them
            optimizer.step()
            seen.append(method.lengths["weight"])
        return seen

    first = lengths(None)[0]
    assert lengths(None) == [first] * 5
    assert lengths(2) == [first, first, first - 2, first - 2, first - 4]
    assert lengths(1) == [first, first - 1, first - 2, first - 3, first - 4]


def test_trains_folds_and_deploys() -> None:
    model = fixed_activations_(net(), 6, [batch(s)[0] for s in range(4)])
    assert sum(isinstance(m, FixedReLU) for m in model.modules()) == 2
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    method = FixedWeights(6, every=10).attach(model, optimizer)
    other = net()
    fixed_activations_(other, 6, [batch(9)[0]])
    before = F.cross_entropy(model(batch(50)[0]), batch(50)[1])
    for seed in range(60):
        x, y = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    method.finish()
    model.eval()
    x, y = batch(100)
    assert F.cross_entropy(model(x), y) < 0.7 * before
    other.load_state_dict(model.state_dict())  # lengths travel
    assert torch.equal(other.eval()(x), model(x))
    plain = nn.Sequential(*(nn.ReLU() if isinstance(m, FixedReLU) else m for m in model)).eval()
    fixed = calibrate(
        fold_batchnorm(plain), [batch(s)[0] for s in range(4)], Precision(8, 8, 8, dynamic=True)
    )
    same = (fixed(x).argmax(1) == model(x).argmax(1)).float().mean()
    assert same > 0.9


def test_bad_input_is_named_and_leaves_the_model() -> None:
    with pytest.raises(ArgumentError, match="bits=1"):
        FixedWeights(1, every=None)
    with pytest.raises(ArgumentError, match="every=0"):
        FixedWeights(8, every=0)
    with pytest.raises(ArgumentError, match="bits=17"):
        FixedReLU(17, 0)
    model = net()
    with pytest.raises(ArgumentError, match="bits=40"):
        fixed_activations_(model, 40, [batch(0)[0]])
    with pytest.raises(ArgumentError, match="not reached"):
        fixed_activations_(model, 8, [])
    x = batch(0)[0]
    x[0] = float("nan")
    with pytest.raises(ArgumentError, match=r"activation '2'"):
        fixed_activations_(model, 8, [x])
    assert isinstance(model[2], nn.ReLU)
    assert not isinstance(model[5], FixedReLU)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 12), (torch.bfloat16, 9)])
def test_halves_hold_few_bits_exactly_and_no_more(dtype: torch.dtype, most: int) -> None:
    # the largest code was rounded up, out of the format's range
    x = torch.tensor([-1.0, 0.3, 900.0], dtype=dtype)
    top = 2 ** (most - 1) - 1
    found = fixed_relu(x, Format(most, 4)).double() * 16
    assert found.tolist() == [0, round(float(x[1]) * 16), top]
    with pytest.raises(ArgumentError, match=f"at most {most} bits"):
        fixed_relu(x, Format(most + 1, 4))
