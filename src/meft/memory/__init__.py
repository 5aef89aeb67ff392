"""Memory of a training step."""

from meft.memory.measure import MemoryReport, measure

__all__ = ["MemoryReport", "measure"]
