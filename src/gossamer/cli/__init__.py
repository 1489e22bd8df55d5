"""The command line: thin, no logic of its own.

Commands import what they need when they run: ``gossamer --help`` answers at once.
"""

from gossamer.cli.program import app, main

# they add their commands to the program, in this order
from gossamer.cli import networks, look, files, measure, deploy  # isort: skip

__all__ = ["app", "deploy", "files", "look", "main", "measure", "networks"]
