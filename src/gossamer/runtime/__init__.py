"""Networks that answer fast: exported, compared with the original, timed in engines."""
