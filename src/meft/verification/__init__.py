"""Verification that the backward pass rebuilds what the forward pass computed, bit by bit."""

from .report import Deployment, LayerError, StartingPoint, VerifyReport
from .verify import verify

__all__ = ["Deployment", "LayerError", "StartingPoint", "VerifyReport", "verify"]
