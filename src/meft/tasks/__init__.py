"""Tasks: their rows, labels and metrics."""

from meft.tasks.base import TaskData, TaskSpec
from meft.tasks.files import FileOptions, load_files
from meft.tasks.glue import GLUE_TASKS, load_glue
from meft.tasks.image_tasks import IMAGE_TASKS
from meft.tasks.images import load_images
from meft.tasks.multiple_choice import QUESTION_TASKS, load_multiple_choice

__all__ = [
    "GLUE_TASKS",
    "IMAGE_TASKS",
    "QUESTION_TASKS",
    "FileOptions",
    "TaskData",
    "TaskSpec",
    "load_files",
    "load_glue",
    "load_images",
    "load_multiple_choice",
]
