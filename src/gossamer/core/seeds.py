"""Initial weights that a seed of 64 bits gives again, bit for bit, anywhere.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011)
counts: element i of a stream is word ``i mod 4`` of the block with counter ``(i // 4, stream)`` and
key ``seed``, each 64 bits, low word first. A word x becomes ``u = (2 x + 1) / 2**33``, never 0, 1/2
or 1, and from there

- ``uniform``: ``2 u - 1``,
- ``signed_constant``: 1 with the sign of ``2 u - 1``,
- ``normal``: the inverse of the normal distribution at u (Wichura, *Algorithm AS 241*, Applied
  Statistics 37, 1988, routine PPND16; accurate to about 1e-15).

All in double precision with nothing but IEEE 754's exactly rounded ``+ - * / sqrt``, one numpy call
each, so that no compiler contracts two of them and no library's logarithm is involved; then times
``scale``, rounded once to float32; then times ``factor`` in float32, unless that is 1. Neither
torch's nor numpy's own generators are used, as they may change. The same text with every constant
is in ``docs/format.md``: files store seeds in place of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError

__all__ = [
    "FACTORS",
    "SCALES",
    "SCHEMES",
    "Seed",
    "check_seedable",
    "fill",
    "init_",
    "inverse_normal",
    "philox",
]

Scheme = Literal["normal", "uniform", "signed_constant"]

SCHEMES: tuple[Scheme, ...] = ("normal", "uniform", "signed_constant")
"""What a word becomes; a scheme's place here is its number in files."""

SCALES = (2.0**-64, 2.0**64)
"""Bounds on a scale; within them and those of a factor every value is non-zero and normal."""

FACTORS = (2.0**-24, 2.0**24)
"""Bounds on a factor."""

_CHUNK = 1 << 14  # elements at a time: the intermediate arrays stay in cache
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85

_A = (
    3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
    1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
    3.3430575583588128105e4, 2.5090809287301226727e3,
)  # fmt: skip
_B = (
    1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
    5.2264952788528545610e3,
)  # fmt: skip
_C = (
    1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
    3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
    2.27238449892691845833e-2, 7.74545014278341407640e-4,
)  # fmt: skip
_D = (
    1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
    1.05075007164441684324e-9,
)  # fmt: skip
_LN2 = 0.6931471805599453  # the double nearest to log 2
_ROOT = 0.7071067811865476  # the double nearest to sqrt(1/2)
_ODD = tuple(1.0 / (2 * k + 1) for k in range(12))  # of artanh's series

Doubles = NDArray[np.float64]


