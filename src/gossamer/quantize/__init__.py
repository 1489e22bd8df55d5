"""Quantization: which values are shared."""

from gossamer.quantize.batchnorm import absorb_batchnorm
from gossamer.quantize.kmeans import rate, share, share_model
from gossamer.quantize.shared import SharedWeights

__all__ = ["SharedWeights", "absorb_batchnorm", "rate", "share", "share_model"]
