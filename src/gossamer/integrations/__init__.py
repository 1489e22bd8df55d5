"""Methods in other people's trainers: thin adapters, a module for each.

Each needs an extra of its own (``pip install 'gossamer[transformers]'``), which nothing else here
imports.
"""
