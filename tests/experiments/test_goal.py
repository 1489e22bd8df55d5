"""Claims of runs that are told a size."""

from typing import Any

import pytest

from gossamer.experiments.goal import lenets, set_point

RUN = {"seconds": 10.0, "bytes": 9000, "validation": 97.0, "accuracy": 97.5, "price": 1e-5}


def holds(claims: list[Any]) -> list[bool]:
    return [claim.holds for claim in claims]


def judged(**sized: float) -> list[bool]:
    row = {**RUN, "most": 10_000, "bytes": 9_900, "seconds": 14.0, "accuracy": 97.4, **sized}
    grid = [
        RUN,
        {**RUN, "bytes": 9999, "validation": 98.0, "accuracy": 97.6},  # the best that fits
        {**RUN, "bytes": 9998, "validation": 97.9, "accuracy": 99.0},  # better on test images only
        {**RUN, "bytes": 12_000, "validation": 99.0, "accuracy": 99.0},  # too large
    ]
    return holds(set_point._judge({"plain": RUN, "grid": grid, "sized": [row]}))


def test_a_sized_run_is_compared_with_the_best_by_validation_that_is_small_enough() -> None:
    assert judged() == [True, True, True, True]
    assert judged(accuracy=97.3) == [True, True, True, False]
    assert judged(seconds=16.0) == [True, True, False, True]
    assert judged(bytes=9_700) == [True, False, True, True]
    assert judged(bytes=10_001) == [False, True, True, True]


@pytest.mark.parametrize(("size", "error", "found"), [
    (8000, 1.7, [True, True]), (8001, 1.6, [False, True]), (7900, 1.71, [True, False]),
])  # fmt: skip
def test_a_goal_is_of_the_largest_file_and_of_the_mean_error(
    size: float, error: float, found: list[bool]
) -> None:
    row = {"bytes": {"max": size, "mean": 100}, "error_after": {"mean": error}}
    assert holds(lenets._judge({"summary": {"lenet-300-100-sized": row}})) == found
