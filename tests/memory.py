"""What tests of memory share."""

import tracemalloc
from collections.abc import Callable
from typing import Any


def peak_of(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives, and the most bytes that it held of Python's and numpy's memory."""
    tracemalloc.start()
    try:
        found = call()
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
