"""The table of gradient codecs: how each is called, and how it is made from its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from gossamer.core.errors import ArgumentError
from gossamer.core.tables import Table
from gossamer.distribute.codecs.codec import GradCodec
from gossamer.distribute.codecs.dorefa import DoReFa
from gossamer.distribute.codecs.qsgd import QSGD
from gossamer.distribute.codecs.signsgd import SignSGD
from gossamer.distribute.codecs.sqm import SQm
from gossamer.distribute.codecs.terngrad import TernGrad

__all__ = ["CODECS", "Family", "by_name"]


@dataclass(frozen=True)
class Family:
    """Codecs of one class.

    Attributes:
        make: the class, called with the numbers in the name.
        pattern: a regular expression of the names; its groups are those numbers.
        names: the same in words.
    """

    make: Callable[..., GradCodec]
    pattern: str
    names: str


CODECS: Table[Family] = Table(
    "gradient codec",
    {
        "terngrad": Family(TernGrad, r"terngrad", "terngrad"),
        "sq": Family(SQm, r"sq([2-8])", "sq2 to sq8"),
        "qsgd": Family(QSGD, r"qsgd-(\d+)", "qsgd-<steps>"),
        "signsgd": Family(SignSGD, r"signsgd", "signsgd"),
        "dorefa": Family(DoReFa, r"dorefa-([1-8])", "dorefa-1 to dorefa-8"),
    },
)


def by_name(name: str, **settings: object) -> GradCodec:
    """The codec called ``terngrad``, ``sq2`` .. ``sq8``, ``qsgd-<s>``, ``signsgd``, ``dorefa-<k>``.

    ``settings`` are the class's further ones (``clip``, ``scaler``, ``bucket``).
    Raises :class:`ArgumentError` for another name.

    >>> by_name("sq4", clip=3.0)
    SQm(bits=4, clip=3.0, scaler='max')
    """
    for family in CODECS.values() if isinstance(name, str) else ():
        if match := re.fullmatch(family.pattern, name, re.ASCII):
            numbers = [int(number) for number in match.groups()]
            takes = inspect.signature(family.make)
            try:
                takes.bind(*numbers, **settings)
            except TypeError as e:
                raise ArgumentError(f"codec {name!r}: {e}; it takes {takes}") from e
            return family.make(*numbers, **settings)
    known = ", ".join(family.names for family in CODECS.values())
    raise ArgumentError(f"codec {name!r} is not one of {known}")
