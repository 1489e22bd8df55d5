"""Optimal Brain Damage (LeCun et al., 1989)."""
