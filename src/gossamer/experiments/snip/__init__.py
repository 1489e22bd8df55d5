"""SNIP (Lee et al., 2019)."""
