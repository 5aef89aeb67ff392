"""Fused kernels: proven under Triton's interpreter, in a process of its own, and chosen by device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from meft import make_reversible
from meft.backbone.plan import Plan
from meft.engine.arithmetic import AutomaticGrid
from meft.engine.kernels import choice
from meft.engine.kernels.choice import fuses, why_not
from meft.errors import ConfigError, MeftWarning

CPU = torch.device("cpu")


def test_kernels_have_the_bits_of_the_tensor_code() -> None:
    """Triton decides for interpreter or compiler when it is imported: the tests of kernels run by themselves."""
    file = Path(__file__).with_name("interpreted.py")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=file.parents[2])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_a_processor_runs_tensor_code_unless_kernels_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden = torch.randn(2, 3)
    assert not fuses("auto", hidden) and not fuses("reference", hidden)
    assert not AutomaticGrid().fitted(hidden, training=True).fused
    with pytest.raises(ConfigError) as raised:
        fuses("triton", hidden)
    assert str(raised.value) == (
        'kernels="triton" cannot be had for a hidden state of torch.float32 on cpu: Triton has no kernels for cpu. '
        'Valid there: kernels="auto" or "reference", which run plain tensor code to the same bits.'
    )


def test_what_an_accelerator_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert why_not(cuda, torch.bfloat16) == "Triton needs compute capability 7.0, the device has 6.1"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not(cuda, torch.bfloat16) is None and why_not(torch.device("xpu", 0), torch.float16) is None
    assert why_not(cuda, torch.float64) == "kernels take float32, bfloat16 and float16"
    assert why_not(torch.device("mps"), torch.float32) == "Triton has no kernels for mps"
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert why_not(cuda, torch.bfloat16) == "Triton is not installed"


def test_kernels_that_prove_wrong_on_a_device_are_left_out_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(choice, "_fault", lambda device: "stream of a step with factor 0.1, torch.bfloat16")
    with pytest.warns(MeftWarning, match="left out: on cpu they do not return the bits of the tensor code .stream of"):
        assert not fuses("auto", torch.randn(2))
    with pytest.raises(ConfigError, match=r"do not return the bits of the tensor code"):
        fuses("triton", torch.randn(2))


def test_the_plan_shows_the_choice_and_float_arithmetic_has_none() -> None:
    assert "kernels 'auto'" in str(Plan.make(coupling="momentum"))
    assert "kernels 'reference'" in str(Plan.make(coupling="momentum", kernels="reference"))
    with pytest.raises(ConfigError, match=r"kernels='cuda' is unknown. Valid: 'triton', 'reference'"):
        Plan.make(coupling="momentum", kernels="cuda")
    with pytest.raises(ConfigError, match=r'kernels="triton" does not go with arithmetic="float"'):
        Plan.make(coupling="momentum", arithmetic="float", kernels="triton")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).train()


class WithoutFloat64(TorchDispatchMode):
    """What Apple's devices do: no tensor of float64 can be made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for found in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(found, torch.Tensor) and found.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func} needs float64")
            assert found not in (torch.float64, torch.complex128), func
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"sign": "random", "gamma": 0.1}, {"compensated": True}], ids=str)
def test_the_default_path_needs_no_float64(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = make_reversible(llama().to(dtype), **options)
    ids = torch.arange(1, 25).view(2, 12)
    with WithoutFloat64() as mode:
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            model.eval()(input_ids=ids)
    assert mode.calls > 1000 and all(p.grad is not None for p in model.parameters())


def test_a_message_of_the_default_path_needs_no_float64() -> None:
    """The message that says what a rebuilt input is off by is for Apple's devices too."""
    model = make_reversible(llama())
    loss = model(input_ids=torch.arange(1, 25).view(2, 12)).logits.square().sum()
    list(model.model.layers)[1].mlp.down_proj.weight.data += 0.1
    with WithoutFloat64(), pytest.raises(Exception, match="is not the original"):
        loss.backward()
