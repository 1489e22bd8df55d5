"""Factorization: layers as products of smaller ones."""

from gossamer.factorize.svd import SVDSize, factorize, svd_size, sweep

__all__ = ["SVDSize", "factorize", "svd_size", "sweep"]
