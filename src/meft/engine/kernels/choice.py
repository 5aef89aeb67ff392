"""Which of the two runs on a device: the fused kernels or the plain tensor code."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache

import torch
from torch import Tensor

from meft.errors import ConfigError, MeftWarning

from ..replay import on_fake_tensors

KERNELS = ("auto", "triton", "reference")
"""Kernels where they are to be had, kernels or an error, and plain tensor code."""
_DEVICES = ("cuda", "xpu")
_LOWEST_CAPABILITY = (7, 0)


def fuses(kernels: str, hidden: Tensor) -> bool:
    """Whether the streams of a hidden state are coupled by kernels.

    Args:
        kernels: "auto" for the kernels where Triton and its devices are, and they prove to return the bits of the
            tensor code there; "triton" for them or an error; "reference" for the tensor code.
        hidden: what enters the stack.

    Raises:
        ConfigError: kernels="triton" was asked for where there are none.
    """
    if kernels == "reference" or on_fake_tensors() or hidden.device.type == "meta":
        return False
    missing = why_not(hidden.device, hidden.dtype)
    if missing is None:
        fault = _fault(hidden.device)
        if fault is None:
            return True
        missing = f"on {hidden.device} they do not return the bits of the tensor code ({fault})"
        if kernels == "auto":
            warnings.warn(
                f"Fused kernels are left out: {missing}. The tensor code runs instead, to the same result. Set "
                'kernels="reference" to silence this, and report it with the versions of torch and Triton.',
                MeftWarning,
                stacklevel=2,
            )
    if kernels == "triton":
        raise ConfigError(
            f'kernels="triton" cannot be had for a hidden state of {hidden.dtype} on {hidden.device}: {missing}. Valid '
            'there: kernels="auto" or "reference", which run plain tensor code to the same bits.'
        )
    return False


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there are no kernels for hidden states of a dtype on a device; None where there are."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "kernels take float32, bfloat16 and float16"
    # Asked in every forward pass: looking for a package takes longest, and on a processor need not be done.
    if not interpreted() and device.type not in _DEVICES:
        return f"Triton has no kernels for {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted():
        return None
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _LOWEST_CAPABILITY:
            return f"Triton needs compute capability 7.0, the device has {'.'.join(map(str, capability))}"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for, which runs kernels on any device, slowly."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def _fault(device: torch.device) -> str | None:
    """What is wrong with the kernels on a device, found once a process; None if they return the bits they should."""
    from .proof import differences

    try:
        return next(differences(device), None)
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
