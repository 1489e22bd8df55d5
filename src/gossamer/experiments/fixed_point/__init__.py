"""Dynamic fixed point (Gysel et al., 2016)."""
