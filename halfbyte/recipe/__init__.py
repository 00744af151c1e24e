"""The recipe: what to make of a model, its schema, its presets and how a user's words become one."""

from halfbyte.recipe.docs import preset_markdown, recipe_schema_markdown
from halfbyte.recipe.loader import list_presets, load_recipe
from halfbyte.recipe.schema import Boundary, CalibrationSpec, Recipe

__all__ = [
    "Boundary",
    "CalibrationSpec",
    "Recipe",
    "list_presets",
    "load_recipe",
    "preset_markdown",
    "recipe_schema_markdown",
]
