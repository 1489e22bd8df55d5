"""What a pruned network looks like: specialization, speed-ups, pictures and plots."""

from gossamer.analysis.plots import (
    against_density,
    bars,
    canvas,
    histograms,
    layer_densities,
    lines,
    pictures,
    pixel_counts,
)
from gossamer.analysis.principal import components_for, reconstruction_errors
from gossamer.analysis.specialization import compare, specialization
from gossamer.analysis.speedup import speedups

__all__ = [
    "against_density",
    "bars",
    "canvas",
    "compare",
    "components_for",
    "histograms",
    "layer_densities",
    "lines",
    "pictures",
    "pixel_counts",
    "reconstruction_errors",
    "specialization",
    "speedups",
]
