"""Straight-through estimators and their theory (Yin et al., 2019)."""
