"""Sparse momentum and its family (Dettmers, Zettlemoyer, 2019)."""
