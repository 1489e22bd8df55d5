"""TernGrad, what must be exact: no bias, the published figures of clipping, bytes, round trips.

Wen et al., NeurIPS 2017. Bytes here are those of payloads; what a socket carries is measured by
the exchange's own experiment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.distribute import SQm, TernGrad
from gossamer.distribute.codecs.codec import GradCodec
from gossamer.distribute.codecs.random import Key
from gossamer.experiments import Claim, Context, experiment, spread

__all__ = ["exact", "unbiased"]

PAGE = "terngrad"
ELEMENTS = 64  # whose means are looked at one by one


def unbiased(codec: GradCodec, draws: int, seed: int) -> dict[str, Any]:
    """Means and squares of ``draws`` draws of one Gaussian vector, against what they must be.

    One long tensor repeats the vector, so that every element is drawn by its own place and step.
    """
    gen = torch.Generator().manual_seed(seed)
    g = torch.randn(ELEMENTS, generator=gen)
    scale = codec.scale(g)
    repeats = min(draws, 1000)
    long = g.repeat(repeats)
    total = torch.zeros(ELEMENTS, dtype=torch.float64)
    squares = torch.zeros_like(total)
    steps = draws // repeats
    for step in range(steps):
        payload = codec.encode(long, scale, Key(seed, step, 0, 1))
        q = codec.decode(payload, scale, len(long)).double().reshape(repeats, ELEMENTS)
        total += q.sum(0)
        squares += q.square().sum(0)
    count = steps * repeats
    kept = g.double().clamp(-float(scale), float(scale))
    # of a draw between two levels, at part f of the way: unit^2 f (1 - f)
    unit = float(scale) / codec.levels
    part = (kept.abs() / unit).frac()
    error = unit * (part * (1 - part) / count).sqrt()
    # where the rarer level comes up 30 times, its count is nearly normal
    often = part * (1 - part) * count > 30
    off = total / count - kept
    z = off[often] / error[often]
    return {
        "draws": count,
        "elements": len(z),
        "largest_deviation_in_standard_errors": float(z.abs().max()),
        "mean_square_deviation": float(z.square().mean()),
        "largest_deviation_of_others_in_levels": float((off * ~often).abs().max()) / unit,
        "length_over_expected": float(squares.sum() / count)
        / float(scale.double() * kept.abs().sum()),
        "error_over_bound": float(((squares / count) - kept.square()).sum())
        / float(unit * kept.abs().sum()),
    }


def clipping(elements: int, clip: float, seed: int) -> dict[str, float]:
    """Zeros, length and angle after clipping a Gaussian gradient at ``clip`` sigma, and ternary."""
    g = torch.randn(elements, generator=torch.Generator().manual_seed(seed))
    codec = TernGrad(clip=clip)
    scale = codec.scale(g)
    q = codec.decode(codec.encode(g, scale, Key(seed, 0, 0, 1), form="sparse"), scale, elements,
                     form="sparse")  # fmt: skip
    clipped = g.clamp(-scale, scale).double()
    g = g.double()
    cosine = float((g @ clipped) / (g.norm() * clipped.norm()))
    return {
        "zeros": float((q == 0).double().mean()),
        "length": float(clipped.norm() / g.norm()) - 1,
        "angle": math.degrees(math.acos(cosine)),
        "slope": float((g @ clipped) / (g @ g)),
        "slope_of_draw": float((g @ q.double()) / (g @ g)),
    }


def sizes(elements: int, seed: int) -> tuple[dict[str, float], int]:
    """float32 bytes over payload bytes of each form, and codes that did not come back."""
    codec, lost = TernGrad(), 0
    ratios: dict[str, float] = {}
    for n in (*range(1, 10), 63, 64, 65, 319, 320, 321, elements):
        g = torch.randn(n, generator=torch.Generator().manual_seed(seed + n))
        scale = codec.scale(g)
        found: list[Tensor] = []
        for form in codec.forms:
            payload = codec.encode(g, scale, Key(seed, 0, 0, 1), form=form)
            found.append(codec.decode(payload, scale, n, form=form))
            ratios[form] = 4 * n / payload.numel()
            # what was decoded lies on the levels, so that it encodes to itself
            again = codec.encode(found[-1], scale, Key(seed, 1, 0, 1), form=form)
            lost += int((codec.decode(again, scale, n, form=form) != found[-1]).sum())
        lost += sum(int((found[0] != other).sum()) for other in found[1:])
    return ratios, lost


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    runs, clips = raw["unbiased"].values(), raw["clipping"].values()
    largest = max(run["largest_deviation_in_standard_errors"] for run in runs)
    length = max(abs(run["length_over_expected"] - 1) for run in runs)
    zeros, shorter, angle = (
        spread([run[key] for run in clips])["mean"] for key in ("zeros", "length", "angle")
    )
    base3 = raw["float32_bytes_over_payload_bytes"]["base3"]
    one, two, three = (f"{PAGE}.{i}" for i in (1, 2, 3))
    return [
        Claim(one, "mean of draws off the gradient, standard errors", largest, "<=", 4.0),
        Claim(one, "E|q|^2 over s |g|_1, off 1", length, "<=", 0.01),
        Claim(two, "zeros, off 68.24 %, points", abs(zeros * 100 - 68.24), "<=", 0.05),
        Claim(two, "length, off -1.13 %, points", abs(shorter * 100 + 1.13), "<=", 0.02),
        Claim(two, "angle, off 2.75 degrees", abs(angle - 2.75), "<=", 0.02),
        Claim(three, "base 3: float32 bytes over payload's", base3, ">=", 19.9),
        Claim(three, "two planes: bits an element", raw["bits_in_two_planes"], "==", 2.0),
        Claim(three, "codes lost in round trips, all forms", raw["codes_lost"], "==", 0),
    ]


@experiment("terngrad-exact", seeds=range(3), judge=_judge)
def exact(context: Context) -> dict[str, Any]:
    """TernGrad 1-3: no bias, clipping's published figures, bytes of payloads, round trips."""
    seeds = context.seeds
    draws, elements = (2000, 200_000) if context.quick else (100_000, 20_000_000)
    runs = context.map(unbiased, [(TernGrad(clip=None), draws, s) for s in seeds])
    clips = context.map(clipping, [(elements, 2.5, s) for s in seeds])
    ((ratios, lost),) = context.map(sizes, [(elements, seeds[0])])
    return {
        "unbiased": {str(s): run for s, run in zip(seeds, runs, strict=True)},
        "clipping": {str(s): run for s, run in zip(seeds, clips, strict=True)},
        "bias_slope_expected": TernGrad(clip=2.5).bias,
        "float32_bytes_over_payload_bytes": ratios,
        "bits_in_two_planes": SQm(2).payload_bytes(64 * 1000) * 8 / 64_000,
        "codes_lost": lost,
        "elements": elements,
    }
