"""Quantization: which values are shared."""

from gossamer.quantize.batchnorm import absorb_batchnorm
from gossamer.quantize.ecsq import ecsq, entropy
from gossamer.quantize.fixed_point import to_fixed_point
from gossamer.quantize.integer import IntegerNetwork
from gossamer.quantize.kmeans import rate, share, share_model
from gossamer.quantize.network import FixedPoint, Precision, calibrate
from gossamer.quantize.rate_aware import RateAware
from gossamer.quantize.shared import SharedWeights
from gossamer.quantize.uniform import uniform

__all__ = [
    "FixedPoint",
    "IntegerNetwork",
    "Precision",
    "RateAware",
    "SharedWeights",
    "absorb_batchnorm",
    "calibrate",
    "ecsq",
    "entropy",
    "rate",
    "share",
    "share_model",
    "to_fixed_point",
    "uniform",
]
