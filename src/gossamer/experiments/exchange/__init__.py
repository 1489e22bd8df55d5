"""Exchanges of gradients: exactness, bytes, speed."""
