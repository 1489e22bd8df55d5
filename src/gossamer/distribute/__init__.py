"""Gradients of a bit or two between workers."""
