"""Loss-aware weights and gradients (Hou et al., 2017 to 2019)."""
