"""Quantization: which values are shared."""
