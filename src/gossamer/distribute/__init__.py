"""Gradients of a few bits between machines: codecs.

>>> import torch
>>> g = torch.randn(1000, generator=torch.Generator().manual_seed(0))
>>> codec = by_name("terngrad")
>>> payload = codec.encode(g, codec.scale(g), Key(0, 0, 0, parameter_hash("fc.weight")))
>>> payload.numel(), codec.decode(payload, codec.scale(g), 1000).unique().numel()
(256, 3)
"""

from __future__ import annotations

import re
from collections.abc import Callable

from gossamer.core.errors import ArgumentError
from gossamer.distribute.codecs.codec import GradCodec, backend, clip_slope
from gossamer.distribute.codecs.dorefa import DoReFa
from gossamer.distribute.codecs.feedback import ErrorFeedback
from gossamer.distribute.codecs.qsgd import QSGD
from gossamer.distribute.codecs.random import Key, dither_shift, parameter_hash
from gossamer.distribute.codecs.signsgd import SignSGD
from gossamer.distribute.codecs.sqm import SQm
from gossamer.distribute.codecs.terngrad import TernGrad
from gossamer.distribute.ddp.hook import GradientExchange, exchange_hook
from gossamer.distribute.ddp.processes import Processes
from gossamer.distribute.exchange.average import Plan, exchange, simulate
from gossamer.distribute.exchange.group import Distributed
from gossamer.distribute.wire.planes import FORMS, Form

__all__ = [
    "FORMS",
    "QSGD",
    "Distributed",
    "DoReFa",
    "ErrorFeedback",
    "Form",
    "GradCodec",
    "GradientExchange",
    "Key",
    "Plan",
    "Processes",
    "SQm",
    "SignSGD",
    "TernGrad",
    "backend",
    "by_name",
    "clip_slope",
    "dither_shift",
    "exchange",
    "exchange_hook",
    "parameter_hash",
    "simulate",
]

_NAMES: tuple[tuple[str, Callable[..., GradCodec]], ...] = (
    (r"terngrad", TernGrad),
    (r"sq([2-8])", SQm),
    (r"qsgd-(\d+)", QSGD),
    (r"signsgd", SignSGD),
    (r"dorefa-([1-8])", DoReFa),
)


def by_name(name: str, **settings: object) -> GradCodec:
    """The codec called ``terngrad``, ``sq2`` .. ``sq8``, ``qsgd-<s>``, ``signsgd``, ``dorefa-<k>``.

    ``settings`` are the class's further ones (``clip``, ``scaler``, ``bucket``).
    Raises :class:`ArgumentError` for another name.

    >>> by_name("sq4", clip=3.0)
    SQm(bits=4, clip=3.0, scaler='max')
    """
    for pattern, make in _NAMES:
        if match := re.fullmatch(pattern, name):
            return make(*(int(number) for number in match.groups()), **settings)
    raise ArgumentError(
        f"codec {name!r} is not one of terngrad, sq2 to sq8, qsgd-<steps>, signsgd, "
        "dorefa-1 to dorefa-8"
    )
