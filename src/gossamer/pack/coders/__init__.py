"""Symbols to bits and back."""
