"""Kinds of tasks that `meft train` knows where the laboratory is installed (entry points "meft.tasks")."""

from .glue import Glue
from .images import ImageClassification
from .questions import MultipleChoice

KINDS = (Glue(), MultipleChoice(), ImageClassification())
