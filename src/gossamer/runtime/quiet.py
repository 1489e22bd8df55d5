"""Other tools' chatter, kept off the console and kept for the error message."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["quiet", "reason"]

_MOST = 300  # characters of somebody else's message


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed, warned or logged inside; exceptions pass through as they are.

    The root logger has a handler of its own inside: ``logging.warning`` would give it one for good.
    """
    root, handler, level = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        root.removeHandler(handler)


def reason(error: BaseException) -> str:
    """The first line of the error at the bottom of a chain, with its kind.

    >>> reason(ValueError("no such thing\\nand more"))
    'ValueError: no such thing'
    """
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_MOST].rstrip(": ")
