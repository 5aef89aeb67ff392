"""MEFT as a PEFT method; importing it registers the method."""

from .config import MeftConfig
from .tuner import MeftLayer, MeftModel, register

__all__ = ["MeftConfig", "MeftLayer", "MeftModel", "register"]

register()
