"""Deployment: networks rewritten for inference, and exported."""

from gossamer.deploy.fold import fold_batchnorm
from gossamer.deploy.structure import load

__all__ = ["fold_batchnorm", "load"]
