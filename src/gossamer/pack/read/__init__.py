"""From a file to tensors."""
