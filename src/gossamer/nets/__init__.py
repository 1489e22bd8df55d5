"""Networks, plain torch; they know nothing of the rest."""
