"""The tasks of GLUE (Wang et al. 2019, arXiv 1804.07461)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from meft.training.data.base import TaskData
from meft.training.kinds.classification import TextClassification
from meft_lab.tasks import GLUE_TASKS, load_glue

if TYPE_CHECKING:
    from meft.training.arguments import DataArguments


class Glue(TextClassification):
    """A text or a pair of texts of GLUE, and a class or a number."""

    tasks = tuple(GLUE_TASKS)

    def load_rows(
        self,
        arguments: DataArguments,
        splits: Sequence[str],
        *,
        config: PretrainedConfig,
        labels: Sequence[str] | None,
        cache_dir: str | None,
    ) -> TaskData:
        task = arguments.task or ""
        order = labels or _label_order(config, task)
        return load_glue(task, arguments.data_dir, splits, labels=order, cache_dir=cache_dir)


def _label_order(config: PretrainedConfig, task: str) -> tuple[str, ...] | None:
    """The task's labels as the model orders them: an MNLI model may well call contradiction 0."""
    labels = GLUE_TASKS[task].labels if task in GLUE_TASKS else ()
    own = [str(name).lower() for _, name in sorted((config.id2label or {}).items())]
    return tuple(own) if labels and set(own) == set(labels) and len(own) == len(labels) else None
