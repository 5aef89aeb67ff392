"""Exactly reversible fine-tuning for Transformers and PEFT.

Importing this package registers the PEFT method "MEFT":

    import meft
    from peft import get_peft_model

    model = get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", coupling="meft1"))
"""

from meft import errors
from meft.backbone.conversion import make_reversible, restore
from meft.errors import MeftError
from meft.loading.folders import load
from meft.memory import MemoryEstimate, MemoryReport, estimate, measure
from meft.stack_report import StackReport, report
from meft.training.callbacks import MeftCallback
from meft.training.export import export
from meft.tuner.config import MeftConfig
from meft.tuner.tuner import MeftLayer, MeftModel, register
from meft.verification import VerifyReport, verify
from meft.version import __version__

register()

__all__ = [
    "MeftCallback",
    "MeftConfig",
    "MeftError",
    "MeftLayer",
    "MeftModel",
    "MemoryEstimate",
    "MemoryReport",
    "StackReport",
    "VerifyReport",
    "__version__",
    "errors",
    "estimate",
    "export",
    "load",
    "make_reversible",
    "measure",
    "report",
    "restore",
    "verify",
]
