"""Gradients of a few bits between machines: codecs.

>>> import torch
>>> g = torch.randn(1000, generator=torch.Generator().manual_seed(0))
>>> codec = by_name("terngrad")
>>> payload = codec.encode(g, codec.scale(g), Key(0, 0, 0, parameter_hash("fc.weight")))
>>> payload.numel(), codec.decode(payload, codec.scale(g), 1000).unique().numel()
(256, 3)
"""

from __future__ import annotations

from gossamer.distribute.codecs.codec import GradCodec, backend, clip_slope
from gossamer.distribute.codecs.dorefa import DoReFa
from gossamer.distribute.codecs.feedback import ErrorFeedback
from gossamer.distribute.codecs.qsgd import QSGD
from gossamer.distribute.codecs.random import Key, dither_shift, parameter_hash
from gossamer.distribute.codecs.signsgd import SignSGD
from gossamer.distribute.codecs.sqm import SQm
from gossamer.distribute.codecs.table import CODECS, Family, by_name
from gossamer.distribute.codecs.terngrad import TernGrad
from gossamer.distribute.ddp.hook import GradientExchange, exchange_hook
from gossamer.distribute.ddp.processes import Processes
from gossamer.distribute.exchange.average import Plan, exchange, simulate
from gossamer.distribute.exchange.group import Distributed
from gossamer.distribute.wire.planes import FORMS, Form

__all__ = [
    "CODECS",
    "FORMS",
    "QSGD",
    "Distributed",
    "DoReFa",
    "ErrorFeedback",
    "Family",
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
