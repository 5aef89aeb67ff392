"""Exactly reversible fine-tuning for Transformers and PEFT.

Importing this package registers the PEFT method "MEFT":

    import meft
    from peft import get_peft_model

    model = get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", coupling="meft1"))
"""

from meft import errors as errors
from meft.lazy import exports, when_imported

__version__ = "0.1.0"

# What is exported stands in __init__.pyi; nothing heavy is imported before it is used.
__all__, __getattr__, __dir__ = exports(__name__, __file__)

when_imported("peft", "meft.tuner")
