"""What is no gradient, no codec and no setting is told by name, before anything is exchanged."""

from typing import Any

import pytest
import torch

from gossamer.core.errors import ArgumentError
from gossamer.distribute import QSGD, ErrorFeedback, TernGrad, by_name, exchange, simulate


@pytest.mark.parametrize(
    ("gradients", "words"),
    [
        ({"w": torch.ones(3)}, "one mapping a rank"),  # of one rank, without a list around it
        ([torch.ones(3)], "one mapping a rank"),
        ([{"w": torch.ones(3)}, {"w": None}], "the gradient of w is None"),
        ([{"w": torch.eye(3).to_sparse()}] * 2, "w is sparse"),
    ],
)
def test_what_is_no_gradient_is_told(gradients: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        simulate(gradients, TernGrad(), step=0)


def test_one_rank_alone_is_told_too() -> None:
    with pytest.raises(ArgumentError, match="no mapping of names"):
        exchange([torch.ones(3)], TernGrad(), step=0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="the gradient of w is None"):
        exchange({"w": None}, TernGrad(), step=0)  # type: ignore[dict-item]


def test_two_ranks_do_not_share_their_errors() -> None:
    one, given = ErrorFeedback(), [{"w": torch.ones(2000)}, {"w": torch.ones(2000)}]
    with pytest.raises(ArgumentError, match="one a rank, of its own"):
        simulate(given, TernGrad(), step=0, feedback=[one, one])
    assert not one.errors


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (None, {}, "codec None is not one of"),
        ("sq9", {}, "codec 'sq9' is not one of"),
        ("qsgd-\u0663", {}, "is not one of"),
        ("terngrad", {"steps": 1}, "unexpected keyword argument 'steps'; it takes"),
        ("terngrad", {"clip": "2"}, "clip='2' must lie above 0"),
        ("qsgd-4", {"bucket": 64.0}, r"bucket=64\.0 must be a multiple of 64"),
    ],
)
def test_names_and_settings_of_codecs(name: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        by_name(name, **settings)
    assert by_name("qsgd-4", bucket=64) == QSGD(4, bucket=64)
