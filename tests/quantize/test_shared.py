import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from classifier import batch, step
from gossamer.core import names
from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError
from gossamer.quantize import scalar
from gossamer.quantize.kmeans import share, share_model
from gossamer.quantize.shared import SharedWeights, group_sum

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    with torch.no_grad():
        model[0].weight[torch.rand(20, 12) < 0.6] = 0
    return model


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("entries", [1, 7, 256, 500])
def test_group_sum(native: bool, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setenv("GOSSAMER_NATIVE", "0")
    g = torch.Generator().manual_seed(entries)
    values = torch.randn(30, 40, generator=g)
    codes = torch.randint(entries, (30, 40), generator=g).to(
        torch.uint8 if entries <= 256 else torch.int32
    )
    got = group_sum(values, codes, entries)
    want = [values[codes == c].double().sum().item() for c in range(entries)]
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=1e-6)


def test_centroid_gradient_is_the_grouped_sum() -> None:
    model, (x, y) = net(), batch()
    shared = share_model(model, bits=3)
    SharedWeights(shared).attach(model)
    F.cross_entropy(model(x), y).backward()
    for name, q in shared.items():
        owner = model[int(name[0])]
        got = owner.parametrizations.weight.original0.grad
        # autograd's own way through codebook[codes]
        book = q.codebook.clone().requires_grad_()
        weights = {n: s.dequantize() for n, s in shared.items()}
        weights[name] = book[q.codes.long()]
        h = F.relu(F.linear(x, weights["0.weight"], model[0].bias.detach()))
        F.cross_entropy(F.linear(h, weights["2.weight"], model[2].bias.detach()), y).backward()
        torch.testing.assert_close(got, book.grad[1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("grid", [False, True])
def test_training_keeps_the_sharing(optimizer: str, grid: bool) -> None:
    model = net()
    shared = share_model(model, bits=3, init="uniform" if grid else "linear")
    keys = list(model.state_dict())
    before = dict(model.named_parameters())
    opt = OPTIMIZERS[optimizer](model.parameters())
    method = SharedWeights(shared, grid=grid).attach(model, opt)
    assert torch.equal(model[0].weight, shared["0.weight"].dequantize())
    losses = [step(model, opt) for _ in range(30)]
    assert losses[-1] < losses[0]
    now = method.quantized()
    for name, q in now.items():
        assert torch.equal(q.codes, shared[name].codes)
        assert not torch.equal(q.codebook, shared[name].codebook)
        assert torch.equal(model[int(name[0])].weight, q.dequantize())
    assert (model[0].weight[shared["0.weight"].codes == 0] == 0).all()
    inputs = batch()[0]
    outputs = model(inputs)
    method.finish()
    assert torch.equal(model(inputs), outputs)
    assert list(model.state_dict()) == keys
    assert dict(model.named_parameters()).items() == before.items()  # the very objects
    assert [id(p) for g in opt.param_groups for p in g["params"]] == [
        id(p) for p in model.parameters()
    ]
    if grid:
        for p in names.weights(model).values():
            assert scalar.find_step(Quantized.of(p).codebook) is not None
    step(model, opt)  # an ordinary model and optimizer again


def test_sgd_step_by_hand() -> None:
    layer = nn.Linear(4, 1, bias=False)
    q = Quantized(torch.tensor([[0, 1, 1, 2]]), torch.tensor([0.0, 1.0, -2.0]))
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    method = SharedWeights({"weight": q}).attach(layer, opt)
    layer(torch.tensor([[5.0, 1.0, 2.0, 3.0]])).sum().backward()
    opt.step()  # gradients: 1 + 2 for the first centroid, 3 for the second
    torch.testing.assert_close(method.quantized()["weight"].codebook, torch.tensor([0, 0.7, -2.3]))
    method.finish()
    torch.testing.assert_close(layer.weight, torch.tensor([[0, 0.7, 0.7, -2.3]]))


def test_group_options_and_clipping_reach_the_code_book() -> None:
    model = net()
    opt = torch.optim.SGD(
        [{"params": [model[0].weight], "lr": 0.0}, {"params": [model[2].weight]}], lr=0.1
    )
    shared = share_model(model, bits=2)
    method = SharedWeights(shared).attach(model, opt)
    step(model, opt)
    now = method.quantized()
    assert torch.equal(now["0.weight"].codebook, shared["0.weight"].codebook)
    assert not torch.equal(now["2.weight"].codebook, shared["2.weight"].codebook)
    trained = [p for g in opt.param_groups for p in g["params"]]
    assert nn.utils.clip_grad_norm_(trained, 1e-3) > 1e-3
    assert sum(float(p.grad.square().sum()) for p in trained) < 1.1e-6
    method.finish()


def test_resume_is_bit_identical_and_copies_work() -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, SharedWeights]:
        model = net()
        opt = OPTIMIZERS["adam"](model.parameters())
        return model, opt, SharedWeights(share_model(model, bits=3)).attach(model, opt)

    model, opt, method = fresh()
    for i in range(3):
        step(model, opt, i)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), method.state_dict()))
    twin = copy.deepcopy(model)
    for i in range(3, 6):
        step(model, opt, i)
    again, opt2, method2 = fresh()
    again.load_state_dict(saved[0])
    opt2.load_state_dict(saved[1])
    method2.load_state_dict(saved[2])
    assert torch.equal(twin[0].weight, again[0].weight)
    for i in range(3, 6):
        step(again, opt2, i)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(twin[0].weight, again[0].weight)


