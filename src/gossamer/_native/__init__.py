"""Compiled kernels; every one has a plain Python oracle in the tests."""
