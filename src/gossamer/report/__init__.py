"""The report: one self-contained HTML page of a run."""

from gossamer.report.page import render, write

__all__ = ["render", "write"]
