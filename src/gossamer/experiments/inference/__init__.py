"""Sparse, ternary and shared layers and networks on a CPU, beside the dense engines."""
