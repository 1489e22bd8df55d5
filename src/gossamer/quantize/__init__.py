"""Quantization: which values are shared."""

from gossamer.quantize.batchnorm import absorb_batchnorm
from gossamer.quantize.ecsq import ecsq, entropy
from gossamer.quantize.kmeans import rate, share, share_model
from gossamer.quantize.rate_aware import RateAware
from gossamer.quantize.shared import SharedWeights
from gossamer.quantize.uniform import uniform

__all__ = [
    "RateAware",
    "SharedWeights",
    "absorb_batchnorm",
    "ecsq",
    "entropy",
    "rate",
    "share",
    "share_model",
    "uniform",
]
