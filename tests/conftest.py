"""Settings of all tests."""

import pytest
import torch
from hypothesis import settings

# Machines are noisy: a slow example is no failure.
settings.register_profile("gossamer", deadline=None)
settings.load_profile("gossamer")


@pytest.fixture
def one_thread():
    """One torch thread: what a process of its own, with one thread, is compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
