"""Settings of all tests: no test's name, order or verdict depends on the clock or on chance."""

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples each time, and none refused for the time it took: machines are busy.
settings.register_profile(
    "gossamer",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gossamer")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--order",
        default="written",
        help="written, reversed, or shuffled:SEED: the order in which tests run",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    how, _, seed = config.getoption("--order").partition(":")
    if how == "reversed":
        items.reverse()
    elif how == "shuffled":
        random.Random(int(seed)).shuffle(items)
    elif how != "written":
        raise pytest.UsageError(f"--order {how!r} is not written, reversed or shuffled:SEED")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    # Bytes name no test: a compressed stream holds the time of day, and then two workers
    # collect different tests.
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries draw from it)
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """One torch thread: what a process of its own, with one thread, is compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
