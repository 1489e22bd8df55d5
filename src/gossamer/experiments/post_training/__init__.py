"""Post-training compression from inputs alone (Hassibi, Stork, 1993; Frantar, Alistarh, 2022)."""
