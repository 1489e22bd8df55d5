"""What every wing speaks in; it knows nothing of the folders above."""
