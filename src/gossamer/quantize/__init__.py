"""Quantization: which values are shared."""

from gossamer.quantize.activations import (
    QuantizedReLU,
    normalize_,
    quantize_activations_,
    quantized_relu,
)
from gossamer.quantize.batchnorm import absorb_batchnorm
from gossamer.quantize.ecsq import ecsq, entropy
from gossamer.quantize.kmeans import rate, share, share_model
from gossamer.quantize.rate_aware import RateAware
from gossamer.quantize.shared import SharedWeights
from gossamer.quantize.uniform import uniform

__all__ = [
    "QuantizedReLU",
    "RateAware",
    "SharedWeights",
    "absorb_batchnorm",
    "ecsq",
    "entropy",
    "normalize_",
    "quantize_activations_",
    "quantized_relu",
    "rate",
    "share",
    "share_model",
    "uniform",
]
