"""Switches of PyTorch, for a whole process, that decide which kernel an operation takes and how it rounds.

A call that is made again must find them as they were: those that can be put back are, for the time of the second call.
What cannot (what tunable operators have found meanwhile, scales of FP8 modules) is compared, and named if bits differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_C: Any = torch._C
_Switch = tuple[str, Callable[[], Any], Callable[[Any], Any]]


def _pair(read: str, write: str) -> Iterator[_Switch]:
    """A switch of PyTorch's own, where this version of it has one; one of several values is set by all of them."""
    reader, writer = getattr(_C, read, None), getattr(_C, write, None)
    if reader is not None and writer is not None:
        yield read, reader, lambda value: writer(*value) if isinstance(value, tuple) else writer(value)


def _precision(backend: str, operation: str) -> Iterator[_Switch]:
    if hasattr(_C, "_get_fp32_precision_getter"):
        yield (
            f"{backend} {operation}",
            lambda: _C._get_fp32_precision_getter(backend, operation),
            lambda value: _C._set_fp32_precision_setter(backend, operation, value),
        )


def _legacy_precision() -> str | None:
    try:
        return _C._get_float32_matmul_precision()
    except RuntimeError:  # the older and the newer way of setting it were mixed, and only the newer one tells
        return None


def _set_legacy_precision(value: str | None) -> None:
    if value is not None:
        _C._set_float32_matmul_precision(value)


def _deterministic() -> tuple[bool, bool]:
    return _C._get_deterministic_algorithms(), _C._get_deterministic_algorithms_warn_only()


def _set_deterministic(value: tuple[bool, bool]) -> None:
    _C._set_deterministic_algorithms(value[0], warn_only=value[1])


_SWITCHES: tuple[_Switch, ...] = (
    *_pair("_get_flash_sdp_enabled", "_set_sdp_use_flash"),
    *_pair("_get_mem_efficient_sdp_enabled", "_set_sdp_use_mem_efficient"),
    *_pair("_get_math_sdp_enabled", "_set_sdp_use_math"),
    *_pair("_get_cudnn_sdp_enabled", "_set_sdp_use_cudnn"),
    *_pair("_get_overrideable_sdp_enabled", "_set_sdp_use_overrideable"),
    *_pair("_get_fa3_sdp_enabled", "_set_sdp_use_fa3"),
    *_pair("_get_sdp_priority_order", "_set_sdp_priority_order"),
    *_pair("_get_math_sdp_allow_fp16_bf16_reduction", "_set_math_sdp_allow_fp16_bf16_reduction"),
    *_pair("_get_rocm_fa_preferred_backend", "_set_rocm_fa_preferred_backend"),
    # The older way first: it sets what the newer one names as well.
    ("float32 matmul precision", _legacy_precision, _set_legacy_precision),
    *_precision("generic", "all"),
    *(
        switch
        for backend in ("cuda", "mkldnn")
        for operation in ("matmul", "conv", "rnn")
        for switch in _precision(backend, operation)
    ),
    *_pair("_get_cublas_allow_fp16_reduced_precision_reduction", "_set_cublas_allow_fp16_reduced_precision_reduction"),
    *_pair("_get_cublas_allow_bf16_reduced_precision_reduction", "_set_cublas_allow_bf16_reduced_precision_reduction"),
    *_pair("_get_cublas_allow_fp16_accumulation", "_set_cublas_allow_fp16_accumulation"),
    *_pair("_get_cpu_allow_fp16_reduced_precision_reduction", "_set_cpu_allow_fp16_reduced_precision_reduction"),
    *_pair("_get_blas_preferred_backend", "_set_blas_preferred_backend"),
    *_pair("_get_linalg_preferred_backend", "_set_linalg_preferred_backend"),
    *_pair("_get_cudnn_enabled", "_set_cudnn_enabled"),
    *_pair("_get_cudnn_benchmark", "_set_cudnn_benchmark"),
    *_pair("_get_cudnn_deterministic", "_set_cudnn_deterministic"),
    *_pair("_get_mkldnn_enabled", "_set_mkldnn_enabled"),
    *_pair("_get_mkldnn_deterministic", "_set_mkldnn_deterministic"),
    ("deterministic algorithms", _deterministic, _set_deterministic),
)


def read_switches() -> tuple[Any, ...]:
    """The present values of all switches."""
    return tuple(read() for _, read, _ in _SWITCHES)


@contextmanager
def switched_to(wanted: Sequence[Any]) -> Iterator[None]:
    """Lets all switches have the values that `read_switches` gave, and on leaving those that they have now."""
    present = read_switches()
    try:
        _put(wanted)
        yield
    finally:
        _put(present)


def _put(values: Sequence[Any]) -> None:
    if read_switches() == tuple(values):
        return
    for (_, read, write), value in zip(_SWITCHES, values, strict=True):
        if read() != value:
            write(value)


def read_compared(modules: Sequence[nn.Module]) -> dict[str, Any]:
    """What decides about bits and cannot be put back, by what messages call it."""
    found: dict[str, Any] = {}
    if hasattr(_C, "_cuda_tunableop_is_enabled"):
        found["tunable operators (torch.cuda.tunable)"] = (
            _C._cuda_tunableop_is_enabled(),
            _C._cuda_tunableop_tuning_is_enabled(),
        )
    scales = tuple(
        getattr(getattr(part, "scale", None), "_version", None)
        for module in modules
        for part in (vars(module).get("fp8_meta") or {}).values()
        if hasattr(part, "scale")
    )
    if scales:
        found["the FP8 scales of its modules"] = scales
    return found


def compared_since(before: dict[str, Any], modules: Sequence[nn.Module]) -> str:
    """Names what of `read_compared` is not what it was; empty if all is."""
    now = read_compared(modules)
    return " and ".join(name for name, value in before.items() if now.get(name) != value)
