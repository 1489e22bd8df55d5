"""What a pruned network looks like: pictures and plots of masks and results."""

from gossamer.analysis.plots import against_density, layer_densities, pictures, pixel_counts

__all__ = ["against_density", "layer_densities", "pictures", "pixel_counts"]
