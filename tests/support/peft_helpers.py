"""PEFT models of the tiny families in `models`, and one training step of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import meft
from meft.backbone.discovery import find_stacks
from meft.backbone.layers import shared_by
from support import models

COUPLINGS = ("meft1", "meft2", "meft3", "momentum")
METHODS = (*COUPLINGS, "adapter")

TASK_OF = {"bert": "SEQ_CLS", "roberta": "TOKEN_CLS", "bart": "SEQ_2_SEQ_LM", "opt": "CAUSAL_LM", "opt_350m": "SEQ_CLS"}
"""One head a family for tests that are not about heads; BART's puts both of its stacks to work."""

VISIBLE = ("logits", "start_logits", "end_logits", "last_hidden_state")


def adapted(
    family: str,
    coupling: str = "meft1",
    task: str | None = None,
    *,
    dropout: float = 0.0,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> PeftModel:
    """A PEFT model in training mode whose adapters are large enough to matter. Same arguments, same weights."""
    task = task or TASK_OF[family]
    base = models.build(family, task, layers=layers, dropout=dropout, dtype=dtype)
    config = meft.MeftConfig(task_type=task, coupling=coupling, bottleneck_dim=4, **options)
    model = get_peft_model(base, config)
    enlarge(model)
    return model.train()


def enlarge(model: nn.Module, adapter: str = "default", seed: int = 5) -> None:
    """Draws the weights of one adapter anew, ten times as large as fresh ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "meft_" in name and f".{adapter}." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def batch_of(family: str, task: str | None = None, **options: Any) -> dict[str, Tensor]:
    return models.batch(family, task or TASK_OF[family], **options)


def visible(output: Any) -> Tensor:
    """Everything a user reads from a model's output but the loss, in one tensor."""
    return torch.cat([output[name].flatten() for name in VISIBLE if output.get(name) is not None])


def loss_of(output: Any) -> Tensor:
    """The loss, or, for a model without a head, a scalar that weighs every output differently."""
    if output.get("loss") is not None:
        return output.loss
    flat = visible(output)
    return (flat * torch.linspace(-1, 1, flat.numel())).sum()


def taken(model: nn.Module) -> dict[str, Tensor]:
    """The gradients on a model, by parameter name, taken off again."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradients(model: nn.Module, batch: Mapping[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """The gradients of one training step, by parameter name."""
    torch.manual_seed(seed)
    loss_of(model(**batch)).backward()
    return taken(model)


def outputs(model: nn.Module, batch: Mapping[str, Any], seed: int = 1) -> Tensor:
    """What a user sees of one call without gradients."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return visible(model(**batch))


def unread(model: nn.Module) -> set[str]:
    """Weights of MEFT adapters that add to a stream that nothing reads: the output rule leaves it out, at the top."""
    found = set()
    for stack in find_stacks(model):
        shared, highest = shared_by(stack.layers), stack.order[-1]
        for function in () if shared is None else shared.unread(highest):
            start = f"{stack.name}.{highest}.meft_{function.lower()}_"
            found |= {name for name, _ in model.named_parameters() if name.startswith(start)}
    return found


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit, and something to compare."""
    assert expected and actual.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert not different, f"{len(different)} of {len(expected)} differ: {different[:3]}"


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float = 1e-4) -> None:
    """In the Euclidean norm of all of them together: gradients of single weights may be zero."""
    assert expected and actual.keys() == expected.keys()
    error = torch.cat([(actual[name].double() - tensor.double()).flatten() for name, tensor in expected.items()]).norm()
    size = torch.cat([tensor.double().flatten() for tensor in expected.values()]).norm()
    assert size > 0 and error <= relative * size, f"relative error {error / size:.2e}"


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def anatomy(model: nn.Module) -> dict[str, Any]:
    """What must be the same again after a conversion was undone or refused: who sits where, and every flag."""
    return {
        "modules": {name: (id(module), module.training) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "layerdrop": {name: m.layerdrop for name, m in model.named_modules() if hasattr(m, "layerdrop")},
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Asserts that a model comes out as it went in."""
    before, weights = anatomy(model), snapshot(model)
    yield
    assert anatomy(model) == before
    assert_equal(model.state_dict(), weights)


def llama(**options: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=models.VOCABULARY, max_position_embeddings=24, **sizes | options))


def neox() -> GPTNeoXForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=models.VOCABULARY, max_position_embeddings=24, hidden_dropout=0.1, **sizes)
    return GPTNeoXForCausalLM(config)
