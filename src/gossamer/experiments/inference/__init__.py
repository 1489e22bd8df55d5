"""Sparse layers and networks on a CPU, against the best dense engines."""
