"""Verification that the backward pass rebuilds what the forward pass computed, bit by bit."""

from .report import LayerError, StartingPoint, VerifyReport
from .verify import verify

__all__ = ["LayerError", "StartingPoint", "VerifyReport", "verify"]
