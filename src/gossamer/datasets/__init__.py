"""Datasets in memory; they know nothing of the rest."""
