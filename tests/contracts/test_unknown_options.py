"""A name that nothing knows is refused; it never means the last of the choices."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.compression.stage import STAGES
from gossamer.core.budgets import apportion
from gossamer.core.errors import ArgumentError, one_of
from gossamer.distribute.codecs import scales
from gossamer.distribute.wire import planes
from gossamer.experiments.lottery_ticket import lottery
from gossamer.experiments.magnitude_pruning import magnitude
from gossamer.experiments.obd import obd
from gossamer.experiments.sparse_momentum import sparse_cifar
from gossamer.experiments.ttq import ttq
from gossamer.prune.scores import SCORES
from gossamer.quantize import levels
from gossamer.quantize.fewbits import QUANTIZERS

ONE = torch.ones(1)
BAD: Any = "magnitud"


def test_the_error_names_argument_value_and_choices() -> None:
    one_of("how", "b", ("a", "b"))
    with pytest.raises(ArgumentError, match=r"^how='c' is not one of 'a', 'b'$"):
        one_of("how", "c", ("a", "b"))
    with pytest.raises(ArgumentError, match=r"how=None"):
        one_of("how", None, iter("ab"))


CALLS: dict[str, Any] = {
    "overflow": lambda: apportion({"a": 1.0}, 1, {"a": 1}, overflow=BAD),
    "form": lambda: levels.codes(ONE, 2, 1.0, form=BAD),
    "form, packed": lambda: planes.pack(ONE.int(), ONE < 0, 1, BAD),
    "form, unpacked": lambda: planes.unpack(ONE.to(torch.uint8), 1, 1, BAD),
    "scaler": lambda: scales.clipped_scale(ONE, 2.5, BAD),
    "how": lambda: obd._scores(nn.Linear(2, 2), SimpleNamespace(), BAD, 0, 1),  # type: ignore[arg-type]
    "way": lambda: sparse_cifar.one(BAD, 0, Path(), True),
    "way, control": lambda: lottery.control("lenet-300-100", BAD, 1, 0, Path(), True),
    "kind": lambda: ttq.quantizer(BAD, {}),
    "optimizer": lambda: magnitude.nonzero_after(BAD, 0, True),
    "levels": lambda: QUANTIZERS["laq"].build(
        ["a"], bits=3, levels=BAD, scales=1, beta=None, clip=0.0, trained=False
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_an_unknown_name_is_refused_by_name(what: str) -> None:
    with pytest.raises(ArgumentError, match=f"{what.split(',')[0]}='magnitud' is not one of '?"):
        CALLS[what]()


@pytest.mark.parametrize("table", [SCORES, QUANTIZERS, STAGES], ids=lambda t: t.kind)
def test_a_table_refuses_what_it_does_not_hold(table: Any) -> None:
    first = next(iter(table))
    with pytest.raises(ArgumentError, match=rf"{table.kind} '{first}x' .*did you mean '{first}'"):
        table[f"{first}x"]
    with pytest.raises(ArgumentError, match="is there already"):
        table.register(first, object())
