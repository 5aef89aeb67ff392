"""Memory of a training step."""

from meft.memory.estimate import estimate
from meft.memory.measure import MemoryReport, measure
from meft.memory.report import BudgetError, MemoryEstimate

__all__ = ["BudgetError", "MemoryEstimate", "MemoryReport", "estimate", "measure"]
