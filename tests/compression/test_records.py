"""What a file says of changed modules: exact names, bounded sizes, and all or nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.compression import records
from gossamer.core.errors import ArgumentError, FormatError, GossamerError
from gossamer.pack import pack_bytes
from gossamer.quantize.steps import read
from gossamer.structure import fold_batchnorm


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )


ACTIVATIONS = {
    "kind": "activations", "bits": 4, "estimator": "clipped", "form": "round", "learned": False,
    "functional": False, "layers": ["1"],
}  # fmt: skip


def on_grid(**changed: Any) -> dict[str, Any]:
    program = read(fold_batchnorm(conv().eval()))
    genuine = {
        "kind": "fixed-point",
        "bits": 8,
        "data": {s.name: 4 for s in program.steps},
        "layers": {n: [8, 6, 8, 6] for n in program.weights},
        "shape": [1, 12, 12],
    }
    return {**genuine, **changed}


def ranks(found: dict[str, int]) -> dict[str, Any]:
    return {"kind": "low-rank", "ranks": found}


def untouched(model: nn.Module, record: Any) -> GossamerError:
    """Load a file with this record: it must fail, and leave the model as it was."""
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    records = record if isinstance(record, list) else [record]
    with pytest.raises(GossamerError) as e:
        gossamer.load(pack_bytes(model, metadata={"structure": records}), model)
    assert [type(m) for m in model.modules()] == [type(m) for m in modules]
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    return e.value


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (ranks({"0": 10**8}), "rank 100000000: two such layers are no smaller"),
        (ranks({"0": 2**63}), "no smaller"),
        (ranks({"0": 10**40}), "no smaller"),
        (ranks({"": 2}), "no layer ''"),
        (ranks({"0.": 2}), "no layer '0.'"),
        (ranks({"1": 1}), "'1' is ReLU"),
        (ranks({"re:.*": 1}), "no layer 're:"),
        (ranks({}), "ranks"),
        (ranks({"0" + ".0" * i: 1 for i in range(1200)}), "'0.0' of 4 x 1"),
        ([ranks({"0": 1})] * 65, "at most 64"),
        ([ACTIVATIONS, ACTIVATIONS], "no activation '1'"),
        ({**ACTIVATIONS, "layers": []}, "layers"),
        ({**ACTIVATIONS, "layers": ["re:(\\w+\\.?)+!"]}, "no activation 're:"),
        ({**ACTIVATIONS, "layers": ["re:" + "(" * 3000]}, "no activation 're:"),
        ({**ACTIVATIONS, "layers": ["*"]}, "no activation '*'"),
        ({**ACTIVATIONS, "layers": ["1*"]}, "no activation '1*'"),
        ({"kind": "os.system", "ranks": {}}, "structure is damaged"),
        ("x", "structure is damaged"),
        ([[[[]]]], "structure is damaged"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_before_anything_is_built(
    record: Any, error: str
) -> None:
    assert error in str(untouched(net(), record))


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"shape": [1, 2**62, 2**62]}, "shape"),
        ({"shape": [10**30]}, "shape"),
        ({"shape": []}, "shape"),
        ({"shape": [1] * 1000}, "shape"),
        ({"shape": [1, 1, 1]}, "does not take an input of shape (1, 1, 1)"),
        ({"shape": [7]}, "does not take an input of shape (7,)"),
        ({"data": {"x": 4}}, "is not the one that was put on grids"),
    ],
)
def test_a_fixed_point_record_that_does_not_fit_is_refused(
    changed: dict[str, Any], error: str
) -> None:
    assert error in str(untouched(conv(), on_grid(**changed)))


def test_a_shape_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocated(*size: Any, **options: Any) -> Any:
        assert options.get("device") in ("meta", torch.device("meta")), size
        return made(*size, **options)

    made = torch.ones
    monkeypatch.setattr(torch, "ones", allocated)
    monkeypatch.setattr(torch, "zeros", allocated)
    record = records.parse([on_grid(shape=[1, 10**6, 10**6])])
    model = records.rebuild(conv().eval(), record)
    assert (2, 10**6 - 2, 10**6 - 2) in model.net().shapes.values()


@pytest.mark.parametrize(
    ("make", "record"),
    [(net, ranks({"0": 1})), (net, ACTIVATIONS), (conv, on_grid())],
)
def test_a_file_that_does_not_fit_leaves_the_modules_as_they_were(
    make: Callable[[], nn.Module], record: dict[str, Any]
) -> None:
    model = make()
    modules = list(model.modules())
    data = pack_bytes({"other": torch.ones(3)}, metadata={"structure": [record]})
    with pytest.raises(ArgumentError, match="Nothing was changed"):
        gossamer.load(data, model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_a_genuine_record_still_loads() -> None:
    model = net()
    packed = records.rebuild(copy.deepcopy(model), records.parse([ACTIVATIONS]))
    loaded = gossamer.load(pack_bytes(packed, metadata={"structure": [ACTIVATIONS]}), model)
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), packed(x))
    assert loaded is model


def test_a_section_that_fails_midway_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.pack import Archive

    real = Archive.read_into

    def fails(self: Archive, name: str, target: torch.Tensor) -> None:
        if name == "2.weight":
            raise FormatError("section 2 is hostile")
        real(self, name, target)

    monkeypatch.setattr(Archive, "read_into", fails)
    with pytest.raises(FormatError, match=r"hostile\. 2 of the model's 4 tensors"):
        gossamer.load(pack_bytes(net()), net())
