"""Train, prune, retrain (Han et al., 2015)."""
