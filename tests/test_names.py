import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from gossamer import names
from gossamer.errors import ArgumentError


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
    wrapped = nn.Module()
    wrapped.module = model
    assert list(names.parameters(wrapped)) == [
        "0.weight", "0.bias", "1.weight", "1.bias", "3.bias", "3.weight",
    ]  # fmt: skip


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
