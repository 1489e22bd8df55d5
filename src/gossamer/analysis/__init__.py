"""What a pruned network looks like: specialization, speed-ups, pictures and plots."""

from gossamer.analysis.plots import (
    against_density,
    bars,
    canvas,
    histograms,
    layer_densities,
    pictures,
    pixel_counts,
)
from gossamer.analysis.specialization import compare, specialization
from gossamer.analysis.speedup import speedups

__all__ = [
    "against_density",
    "bars",
    "canvas",
    "compare",
    "histograms",
    "layer_densities",
    "pictures",
    "pixel_counts",
    "specialization",
    "speedups",
]
