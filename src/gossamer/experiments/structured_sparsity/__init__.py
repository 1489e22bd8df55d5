"""Structured sparsity learning, and intrinsic sparse structures of LSTMs."""
