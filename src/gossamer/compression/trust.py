"""Whose code a recipe runs: one that comes from elsewhere is asked about first."""

from __future__ import annotations

from pathlib import Path

from gossamer import nets
from gossamer.compression.recipe import Recipe
from gossamer.core.errors import RecipeError

__all__ = ["check"]


def check(recipe: Recipe, *, model: bool, dataset: bool, trusted: bool) -> None:
    """Refuse code that a recipe from outside the current folder's tree names, unless trusted.

    ``model: file.py:function`` and ``dataset: module:function`` run that function, and all of its
    file; ``model: net.pt2`` the program in it. A recipe within the tree is taken for the user's
    own; where a file really lies counts, links followed. Keys that ``--set`` gave are the user's.

    Args:
        model, dataset: whether the recipe's own is the one that will be used.

    Raises :class:`RecipeError` naming recipe, key, code and the way to go on.
    """
    if trusted or recipe.source is None:
        return
    home, place = Path.cwd().resolve(), recipe.source.resolve()
    if place.is_relative_to(home):
        return
    for key, used in (("model", model), ("dataset", dataset)):
        named = getattr(recipe, key)
        if used and named is not None and _is_code(named) and not recipe.overridden(key):
            raise RecipeError(
                f"{recipe.place(key)}: {named!r} would be run as code, and the recipe lies outside "
                f"{home}. Read it and the code first; then add --trust-recipe-code "
                f"(trust_recipe_code=True), or name your own with --{key}"
            )


def _is_code(name: str) -> bool:
    if name.startswith(("text:", "hf:")):  # of these two, no code is run
        return False
    return nets.is_own(name)
