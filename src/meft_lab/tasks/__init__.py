"""Tasks known by name: their rows, labels and metrics."""

from .glue import GLUE_TASKS, load_glue
from .image_tasks import IMAGE_TASKS
from .images import load_images
from .multiple_choice import QUESTION_TASKS, load_multiple_choice

__all__ = [
    "GLUE_TASKS",
    "IMAGE_TASKS",
    "QUESTION_TASKS",
    "load_glue",
    "load_images",
    "load_multiple_choice",
]
