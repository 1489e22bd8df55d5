"""The exchange inside DistributedDataParallel."""
