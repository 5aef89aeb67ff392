"""Text classification and regression tasks: their rows, labels and metrics."""

from meft.tasks.base import TaskData, TaskSpec
from meft.tasks.files import FileOptions, load_files
from meft.tasks.glue import GLUE_TASKS, load_glue

__all__ = ["GLUE_TASKS", "FileOptions", "TaskData", "TaskSpec", "load_files", "load_glue"]
