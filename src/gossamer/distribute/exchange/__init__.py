"""Averages of gradients over workers."""
