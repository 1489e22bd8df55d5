"""Quantization: which values are shared."""

from gossamer.quantize.activations import (
    QuantizedReLU,
    normalize_,
    quantize_activations_,
    quantized_relu,
)
from gossamer.quantize.calibration import Precision, calibrate
from gossamer.quantize.ecsq import ecsq, entropy
from gossamer.quantize.fixed_point import to_fixed_point
from gossamer.quantize.fixed_training import FixedReLU, FixedWeights, fixed_activations_
from gossamer.quantize.integer import IntegerNetwork
from gossamer.quantize.kmeans import rate, share, share_model
from gossamer.quantize.loss_aware import LossAware
from gossamer.quantize.lsq import LSQ
from gossamer.quantize.network import FixedPoint
from gossamer.quantize.projected import Projected
from gossamer.quantize.rate_aware import RateAware
from gossamer.quantize.set_point import SetPoint
from gossamer.quantize.shared import SharedWeights
from gossamer.quantize.ttq import TTQ
from gossamer.quantize.uniform import uniform

__all__ = [
    "LSQ",
    "TTQ",
    "FixedPoint",
    "FixedReLU",
    "FixedWeights",
    "IntegerNetwork",
    "LossAware",
    "Precision",
    "Projected",
    "QuantizedReLU",
    "RateAware",
    "SetPoint",
    "SharedWeights",
    "calibrate",
    "ecsq",
    "entropy",
    "fixed_activations_",
    "normalize_",
    "quantize_activations_",
    "quantized_relu",
    "rate",
    "share",
    "share_model",
    "to_fixed_point",
    "uniform",
]
