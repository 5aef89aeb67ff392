"""`meft sweep`: the runs of a recipe, resumable, and one table of what they found."""

from .recipe import Recipe, builtin_recipes, load_recipe
from .runs import Outcome, Run, Sweep, score_of
from .table import csv_text, markdown, table_of

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
