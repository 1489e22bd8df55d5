"""The price of a bit, steered so that the file ends at a size that was asked for.

Rate control as encoders of video do it, on the Lagrangian of entropy-constrained quantization
(Chou, Lookabaugh, Gray 1989): the price is the multiplier of a constraint on bytes. The size is to
fall geometrically from what it is at first to the target, and to stay there; the logarithm of the
price follows the logarithm of size over wanted size, a part at once and a part summed up over the
training (a PI controller). What the price has not brought about yet, or cannot, is cut: codes
nearest to zero's cell are zero, and the network trains on without them, until they grow. Sizes are
a real packer's; between two of its looks the entropy of the codes tells the change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gossamer.core.errors import ArgumentError

if TYPE_CHECKING:
    from gossamer.quantize.rate_aware import RateAware

__all__ = ["SetPoint"]

_SETTLED = 0.6  # of the training: from here on the size is to be the target
_HELD = 0.95  # from here on the price stays: what moves so late is noise
_AT_ONCE, _SUMMED = 10.0, 150.0
_WIDEST = math.log(1e4)  # of the price, from what it began with
_STRONGEST = 1.0  # of what the loss pulls with: a higher price throws weights about
_KEPT = 0.9  # of the running mean of that
_UPDATES, _CUTS = 400, 24  # of a training: of the price, of the border
_LOOKS = (0.25, 0.5, 0.65, 0.8, 0.9)  # where in a training a real packer is asked
_FARTHEST = 64.0  # steps from zero that the last cut may take
_LOWEST = 0.1  # below it nothing is cut that the grid does not
_EXACT = 0.995  # of the target: the last cut is near enough
_HALVES = 13
_LEAST = 1e-7  # a price to begin with, where none is given


class SetPoint:
    """What sets the price of :class:`~gossamer.quantize.RateAware` so that a file has a size.

    Given as its ``control``. The price that the method was made with is where the search begins.

    Args:
        most: bytes.
        measured: the bytes of the file as the network is now.
        steps: optimizer steps of the training.

    Raises :class:`ArgumentError` for sizes or steps below 1.
    """

    def __init__(self, most: int, measured: Callable[[], int], *, steps: int) -> None:
        if most < 1 or steps < 1:
            raise ArgumentError(f"most={most} (bytes) and steps={steps} must be at least 1")
        self.most, self.measured, self.steps = most, measured, steps
        self._first = 0.0  # the price at the start
        self._count = self._looks = 0
        self._summed = 0.0
        self._looked: tuple[int, float] | None = None  # bytes, and bits of all codes then
        self._start = float(most)
        self._level = 0.0  # the price that pulls as the loss does

    def step(self, method: RateAware) -> None:
        """Look at the size, set the price, and cut; before each step, with the loss's gradients."""
        self._first = self._first or max(method.lam, _LEAST)
        done, count = self._count / self.steps, self._count
        self._count += 1
        if done >= _HELD or count % max(1, self.steps // _UPDATES):
            return
        if self._looked is None:  # the entropy will do for where to begin
            bits = method.bits()
            self._looked = int(bits / 8), bits
            self._start = max(bits / 8, float(self.most))
        elif self._looks < len(_LOOKS) and done >= _LOOKS[self._looks]:
            self._looks += 1
            self._looked = self.measured(), method.bits()
        left = max(0.0, 1 - done / _SETTLED)
        wanted = self.most * (self._start / self.most) ** left
        size = self._size(method, 0.0)
        off = math.log(size / wanted)
        if size > self.most:  # ahead of its time, and still too large: no reason to pay less
            off = max(off, 0.0)
        now = method.level()
        self._level = _KEPT * self._level + (1 - _KEPT) * now if self._level else now
        most = math.log(max(_STRONGEST * self._level, _LEAST) / self._first)
        self._summed += _SUMMED * off * max(1, self.steps // _UPDATES) / self.steps
        self._summed = min(max(self._summed, -_WIDEST), most)
        power = min(max(_AT_ONCE * off + self._summed, -_WIDEST), most)
        method.lam = self._first * math.exp(power)
        if count % max(1, self.steps // _CUTS) == 0:
            method.cut(self._border(method, wanted))

    def _size(self, method: RateAware, border: float) -> float:
        """Bytes of the file, were codes cut there."""
        assert self._looked is not None
        at, then = self._looked
        return max(1.0, at + (method.bits(border) - then) / 8)

    def _border(self, method: RateAware, wanted: float) -> float:
        """Where to cut, so that the file has the wanted size; 0 where it has."""
        low, high = 0.0, _FARTHEST
        if self._size(method, low) <= wanted:
            return low
        for _ in range(_HALVES):
            middle = (low + high) / 2
            fits = self._size(method, middle) <= wanted
            low, high = (low, middle) if fits else (middle, high)
        return high

    def state(self) -> dict[str, Any]:
        """Where it stands, as plain values."""
        return {
            "count": self._count, "first": self._first, "summed": self._summed,
            "start": self._start, "looks": self._looks, "looked": self._looked,
            "level": self._level,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` stood."""
        self._count, self._first = int(state["count"]), float(state["first"])
        self._summed, self._start = float(state["summed"]), float(state["start"])
        self._looks, self._looked = int(state["looks"]), state["looked"]
        self._level = float(state["level"])

    def fit(self, method: RateAware, *, tries: int = 14) -> int:
        """After the training: cut as few codes as bring the file to its size; its bytes.

        The border is looked for near where training has left it first. Where none is far enough,
        the farthest is taken.
        """
        low, high, least = 0.0, _FARTHEST, None
        border, part = method.border, 1 / 32
        for _ in range(tries):
            method.cut(border)
            size = self.measured()
            if size <= self.most:
                high, least = border, size
                if border == 0 or size >= _EXACT * self.most:
                    break
            else:
                low = border
            if least is None:
                border = min(max(border, 0.5) * (1 + part), _FARTHEST)
            elif low == 0:
                border = high * (1 - part) if high > _LOWEST else 0.0
            else:
                border = (low + high) / 2
            part *= 2
        method.cut(high)
        return self.measured() if least is None else least
