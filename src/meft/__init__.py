"""Exactly reversible fine-tuning for Transformers and PEFT.

Importing this package registers the PEFT method "MEFT":

    import meft
    from peft import get_peft_model

    model = get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", coupling="meft1"))
"""

from . import errors
from .callbacks import MeftCallback
from .config import MeftConfig
from .convert import make_reversible, restore
from .errors import MeftError
from .export import export
from .folders import load
from .memory import MemoryEstimate, MemoryReport, estimate, measure
from .tuner import MeftLayer, MeftModel, register
from .verify import VerifyReport, verify
from .version import __version__

register()

__all__ = [
    "MeftCallback",
    "MeftConfig",
    "MeftError",
    "MeftLayer",
    "MeftModel",
    "MemoryEstimate",
    "MemoryReport",
    "VerifyReport",
    "__version__",
    "errors",
    "estimate",
    "export",
    "load",
    "make_reversible",
    "measure",
    "restore",
    "verify",
]
