"""Models that others have changed already: quantised, compiled, dispatched to a device, adapted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import meft
from meft.errors import UnsupportedModelError
from support.peft_helpers import assert_close, assert_equal, llama, loss_of, outputs, taken, unchanged

IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}

QUANTISED = {
    "8 bits": {"load_in_8bit": True},
    "4 bits, nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4 bits, fp4, bfloat16": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
}


def with_lora(model: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))


def with_meft(coupling: str) -> Callable[..., nn.Module]:
    def adapt(model: nn.Module, backward: str) -> nn.Module:
        torch.manual_seed(3)
        return get_peft_model(model, meft.MeftConfig(coupling=coupling, backward=backward))

    return adapt


def lora_on_momentum(model: nn.Module, backward: str) -> nn.Module:
    return meft.make_reversible(with_lora(model), backward=backward)


METHODS = {"lora": lora_on_momentum, "meft1": with_meft("meft1"), "meft3": with_meft("meft3")}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    loss_of(model.train()(**BATCH)).backward()
    return taken(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    # bitsandbytes quantises blocks of 64 weights.
    llama(hidden_size=64).save_pretrained(path)
    return path


# bitsandbytes' own: of rounding the inputs of 8-bit products, and of its use of PyTorch.
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore::FutureWarning:bitsandbytes")
@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_are_rebuilt_exactly(folder: Path, method: str, bits: str) -> None:
    found, after_evaluation = [], []
    for backward in ("reversible", "cached"):
        quantised = LlamaForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**QUANTISED[bits]), device_map={"": "cpu"}
        )
        model = METHODS[method](quantised, backward)
        found.append(gradients(model))
        if backward == "reversible":
            assert meft.verify(model, BATCH).bitwise
        outputs(model.eval(), BATCH)
        after_evaluation.append(gradients(model))
    assert_equal(*found)
    assert_equal(*after_evaluation)
    # On some processors bitsandbytes rounds its 4-bit scales to bfloat16 and packs its weights when it is evaluated;
    # packed weights would pass no gradient on.
    assert_close(after_evaluation[0], found[0], relative=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_that_move_tensors_between_devices_go_on_working(method: str) -> None:
    dispatched = dispatch_model(llama(), device_map={"": "cpu"}, force_hooks=True)
    assert hasattr(dispatched.model.layers[0], "_hf_hook")
    found = gradients(METHODS[method](dispatched, "reversible"))
    # The loss of a model whose head has such a hook is not taken in tiles, which changes the order of sums.
    assert_close(found, gradients(METHODS[method](llama(), "reversible")), relative=1e-5)


def compile_layer(model: Any) -> None:
    model.model.layers[1].compile(backend="eager")


def wrap_layer(model: Any) -> None:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")


@pytest.mark.parametrize("change", [compile_layer, wrap_layer])
def test_adapters_are_not_placed_in_compiled_layers(change: Callable[[Any], None]) -> None:
    model = llama()
    change(model)
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"model\.layers\.1 of LlamaModel is compiled"):
        get_peft_model(model, meft.MeftConfig())


def test_adapters_are_not_placed_in_compiled_modules() -> None:
    model = llama()
    model.model.layers[0].mlp.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"mlp in model\.layers\.0 of LlamaModel is compiled.*leave out"):
        get_peft_model(model, meft.MeftConfig())


# What torch's own compiler imports, and looks at.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.slow
def test_compiled_modules_inside_a_layer_are_rebuilt_exactly() -> None:
    found = []
    for backward in ("reversible", "cached"):
        model = meft.make_reversible(llama(), backward=backward)
        for layer in model.model.layers:
            layer.mlp.compile()
        found.append(gradients(model))
    assert_close(*found, relative=1e-6)


def test_hooks_before_or_after_a_layer_s_backward_pass_are_refused() -> None:
    model = llama()
    handle = model.model.layers[2].register_forward_pre_hook(lambda module, args: None)
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"layers\.2 of LlamaModel has forward-pre or"):
        meft.make_reversible(model)
    handle.remove()
    meft.make_reversible(model)
