"""Run recipes: from a network and data to a small file, its figures and a report."""

from gossamer.compression.result import Result
from gossamer.compression.run import GENTLE, WHY_GENTLE, compress, run

__all__ = ["GENTLE", "WHY_GENTLE", "Result", "compress", "run"]
