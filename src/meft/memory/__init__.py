"""Memory of a training step."""

from .estimation.estimate import estimate
from .estimation.report import BudgetError, MemoryEstimate
from .measurement.measure import MemoryReport, measure

__all__ = ["BudgetError", "MemoryEstimate", "MemoryReport", "estimate", "measure"]
