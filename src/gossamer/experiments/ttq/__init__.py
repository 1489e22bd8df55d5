"""Trained ternary quantization (Zhu et al., 2017)."""
