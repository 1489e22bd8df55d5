"""Low-rank approximation of responses: exact properties, and CIFAR-10 networks."""
