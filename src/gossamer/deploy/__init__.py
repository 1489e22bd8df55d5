"""Deployment: networks rewritten for inference, and exported."""

from gossamer.deploy.fold import fold_batchnorm

__all__ = ["fold_batchnorm"]
