"""Models whose hidden states grow like those of real language models train, are evaluated and generate by default."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import meft
from meft.errors import StreamOverflowError

COUPLINGS = ("momentum", "meft1", "meft2", "meft3")
IDS = torch.tensor([[3, 5, 7, 9, 11, 2, 4, 6]])


def outlier_model(scale: float = 1.0, outlier: float = 2e5, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama whose second layer writes a channel of `outlier` times the rms of what enters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-12,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=0.1 * scale)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale * 5)
            layer.mlp.down_proj.weight.mul_(scale * 5)
        down = model.model.layers[1].mlp.down_proj
        reached: list[float] = []
        handle = down.register_forward_hook(lambda _, __, out: reached.append(out[..., 3].abs().max().item()))
        model(IDS)
        handle.remove()
        down.weight[3] *= outlier * 0.1 * scale / reached[0]
    return model.to(dtype)


def largest(model: nn.Module) -> float:
    return max(state.abs().max().item() for state in model(IDS, output_hidden_states=True).hidden_states[:-1])


def gradients(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_nothing_overflows_by_default(coupling: str, dtype: torch.dtype) -> None:
    plain = outlier_model(dtype=dtype)
    assert largest(plain.eval()) > 1.5e4
    model = meft.make_reversible(copy.deepcopy(plain).train(), coupling)
    cached = meft.make_reversible(copy.deepcopy(plain).train(), coupling, backward="cached")
    found, wanted = gradients(model), gradients(cached)
    order_of_sums = 1e-8 if dtype == torch.float32 else 1e-4
    assert (found - wanted).norm() <= order_of_sums * wanted.norm()
    model.eval()
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
        model.generate(IDS, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("gamma", [1 / 4, 1 / 16])
def test_gradients_are_those_of_float_streams_at_every_scale(gamma: float, scale: float) -> None:
    exact = meft.make_reversible(outlier_model(scale, outlier=30).train(), gamma=gamma)
    floating = meft.make_reversible(
        outlier_model(scale, outlier=30).train(), gamma=gamma, arithmetic="float", backward="cached"
    )
    found, wanted = gradients(exact), gradients(floating)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_fixed_grid_that_overflows_names_one_that_does_not() -> None:
    model = meft.make_reversible(outlier_model(outlier=2e6).train(), fraction_bits=16)
    with pytest.raises(StreamOverflowError, match=r'fraction_bits="auto" follows the model') as caught:
        gradients(model)
    bits = int(str(caught.value).partition(" would fit")[0].rpartition("=")[2])
    for options in ({"fraction_bits": bits}, {}):
        other: dict[str, Any] = options
        assert gradients(meft.make_reversible(outlier_model(outlier=2e6).train(), **other)).isfinite().all()


def test_evaluation_computes_what_training_computes_and_is_never_stopped() -> None:
    plain = outlier_model()
    fixed = meft.make_reversible(copy.deepcopy(plain).train(), fraction_bits=14)
    trained = fixed(IDS).logits
    with torch.no_grad():
        assert torch.equal(fixed.eval()(IDS).logits, trained)
    overflowing = meft.make_reversible(copy.deepcopy(plain).eval(), fraction_bits=24)
    automatic = meft.make_reversible(copy.deepcopy(plain).eval())
    with torch.no_grad():
        found, wanted = overflowing(IDS).logits, automatic(IDS).logits
        overflowing.generate(IDS, max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_what_is_not_finite_stays_so_in_evaluation_and_is_an_error_in_training() -> None:
    model = outlier_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    model = meft.make_reversible(model)
    with torch.no_grad():
        assert model.eval()(IDS).logits.isnan().any()
    with pytest.raises(StreamOverflowError, match="overflows its dtype, or diverges"):
        gradients(model.train())


def test_the_forward_pass_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = meft.make_reversible(outlier_model().train())
    looked: list[str] = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: looked.append("tolist") or original(self))
    for name in ("item", "__bool__", "__float__", "__int__"):
        before = getattr(torch.Tensor, name)

        def watched(self: torch.Tensor, *args: Any, before: Any = before, name: str = name) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            if "meft/engine" in caller or "meft/backbone" in caller:
                looked.append(name)
            return before(self, *args)

        monkeypatch.setattr(torch.Tensor, name, watched)
    loss = model(IDS, labels=IDS).loss
    assert looked == []
    loss.backward()
    assert looked.count("tolist") == 1
