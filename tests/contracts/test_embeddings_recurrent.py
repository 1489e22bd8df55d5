"""Methods on embeddings (sparse gradients, max_norm) and on recurrent layers (deep copies)."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.core.method import Masked, Method
from gossamer.prune.dynamic import FAMILY, DynamicSparse
from gossamer.prune.supermask import Supermask
from gossamer.quantize.fixed_training import FixedWeights
from gossamer.quantize.loss_aware import LossAware
from gossamer.quantize.lsq import LSQ
from gossamer.quantize.projected import Projected
from gossamer.quantize.rate_aware import RateAware
from gossamer.quantize.ttq import TTQ

Make = Callable[[nn.Module], Method]
COMPUTED: dict[str, Make] = {
    "ttq": lambda m: TTQ(threshold=0.05, start="fit", weight_decay=None, every=9, include="a*"),
    "lsq": lambda m: LSQ(bits=4, weight_decay=None, include="a*"),
    "shared": lambda m: gossamer.SharedWeights(
        gossamer.share_model(m, bits=3, init="uniform", include="a*")
    ),
    "supermask": lambda m: Supermask(
        generator=torch.Generator().manual_seed(0), rescale=True, include="a*"
    ),
    "projected": lambda m: Projected("twn", clip=None, include="a*"),
    "fixed point": lambda m: FixedWeights(4, every=None, include="a*"),
    "loss aware": lambda m: LossAware("lat2", beta=0.9, clip=None, include="a*"),
}
HELD: dict[str, Make] = {
    "masked": lambda m: Masked(keep(m)),
    "masked, dense gradients": lambda m: Masked(keep(m), mask_gradients=False),
    "rigl": lambda m: DynamicSparse(
        FAMILY["rigl"],
        0.3,
        steps=10,
        every=2,
        generator=torch.Generator().manual_seed(0),
        include="a*",
    ),
    "sparse momentum": lambda m: DynamicSparse(
        FAMILY["sparse-momentum"],
        0.3,
        steps=10,
        every=2,
        generator=torch.Generator().manual_seed(0),
        include="a*",
    ),
}
RATE: dict[str, Make] = {"rate aware": lambda m: RateAware({"a.weight": 0.2}, lam=1e-3)}
ALL = COMPUTED | HELD | RATE
# torch tells that it has no fast kernel for these
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
TOKENS = torch.tensor([[0, 3, 4, 3], [1, 3, 5, 7]])


def keep(model: nn.Module) -> Masks:
    return Masks({"a.weight": torch.arange(32).reshape(8, 4) % 3 == 0})


class Words(nn.Module):
    def __init__(self, bag: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.a: nn.Module = kind(8, 4, **options)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.a(x))
        return out


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, n: int = 5) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_sparse_gradients_train_as_dense_ones(make: Make, momentum: float, bag: bool) -> None:
    if make is HELD["sparse momentum"]:
        momentum = max(momentum, 0.5)
    found = []
    for sparse in (False, True):
        model = Words(bag, sparse=sparse)
        method = make(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
        method.attach(model, optimizer)
        train(model, optimizer, TOKENS)
        if isinstance(method, (Masked, DynamicSparse)):
            assert not model.a.weight[~method.masks["a.weight"]].any()  # type: ignore[operator]
        out = model(TOKENS).detach()
        method.finish()
        torch.testing.assert_close(model(TOKENS).detach(), out)
        found.append(out)
    torch.testing.assert_close(found[0], found[1])


def test_buffers_that_a_second_optimizer_has_of_sparse_gradients_are_held() -> None:
    model = Words(sparse=True)
    first, second = (torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for _ in range(2))
    method = Masked(keep(model)).attach(model, first)
    train(model, second, TOKENS, 3)
    away = ~method.masks["a.weight"]
    assert not model.a.weight[away].any()  # type: ignore[operator]
    assert not second.state[model.a.weight]["momentum_buffer"][away].any()


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_sparse_adam_is_refused_by_name(make: Make) -> None:
    model = Words(sparse=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=r"SparseAdam.*attach to Adam or SGD"):
        make(model).attach(model, torch.optim.SparseAdam(list(model.a.parameters())))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("make", (COMPUTED | RATE).values(), ids=(COMPUTED | RATE).keys())
def test_a_norm_kept_in_forward_is_refused_where_the_weight_is_computed(
    make: Make, bag: bool
) -> None:
    model = Words(bag, max_norm=0.5)
    method = make(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=r"a.weight belongs to Embedding.* max_norm=0.5.*None"):
        method.attach(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("make", HELD.values(), ids=HELD.keys())
def test_zeros_hold_under_a_norm_kept_in_forward(make: Make) -> None:
    model = Words(max_norm=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = make(model).attach(model, optimizer)
    train(model, optimizer, TOKENS)
    model(TOKENS)
    weight = model.a.weight.detach()
    assert isinstance(weight, torch.Tensor)
    assert not weight[~method.masks["a.weight"]].any()  # type: ignore[attr-defined]
    assert (weight[TOKENS.unique()].norm(dim=1) <= 0.5 + 1e-5).all()


def test_other_held_values_under_a_norm_are_refused() -> None:
    model = Words(max_norm=0.5)
    masks = keep(model)
    with pytest.raises(ArgumentError, match=r"max_norm=0\.5"):
        Masked(masks, values={"a.weight": torch.ones(8, 4)}).attach(model)
    Masked(masks, values={"a.weight": torch.zeros(8, 4)}).attach(model)


RECURRENT: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(6, 8, 2, batch_first=True),
    "gru": lambda: nn.GRU(6, 8, bidirectional=True, batch_first=True),
    "lstm, projected": lambda: nn.LSTM(6, 8, proj_size=4, batch_first=True),
    "rnn": lambda: nn.RNN(6, 8, bias=False, nonlinearity="relu", batch_first=True),
}
SERIES = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1))


class Reads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = RECURRENT[kind]()
        self.head = nn.Linear(self.a(SERIES)[0].shape[-1], 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.a(x)[0])
        return out


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.5)


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED.keys())
def test_a_deep_copy_of_a_recurrent_net_computes_the_same_by_itself(make: Make, kind: str) -> None:
    model = Reads(kind)
    optimizer = sgd(model)
    method = make(model).attach(model, optimizer)
    for stage in ("fresh", "trained"):
        if stage == "trained":
            train(model, optimizer, SERIES)
        twin = copy.deepcopy(model)
        out = model(SERIES).detach()
        assert torch.equal(twin(SERIES), out)
        train(model, optimizer, SERIES, 2)  # the copy does not follow
        assert not torch.equal(model(SERIES), out)
        assert torch.equal(twin(SERIES), out)
        kept = model(SERIES).detach()
        with torch.no_grad():  # nor the original the copy, which reads its own parameters
            for p in twin.parameters():
                p.mul_(1.5)
            for module in twin.modules():
                if hasattr(module, "value"):
                    module.value = module.value * 1.5
        assert torch.equal(model(SERIES), kept)
        assert not torch.equal(twin(SERIES), out)
    twin = copy.deepcopy(model)
    out = model(SERIES).detach()
    method.finish()
    assert type(model.a) is type(RECURRENT[kind]())
    assert torch.equal(model(SERIES), out)
    assert torch.equal(twin(SERIES), out)
    assert torch.equal(copy.deepcopy(model)(SERIES), out)
    again = sgd(model)
    train(model, again, SERIES, 1)  # plain again: the layer computes from what is trained
    assert not torch.equal(model(SERIES), out)
    assert torch.equal(twin(SERIES), out)


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED.keys())
def test_gradients_of_a_copied_recurrent_net_are_its_own(make: Make) -> None:
    model = Reads("lstm")
    make(model).attach(model, sgd(model))
    train(model, sgd(model), SERIES, 1)
    model.zero_grad()
    twin = copy.deepcopy(model)
    twin(SERIES).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    model(SERIES).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_finishing_leaves_deep_copies_whole(make: Make) -> None:
    model = Words()
    method = make(model).attach(model)
    twin = copy.deepcopy(model)
    out = twin(TOKENS).detach()
    method.finish()
    assert torch.equal(twin(TOKENS), out)
    assert torch.equal(copy.deepcopy(twin)(TOKENS), out)


def test_moving_a_recurrent_net_to_another_dtype_keeps_copies_possible() -> None:
    model = Reads("gru")
    COMPUTED["lsq"](model).attach(model, sgd(model))
    model.double()
    x = SERIES.double()
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_the_row_of_padding_stays_zero(make: Make) -> None:
    model = Words(padding_idx=0)  # TOKENS hold it
    method = make(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method.attach(model, optimizer)
    train(model, optimizer, TOKENS)
    before = model(TOKENS).detach()
    method.finish()
    torch.testing.assert_close(model(TOKENS).detach(), before)
    weight: Any = model.a.weight
    assert not weight[0].any()
    assert weight[3:].any()
