"""The pack: arrays to bytes to a file, and back."""