def test_a_live_graph_and_old_buffers_do_no_harm() -> None:
    model = net()
    opt = OPTIMIZERS["sgd"](model.parameters())
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    method = SharedWeights(share_model(model, bits=3)).attach(model, opt)
    step(model, opt)  # while loss, and its graph, is alive
    method.finish()
    step(model, opt)
    assert torch.isfinite(loss)


def test_detach_and_attach_to_another_optimizer() -> None:
    model = net()
    method = SharedWeights(share_model(model, bits=3))
    opt = OPTIMIZERS["sgd"](model.parameters())
    method.attach(model, opt)
    with pytest.raises(ArgumentError, match="attached already"):
        method.attach(model, opt)
    method.detach()
    opt = OPTIMIZERS["adam"](model.parameters())
    method.attach(model, opt)
    book = method.quantized()["0.weight"].codebook
    step(model, opt)
    assert not torch.equal(method.quantized()["0.weight"].codebook, book)
    method.finish()
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }


def test_tied_and_recurrent_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.lstm = nn.LSTM(6, 6)
            self.out = nn.Linear(6, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.lstm(self.embed(x))[0])

    torch.manual_seed(0)
    model = Tied()
    keys = list(model.state_dict())
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    shared = share_model(model, bits=3)
    assert set(shared) == {"embed.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    method = SharedWeights(shared).attach(model, opt)
    x = torch.arange(10)[:, None]
    before = method.quantized()
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        opt.step()
    now = method.quantized()
    assert all(not torch.equal(now[n].codebook, before[n].codebook) for n in now)
    assert torch.equal(model.out.weight, model.embed.weight)
    outputs = model(x)
    method.finish()
    torch.testing.assert_close(model(x), outputs)
    assert model.out.weight is model.embed.weight
    assert list(model.state_dict()) == keys
    assert torch.equal(model.lstm.weight_hh_l0, now["lstm.weight_hh_l0"].dequantize())


@pytest.mark.parametrize("grid", [False, True])
def test_zero_tensor_and_many_codes(grid: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 100), nn.Linear(100, 4))
    with torch.no_grad():
        model[0].weight.zero_()
    shared = {
        "0.weight": share(model[0].weight, bits=4),
        "1.weight": share(model[1].weight, clusters=300, init="uniform"),
    }
    opt = torch.optim.Adam(model.parameters())
    method = SharedWeights(shared, grid=grid).attach(model, opt)
    for _ in range(2):
        model(torch.ones(2, 3)).square().sum().backward()
        opt.step()
    method.finish()
    assert (model[0].weight == 0).all()
    assert len(model[1].weight.unique()) == len(shared["1.weight"].codebook)


def test_bad_arguments_leave_the_model_alone() -> None:
    model = net()
    keys = list(model.state_dict())
    good = share_model(model, bits=3)
    with pytest.raises(ArgumentError, match="empty"):
        SharedWeights({})
    with pytest.raises(ArgumentError, match="is no parameter"):
        SharedWeights({**good, "x": good["0.weight"]}).attach(model)
    with pytest.raises(ArgumentError, match="shape"):
        SharedWeights({"0.weight": good["2.weight"]}).attach(model)
    with pytest.raises(ArgumentError, match="no uniform grid"):
        SharedWeights(good, grid=True).attach(model)
    with pytest.raises(ArgumentError, match="holds none of"):
        SharedWeights(good).attach(model, torch.optim.SGD([model[0].bias], lr=1.0))
    assert list(model.state_dict()) == keys
    method = SharedWeights(good).attach(model)
    with pytest.raises(ArgumentError, match="parametrized already"):
        SharedWeights(good).attach(model)
    method.finish()


def test_train_loop_resumes_a_shared_network() -> None:
    pytest.importorskip("sklearn")
    from gossamer.datasets import load
    from gossamer.training import TrainConfig, evaluate, train

    data = load("digits")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    train(model, data, TrainConfig(epochs=4, lr=0.1))
    dense = evaluate(model, data.test).accuracy
    method = SharedWeights(share_model(model, bits=2))
    method.attach(model)
    coarse = evaluate(model, data.validation).loss
    method.detach()
    train(model, data, TrainConfig(epochs=4, lr=0.003), methods=[method])
    tuned = evaluate(model, data.validation).loss
    method.finish()
    assert tuned < coarse
    assert evaluate(model, data.test).accuracy > dense - 0.05
    assert all(len(p.unique()) <= 4 for p in names.weights(model).values())
