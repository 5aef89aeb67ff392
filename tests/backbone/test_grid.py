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
    # But for the order in which the gradients of the streams are summed up.
    assert (found - wanted).norm() <= (1e-8 if dtype == torch.float32 else 1e-4) * wanted.norm()
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
    with pytest.raises(StreamOverflowError, match=r'fraction_bits="auto", the default, follows the model') as caught:
        gradients(model)
    bits = int(str(caught.value).partition(" would fit")[0].rpartition("=")[2])
    for options in ({"fraction_bits": bits}, {}):
        other: dict[str, Any] = options
        assert gradients(meft.make_reversible(outlier_model(outlier=2e6).train(), **other)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", ["auto", 12])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_evaluation_computes_what_training_computes(coupling: str, bits: int | str, dtype: torch.dtype) -> None:
    plain = outlier_model(dtype=dtype)
    model = meft.make_reversible(plain.train(), coupling, fraction_bits=bits, fused_loss=False)
    trained = model(IDS).logits
    with torch.no_grad():
        without_graph = model(IDS).logits
        assert torch.equal(model.eval()(IDS).logits, trained) and torch.equal(without_graph, trained)
    assert torch.equal(model(IDS).logits, trained)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_fixed_grid_that_overflows_is_no_error_in_evaluation(coupling: str) -> None:
    plain = outlier_model()
    fixed = meft.make_reversible(copy.deepcopy(plain), coupling, fraction_bits=24, fused_loss=False)
    with pytest.raises(StreamOverflowError):
        fixed.train()(IDS)
    automatic = meft.make_reversible(copy.deepcopy(plain).eval(), coupling, fused_loss=False)
    with torch.no_grad():
        found, wanted = fixed.eval()(IDS).logits, automatic(IDS).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        for cache in (True, False):
            fixed.generate(IDS, max_new_tokens=2, do_sample=False, use_cache=cache)
    # Gradients in evaluation mode, which some scripts take to have no dropout.
    ours, theirs = gradients(fixed), gradients(automatic)
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_what_is_not_finite_is_an_error_in_training() -> None:
    model = outlier_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    for bits in ("auto", 8):
        found = meft.make_reversible(copy.deepcopy(model).train(), fraction_bits=bits)
        with pytest.raises(StreamOverflowError, match=r"layers 2 to 3.*overflows its dtype, or diverges"):
            gradients(found)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_where_the_plain_model_leaves_it_in_evaluation(value: float) -> None:
    plain = outlier_model(outlier=30).eval()
    with torch.no_grad():
        plain.model.embed_tokens.weight[8] = value
    model = meft.make_reversible(copy.deepcopy(plain), fused_loss=False)
    rows = torch.cat([IDS, IDS])
    rows[0, 5] = 8
    with torch.no_grad():
        found, wanted = model(rows).logits, model(IDS).logits
        lost = plain(rows).logits.isnan()
    assert lost[0, 5].all() and torch.equal(found.isnan(), lost)
    torch.testing.assert_close(found[1:], wanted, rtol=1e-4, atol=1e-4)


def test_an_automatic_grid_that_overflows_gives_nan_and_an_error_in_the_backward_pass() -> None:
    model = meft.make_reversible(outlier_model(outlier=3e6, dtype=torch.bfloat16).train(), fused_loss=False)
    output = model(IDS, labels=IDS)
    assert output.loss.isnan()
    with pytest.raises(StreamOverflowError, match="fraction_bits='auto' holds magnitudes below") as caught:
        output.loss.backward()
    bits = int(str(caught.value).partition(" would fit")[0].rpartition("=")[2])
    model = outlier_model(outlier=3e6, dtype=torch.bfloat16).train()
    assert gradients(meft.make_reversible(model, fraction_bits=bits)).isfinite().all()
    with torch.no_grad():
        assert model.eval()(IDS).logits.isfinite().all()


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
