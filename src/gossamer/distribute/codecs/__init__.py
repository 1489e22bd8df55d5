"""Gradients to a few bits and back."""
