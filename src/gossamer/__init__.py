"""Gossamer: from a trained PyTorch network to a small file and a fast network."""
