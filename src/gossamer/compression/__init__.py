"""Run recipes: from a network and data to a small file, its figures and a report."""

from gossamer.compression.run import Result, compress, run

__all__ = ["Result", "compress", "run"]
