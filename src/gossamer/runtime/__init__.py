"""Networks that answer fast: exported, compared with the original."""
