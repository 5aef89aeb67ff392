"""`meft sweep`: the runs of a recipe, resumable, and one table of what they found."""

from meft.sweep.recipe import Recipe, builtin_recipes, load_recipe
from meft.sweep.runs import Outcome, Run, Sweep, score_of
from meft.sweep.table import csv_text, markdown, table_of

__all__ = [
    "Outcome",
    "Recipe",
    "Run",
    "Sweep",
    "builtin_recipes",
    "csv_text",
    "load_recipe",
    "markdown",
    "score_of",
    "table_of",
]
