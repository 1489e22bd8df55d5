import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as hooks

import gossamer
from gossamer.core import access, names
from gossamer.core.errors import ArgumentError
from gossamer.prune import prune

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")


def old(name):
    return lambda layer: getattr(torch.nn.utils, name)(layer)


KINDS = {
    "prune": (lambda layer: hooks.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
    "weight_norm": (old("weight_norm"), "remove_weight_norm"),
    "spectral_norm": (old("spectral_norm"), "remove_spectral_norm"),
    "new weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "new spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations"),
}


def derived(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    KINDS[kind][0](model[2])
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_derived_weights_are_found_and_named(kind):
    (found,) = access.derived(derived(kind))
    assert (found.layer, found.attribute, found.own) == ("2", "weight", False)
    assert all(isinstance(p, nn.Parameter) for p in found.sources)
    assert found.sources
    assert KINDS[kind][1] in found.fix


USES = {
    "prune": lambda m: prune(m, 0.5),
    "share": lambda m: gossamer.share_model(m, bits=2),
    "ttq": lambda m: gossamer.TTQ(
        threshold=0.05, start="fit", weight_decay=None, every=10, ends=True
    ).attach(m, torch.optim.SGD(m.parameters(), lr=0.1)),
    "seeded": lambda m: gossamer.seeded.init_(m, 1),
    "weights": names.weights,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", KINDS)
def test_derived_weights_are_refused_with_the_fix_and_unchanged(kind, use):
    model = derived(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=rf"2\.weight is computed .*{KINDS[kind][1]}"):
        USES[use](model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_derived_layer_can_be_left_out(kind):
    assert list(names.weights(derived(kind), exclude="2")) == ["0.weight"]


def test_the_fix_of_the_message_works():
    model = derived("weight_norm")
    want = model[2].weight.detach().clone()
    (found,) = access.derived(model)
    call = found.fix.removesuffix(" makes it plain")
    eval(call, {"torch": torch, "model": model})
    assert access.derived(model) == []
    assert torch.equal(names.weights(model)["2.weight"], want)


def test_a_mask_cannot_be_put_on_the_source_of_a_derived_weight():
    model = derived("orthogonal")
    masks = gossamer.Masks({"2.weight": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(ArgumentError, match=r"2\.weight"):
        gossamer.Masked(masks).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_weights_of_our_own_methods_pass():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3))
    shared = gossamer.SharedWeights(gossamer.share_model(model, bits=2, include="0"))
    shared.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (found,) = access.derived(model)
    assert found.own
    assert "finish()" in found.fix
    assert "0.weight" in names.parameters(model)
    shared.finish()
    assert list(names.weights(model)) == ["0.weight", "1.weight_ih_l0", "1.weight_hh_l0"]


def test_a_constant_of_the_users_own_is_no_derived_weight():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(2, 2), torch.ones(2)

    assert access.derived(Scaled()) == []


@pytest.mark.parametrize("view", [lambda w: w.T, lambda w: w[:2], lambda w: w])
def test_weights_in_one_memory_are_refused(view):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight = nn.Parameter(view(model["a"].weight.detach()))
    with pytest.raises(ArgumentError, match=r"a\.weight lies in the same memory as b\.weight"):
        names.weights(model)
    assert list(names.weights(model, include="c")) == ["c.weight"]


def test_parts_of_one_flat_memory_that_do_not_meet_are_plain():
    flat = torch.zeros(18)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    for i, layer in enumerate(model.values()):
        layer.weight = nn.Parameter(flat[9 * i : 9 * i + 9].view(3, 3))
    assert access.aliases(model) == {}
    assert list(names.weights(model)) == ["a.weight", "b.weight"]


def test_tied_weights_are_one_object_and_pass():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert list(names.weights(model)) == ["a.weight"]
