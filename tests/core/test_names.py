import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.pack import load_into, pack_bytes
from gossamer.prune import prune


class Half(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w / 2


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, groups=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 4)
    )


def test_parametrized_and_wrapped_models_have_clean_names() -> None:
    model = net()
    parametrize.register_parametrization(model[3], "weight", Half())
    wrapped = nn.DataParallel(model)
    assert list(names.parameters(wrapped)) == [
        "0.weight", "0.bias", "1.weight", "1.bias", "3.bias", "3.parametrizations.weight.original",
    ]  # fmt: skip
    assert "3.weight" in names.clean_state_dict(wrapped)


class Residual(nn.Module):
    """A network with a submodule that is really called ``module``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.fc, self.module = nn.Linear(3, 3), inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.module(x)


def residual() -> Residual:
    torch.manual_seed(0)
    return Residual(nn.ModuleDict({"fc": nn.Linear(3, 3)}))


OWN = ["fc.weight", "fc.bias", "module.fc.weight", "module.fc.bias"]


def test_a_submodule_called_module_keeps_its_name() -> None:
    model = residual()
    assert list(names.parameters(model)) == OWN
    assert list(names.modules(model)) == ["fc", "module", "module.fc"]
    assert list(names.clean_state_dict(model)) == OWN
    assert list(names.weights(model)) == [OWN[0], OWN[2]]
    assert set(prune(model, 0.5)) == {OWN[0], OWN[2]}


def test_a_file_of_a_submodule_called_module_holds_all_of_it() -> None:
    model = residual()
    data = pack_bytes(model)
    torch.manual_seed(1)
    other = Residual(nn.ModuleDict({"fc": nn.Linear(3, 3)}))
    load_into(data, other)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def _wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "parallel":
        return nn.DataParallel(model)
    if kind == "averaged":
        return torch.optim.swa_utils.AveragedModel(model)
    if kind == "compiled":
        return torch.compile(model)
    if kind == "inside":
        model.module = nn.DataParallel(model.module)
        return nn.DataParallel(model)
    assert kind == "checkpointed"
    checkpoint = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model.module = checkpoint.checkpoint_wrapper(model.module)
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of importing the compiler
@pytest.mark.parametrize("kind", ["parallel", "averaged", "compiled", "inside", "checkpointed"])
def test_only_what_a_wrapper_added_is_left_out(kind: str) -> None:
    wrapped = _wrapped(kind, residual())
    assert list(names.parameters(wrapped)) == OWN
    assert [n for n in names.clean_state_dict(wrapped) if n != "n_averaged"] == OWN
    assert [n for n in names.modules(wrapped) if n] == ["fc", "module", "module.fc"]
    plain = residual()
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    if kind != "averaged":  # which has a count of its own
        load_into(pack_bytes(wrapped), plain)
        assert torch.equal(plain.fc.weight, residual().fc.weight)


def test_two_tensors_of_one_name_are_refused() -> None:
    inner = nn.Linear(2, 2)
    inner.register_buffer("n_averaged", torch.zeros(2))
    averaged = torch.optim.swa_utils.AveragedModel(inner)
    with pytest.raises(ArgumentError, match=r"'n_averaged' and 'module.n_averaged' would both be"):
        names.tensors(averaged)


def test_a_name_alone_keeps_what_may_be_a_submodule() -> None:
    assert names.clean("module.fc.weight") == "module.fc.weight"
    assert names.clean("a._checkpoint_wrapped_module.fc.weight") == "a.fc.weight"


def test_reading_a_state_does_not_move_a_parametrization() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    first = names.clean_state_dict(model)["0.weight"]
    assert torch.equal(first, names.clean_state_dict(model)["0.weight"])
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert model[0].parametrizations.weight[0].training


def test_clean_state_evaluates_parametrizations() -> None:
    model = net()
    original = model[3].weight.detach().clone()
    parametrize.register_parametrization(model[3], "weight", Half())
    state = names.clean_state_dict(model)
    assert torch.equal(state["3.weight"], original / 2)
    assert "3.parametrizations.weight.original" not in state
    assert {"1.running_mean", "1.num_batches_tracked"} <= set(state)


def test_weights_leave_out_biases_norms_and_embeddings() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 3),
            "rnn": nn.LSTM(3, 4),
            "out": nn.Linear(4, 5),
            "norm": nn.LayerNorm(5),
        }
    )
    assert list(names.weights(model)) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"]
    assert list(names.weights(model, include="embed")) == ["embed.weight"]
    assert list(names.weights(model, exclude="re:rnn.*")) == ["out.weight"]


def test_a_tied_embedding_counts_as_the_linear_layers_weight_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
    model["out"].weight = model["embed"].weight
    assert list(names.weights(model)) == ["embed.weight"]
    assert names.tied(model) == {"out.weight": "embed.weight"}
    assert list(names.clean_state_dict(model)) == ["embed.weight"]


def test_tied_buffers_are_found_too() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.BatchNorm1d(2)})
    model["b"].running_mean = model["a"].running_mean
    assert names.tied(model) == {"b.running_mean": "a.running_mean"}


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("conv1", ["conv1.weight"]),
        ("conv1.bias", ["conv1.bias"]),
        ("conv*", ["conv1.weight", "conv1.bias", "conv2.weight"]),
        ("block", ["block.fc.weight"]),
        ("re:.*2.weight", ["conv2.weight"]),
        (["block", "conv1"], ["conv1.weight", "block.fc.weight"]),
    ],
)
def test_patterns(pattern: str | list[str], found: list[str]) -> None:
    pool = ["conv1.weight", "conv1.bias", "conv2.weight", "block.fc.weight"]
    assert names.select(pool, pattern) == found


def test_a_pattern_that_matches_nothing_lists_what_there_is() -> None:
    with pytest.raises(ArgumentError, match=r"'fcc' matches nothing; names are: fc\.weight"):
        names.select(["fc.weight"], "fcc")
    with pytest.raises(ArgumentError, match="is no regular expression"):
        names.select(["fc.weight"], "re:(")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
def test_torchscript_is_refused_by_name() -> None:
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match=r"the model is compiled by torch.jit .*made from"):
        names.weights(scripted)
    with pytest.raises(ArgumentError, match=r"^0 is compiled by torch.jit"):
        names.parameters(nn.Sequential(scripted))
