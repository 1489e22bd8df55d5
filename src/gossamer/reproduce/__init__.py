"""Published tables, one command each."""
