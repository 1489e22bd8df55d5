"""Sparse, ternary and shared layers on a CPU beside the dense engines."""
