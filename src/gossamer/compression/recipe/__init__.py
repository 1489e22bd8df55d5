"""Recipes: YAML validated into stages, the same from Python.

A recipe is a list of stages, each a stage's name with its settings::

    name: my-recipe
    stages:
      - train: {epochs: 10, lr: 0.05}
      - prune: {density: {"*": 0.1, conv1: 0.6}, rounds: 3, retrain: {epochs: 5, lr: 0.01}}
      - share: {bits: {"*": 5, "type:Conv*": 8}, finetune: {epochs: 2, lr: 0.0001}}
      - pack: {profile: smallest}

Layers are named by exact name, by glob, by ``re:`` and a regular expression
(:func:`gossamer.core.names.select`), or by ``type:`` and a glob of module types.
"""

from gossamer.compression.recipe.loading import builtin, dump, load, parse, show
from gossamer.compression.recipe.model import Recipe
from gossamer.compression.settings import Training
from gossamer.compression.stage import STAGES

__all__ = ["STAGES", "Recipe", "Training", "builtin", "dump", "load", "parse", "show"]
