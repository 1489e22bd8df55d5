"""Deconstructing lottery tickets (Zhou et al., 2019)."""
