"""`meft.estimate`: the memory of a training step, from a configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from meft.options import check_choice, check_integer

from .blueprint import read_blueprint
from .estimator import Estimator
from .fitting import fastest_setting
from .report import MemoryEstimate
from .sizes import parse_size

DEVICES = ("cpu", "cuda")
LONGEST = ("batch", "sequence", "setting")


def estimate(
    model: str | Path | PretrainedConfig,
    *,
    method: str = "meft1",
    batch_size: int = 1,
    seq_len: int = 512,
    dtype: str | torch.dtype = "bfloat16",
    optimizer: str = "adamw",
    task_type: str | None = None,
    device: str | None = None,
    attn_implementation: str | None = None,
    padded: bool = False,
    autocast: str | torch.dtype | None = None,
    budget: str | int | None = None,
    longest: Literal["batch", "sequence", "setting"] = "batch",
    progress: Callable[[str], None] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> MemoryEstimate:
    """Predicts the memory of a training step without loading weights and without a GPU.

    Example:
        >>> config = transformers.LlamaConfig(num_hidden_layers=24, hidden_size=512)
        >>> report = meft.estimate(config, method="momentum", batch_size=1, seq_len=2048)
        >>> report.activation_peak_bytes, report.total_bytes
        >>> meft.estimate("meta-llama/Llama-3.2-3B", method="lora+momentum", budget="24GiB", longest="sequence").seq_len

    The step runs on tensors that have shapes and no values (PyTorch's FakeTensorMode), and every tensor that comes and
    goes is counted. A deep model is run with a few of its layers and carried on from there (`estimation.predict` says
    how, and how that is checked). Not seen is what a kernel allocates and frees inside itself, but for attention on the
    CPU: workspaces of matrix products (oneDNN, cuBLAS) and of reductions. With `device="cuda"` the kernels of the
    CPU stand in for those of CUDA: blocks are rounded as its allocator rounds them, the optimizer updates all
    parameters together, and attention weights have no dropout, so that attention runs in a kernel that does not store
    them; the allocator's fragmentation and the CUDA context (0.3 to 0.8 GiB) come on top.

    Args:
        model: A name on the hub, a folder, a `config.json`, or a configuration of Transformers.
        method: A way to train (`meft.methods.registry.WAYS`): "full", "lora", "momentum", ..., on a reversible backbone
            "lora+momentum", with gradient checkpointing "lora+checkpointing", with what is saved for the backward pass
            on the host "lora+offload" (`torch.autograd.graph.save_on_cpu`).
        batch_size: Rows of a batch.
        seq_len: Tokens of a row; of no meaning for models of images.
        dtype: Of the weights: float32, bfloat16, float16 or float64.
        optimizer: One of `estimation.optimizers.OPTIMIZERS`: adamw, adam, sgd, sgd+momentum, adafactor, rmsprop,
            adagrad, none.
        task_type: The head: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION or
            IMAGE_CLS. None for what the configuration was saved for; language modelling where it says nothing.
        device: "cpu" or "cuda"; None for "cuda" where there is one.
        attn_implementation: "sdpa" or "eager"; None for the model's own choice.
        padded: Whether batches have padding, for which attention needs a mask.
        autocast: Mixed precision to this dtype.
        budget: Bytes or a size ("24GiB"): the answer is for the largest batch, or the longest sequence, whose
            `total_bytes` fit.
        longest: With a budget, what to enlarge: "batch" (`seq_len` stays) or "sequence" (`batch_size` stays). With
            "setting" both stay, and the answer is the fastest setting that fits: the method as it is, then on a
            reversible backbone with as many `cached_layers` as fit, then with residues on the host (on a CPU, which
            has none beside it, with gamma 1/4).
        progress: Called with a description before every step that is run.
        revision: Of the model on the hub.
        trust_remote_code: Whether to run code that comes with the model.
        **options: Of the method, and of the coupling under it (`meft.options`): bottleneck_dim, lora_rank, gamma, ...

    Returns:
        The `MemoryEstimate`. Print it with rich for the table by cause.

    Raises:
        ConfigError: An option is not valid, or the sequence is longer than the model's positions.
        BudgetError: The budget is too small for a batch of one (or a sequence of two tokens); it is a ConfigError.
        CheckpointError: There is no configuration there.
        UnsupportedModelError: Transformers does not know the model, the method cannot train it, or its step looks at
            the values of tensors.
    """
    check_integer("batch_size", batch_size, 1)
    check_integer("seq_len", seq_len, 2)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_choice("device", where, DEVICES)
    check_choice("longest", longest, LONGEST)
    blueprint = read_blueprint(
        model,
        task_type=task_type,
        dtype=dtype,
        attn_implementation=attn_implementation,
        padded=padded,
        attention_dropout=where == "cpu",
        revision=revision,
        trust_remote_code=trust_remote_code,
    )

    def make(way: str, of_way: Mapping[str, Any]) -> Estimator:
        return Estimator(blueprint, way, where, optimizer, autocast, of_way, progress)

    if budget is not None and longest == "setting":
        report, tried = fastest_setting(make, method, options, parse_size(budget), where, batch_size, seq_len)
        return replace(report, tried=tried)
    estimator = make(method, options)
    if budget is None:
        return estimator.at(batch_size, seq_len)
    return estimator.within(parse_size(budget), longest, batch_size, seq_len)