def philox(counter: Sequence[NDArray[np.uint64]], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32 of ten rounds: four arrays of 32-bit counter words, low first, to ``(n, 4)``.

    >>> one = [np.zeros(1, np.uint64)] * 4
    >>> [hex(word) for word in philox(one, (0, 0))[0].tolist()]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0, k1 = (np.uint64(k + turn * w & 0xFFFFFFFF) for k, w in zip(key, _WEYL, strict=True))
        one, two = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = two >> _HALF ^ c1 ^ k0, two & _LOW, one >> _HALF ^ c3 ^ k1, one & _LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def _polynomial(coefficients: Sequence[float], x: Doubles) -> Doubles:
    """Horner's rule, the highest power first."""
    out = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        out *= x
        out += c
    return out


def _log(x: Doubles) -> Doubles:
    """The natural logarithm of positive, normal numbers, to about 1e-16 relative below 0.1."""
    m, e = np.frexp(x)
    small = m < _ROOT
    m = np.where(small, m + m, m)
    s = (m - 1.0) / (m + 1.0)
    series = _polynomial(_ODD, s * s)
    return (s + s) * series + (e - small) * _LN2


def inverse_normal(u: Doubles) -> Doubles:
    """Where the normal distribution reaches ``u``, for u from 2**-33 to 1 - 2**-33.

    >>> inverse_normal(np.array([0.5, 0.975])).round(6).tolist()
    [0.0, 1.959964]
    """
    q = u - 0.5
    tail = np.abs(q) > 0.425
    r = 0.180625 - q * q
    out: Doubles = q * _polynomial(_A, r) / _polynomial(_B, r)
    side = q[tail]
    p = np.minimum(u[tail], 1.0 - u[tail])
    r = np.sqrt(-_log(p)) - 1.6
    out[tail] = np.copysign(_polynomial(_C, r) / _polynomial(_D, r), side)
    return out


@dataclass(frozen=True)
class Seed:
    """One tensor's initial values, as few numbers.

    Attributes:
        scheme: of :data:`SCHEMES`.
        seed: 64 bits.
        stream: tells the tensors of a network apart, below 2**63.
        scale: standard deviation of ``normal``, bound of ``uniform``, magnitude of
            ``signed_constant``; rounded to float32, within :data:`SCALES`.
        factor: multiplies the float32 values, such as a supermask's elements over those kept;
            rounded to float32, within :data:`FACTORS`.

    Raises :class:`ArgumentError` for anything else.

    >>> Seed("signed_constant", seed=2, stream=0, scale=0.5).values((4,))
    tensor([-0.5000, -0.5000,  0.5000, -0.5000])
    """

    scheme: Scheme
    seed: int
    stream: int
    scale: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        """Check, and round scale and factor to float32."""
        if self.scheme not in SCHEMES:
            raise ArgumentError(f"scheme {self.scheme!r} is not one of {', '.join(SCHEMES)}")
        for name, bits in (("seed", 64), ("stream", 63)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < 1 << bits:
                raise ArgumentError(
                    f"{name}={value!r} must be a whole number from 0, below 2**{bits}"
                )
        for name, (low, high) in (("scale", SCALES), ("factor", FACTORS)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ArgumentError(
                    f"{name}={value} is outside 2**{math.log2(low):.0f} to 2**{math.log2(high):.0f}"
                )
            object.__setattr__(self, name, float(np.float32(value)))

    def values(self, shape: Sequence[int]) -> Tensor:
        """The values as a float32 tensor of ``shape``, in C order."""
        out = np.empty(math.prod(shape), np.float32)
        fill(self, out)
        return torch.from_numpy(out).reshape(tuple(shape))

    def gives(self, tensor: Tensor) -> bool:
        """Whether every non-zero entry of the tensor is this seed's, bit for bit."""
        if tensor.dtype != torch.float32:
            return False
        made = self.values(tensor.shape).to(tensor.device).view(torch.int32)
        bits = tensor.contiguous().view(torch.int32)
        return bool(((bits == 0) | (bits == made)).all())


def fill(seed: Seed, out: NDArray[np.float32]) -> None:
    """Write the first ``len(out)`` values of a seed into a flat float32 array."""
    key = seed.seed & 0xFFFFFFFF, seed.seed >> 32
    stream = [np.uint64(seed.stream & 0xFFFFFFFF), np.uint64(seed.stream >> 32)]
    for start in range(0, len(out), _CHUNK):
        part = out[start : start + _CHUNK]
        block = np.arange(start // 4, (start + len(part) + 3) // 4, dtype=np.uint64)
        counter = [block & _LOW, block >> _HALF, *(np.full_like(block, s) for s in stream)]
        word = philox(counter, key).reshape(-1)[: len(part)].astype(np.float64)
        u = (word + word + 1.0) * 2.0**-33
        if seed.scheme == "normal":
            value = inverse_normal(u)
        elif seed.scheme == "uniform":
            value = u + u - 1.0
        else:
            value = np.where(u < 0.5, -1.0, 1.0)
        part[:] = value * seed.scale  # rounded to float32 here
        if seed.factor != 1.0:
            part *= np.float32(seed.factor)


def check_seedable(name: str, weight: Tensor) -> None:
    """Raise :class:`ArgumentError` for a weight that no seed gives."""
    if weight.dtype != torch.float32 or weight.ndim < 2 or not weight.numel():
        raise ArgumentError(
            f"{name} is {weight.dtype} of shape {tuple(weight.shape)}; a seed gives float32 of two "
            "dimensions or more: exclude it"
        )


@torch.no_grad()
def init_(
    model: nn.Module,
    seed: int,
    *,
    scheme: Scheme = "normal",
    fan: Literal["glorot", "kaiming"] = "glorot",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> dict[str, Seed]:
    """Initialise a model's weights from a seed, in place; their biases become zero.

    Every compressible weight (:func:`gossamer.core.names.weights`) gets the standard deviation
    ``sqrt(2 / (fan_in + fan_out))`` (``glorot``) or ``sqrt(2 / fan_in)`` (``kaiming``), whatever
    the scheme; its stream is its number among them.

    Returns clean name -> :class:`Seed`, for :func:`gossamer.pack.pack`.
    Raises :class:`ArgumentError` for an unknown scheme or fan, a model without weights, or
    weights that are not float32, with nothing changed.

    >>> net = nn.Linear(3, 2)
    >>> init_(net, 7)["weight"].scale == float(np.float32(math.sqrt(2 / 5)))
    True
    """
    if fan not in ("glorot", "kaiming"):
        raise ArgumentError(f"fan {fan!r} is not one of 'glorot', 'kaiming'")
    weights = names.weights(model, include=include, exclude=exclude)
    if not weights:
        raise ArgumentError("the model has no weight to initialise; name some with include=")
    seeds: dict[str, Seed] = {}
    for stream, (name, p) in enumerate(weights.items()):
        check_seedable(name, p)
        into, out = p[0].numel(), p.numel() // p.shape[1]
        deviation = math.sqrt(2 / (into + out if fan == "glorot" else into))
        bound = math.sqrt(3) * deviation if scheme == "uniform" else deviation
        seeds[name] = Seed(scheme, seed, stream, bound)
    chosen = {id(p) for p in weights.values()}
    for name, p in weights.items():
        p.copy_(seeds[name].values(p.shape))
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if any(id(p) in chosen for p in own.values()):
            for attribute, p in own.items():
                if "bias" in attribute:
                    p.zero_()
    return seeds
