"""Layers in stages: before attention, attention, after it. The same numbers as whole layers, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig

import meft
from meft.backbone import layers
from meft.engine.stages import Chain
from meft.errors import UnsupportedModelError

LAYERS, TOKENS = 3, 13
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FURTHER: dict[str, dict[str, Any]] = {
    "cohere": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "olmo2": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "glm": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "helium": {"head_dim": 8},
    "arcee": {},
    "ernie4_5": {"head_dim": 8},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[Chain]:
    """The chains that layers were run as."""
    found: list[Chain] = []
    make = layers.chain_of

    def noted(*given: Any) -> Chain | None:
        chain = make(*given)
        found.extend([] if chain is None else [chain])
        return chain

    monkeypatch.setattr(layers, "chain_of", noted)
    return found


def build(
    kind: str = "llama", attention: str = "sdpa", dropout: float = 0.0, dtype: torch.dtype = torch.float32, **lora: Any
) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SHAPE, attention_dropout=dropout, **FURTHER[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    targets = ["q_proj", "o_proj"] if kind == "mixtral" else "all-linear"
    lora = {"target_modules": targets, "lora_dropout": dropout, **lora}
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **lora))
    return model.train()


def gradients(model: nn.Module, *, packed: bool = False) -> list[Tensor]:
    """One step on two rows, one of them padded; its loss, then all gradients."""
    ids = torch.randint(3, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = {"attention_mask": mask}
    if packed:
        ids = ids[:1]
        given = {"position_ids": torch.cat([torch.arange(5), torch.arange(TOKENS - 5)]).unsqueeze(0)}
    torch.manual_seed(2)
    loss = model(input_ids=ids, labels=ids, **given).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def run(options: dict[str, Any], packed: bool = False, **built: Any) -> list[Tensor]:
    return gradients(meft.make_reversible(build(**built), gamma=1 / 4, **options), packed=packed)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    differing = [index for index, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)]
    assert not differing


@pytest.mark.parametrize("kind", [kind for kind in FURTHER if kind != "cohere"])
def test_one_tile_gives_the_bits_of_whole_layers(kind: str, chains: list[Chain]) -> None:
    attention = "eager" if kind == "gemma2" else "sdpa"  # its capped logits have no other backend
    whole = run({"tile_size": None}, kind=kind, attention=attention)
    assert not chains
    staged = run({"tile_size": 99}, kind=kind, attention=attention)
    assert len(chains) == LAYERS
    assert_equal(staged, whole)


@pytest.mark.parametrize("attention, dropout", [("eager", 0.0), ("sdpa", 0.3), ("eager", 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tile_with_other_backends_and_dropout(
    attention: str, dropout: float, dtype: torch.dtype, chains: list[Chain]
) -> None:
    built: dict[str, Any] = {"attention": attention, "dropout": dropout, "dtype": dtype}
    assert_equal(run({"tile_size": 99, "backward": "cached"}, **built), run({"tile_size": 99}, **built))
    assert len(chains) == 2 * LAYERS
    if not dropout:
        assert_equal(run({"tile_size": 99}, **built), run({"tile_size": None}, **built))


@pytest.mark.parametrize("options", [{}, {"compensated": True}, {"sign": "random"}, {"granularity": "block"}])
@pytest.mark.parametrize("packed", [False, True])
def test_tiles_rebuild_what_cached_tiles_keep(options: dict[str, Any], packed: bool, chains: list[Chain]) -> None:
    rebuilt = run({"tile_size": 5, **options}, packed)
    kept = run({"tile_size": 5, "backward": "cached", **options}, packed)
    if "granularity" in options:
        # A feed-forward block in tiles adds up the weights' gradients in another order than autograd.
        assert torch.equal(rebuilt[0], kept[0])
        torch.testing.assert_close(rebuilt, kept, rtol=1e-4, atol=1e-6)
        assert_equal(run({"tile_size": 99, **options}, packed), run({"tile_size": None, **options}, packed))
        assert len(chains) == 3 * LAYERS
    else:
        assert_equal(rebuilt, kept)
        assert len(chains) == 2 * LAYERS
    whole = run({"tile_size": None, **options}, packed)
    torch.testing.assert_close(rebuilt, whole, rtol=1e-3, atol=1e-5)


def test_tiles_draw_the_random_numbers_of_cached_tiles(chains: list[Chain]) -> None:
    rebuilt = run({"tile_size": 5}, dropout=0.3)
    kept = run({"tile_size": 5, "backward": "cached"}, dropout=0.3)
    assert torch.equal(rebuilt[0], kept[0]) and len(chains) == 2 * LAYERS
    # Only the order in which tiles are summed differs.
    torch.testing.assert_close(rebuilt, kept, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("coupling", ["meft1", "meft2", "meft3", "momentum"])
def test_adapters_of_every_coupling(coupling: str, chains: list[Chain]) -> None:
    def adapted(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        config = CONFIG_MAPPING["llama"](**SHAPE)
        base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        settings = meft.MeftConfig(
            task_type="CAUSAL_LM", coupling=coupling, adapter_init_std=0.1, adapter_dropout=0.0, **options
        )
        return gradients(get_peft_model(base, settings).train())

    for size in (5, 99):
        rebuilt, kept = adapted(tile_size=size), adapted(tile_size=size, backward="cached")
        if coupling == "meft3" and size == 5:
            # Its feed-forward block is in tiles too, which add up the weights' gradients in an order of their own.
            assert torch.equal(rebuilt[0], kept[0])
            torch.testing.assert_close(rebuilt, kept, rtol=1e-4, atol=1e-6)
        else:
            assert_equal(rebuilt, kept)
    assert len(chains) == 4 * LAYERS
    assert_equal(adapted(tile_size=99), adapted(tile_size=None))


OTHERS = {
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    **dict.fromkeys(("bert", "roberta", "camembert", "xlm-roberta", "data2vec-text", "ernie", "roc_bert")),
    "electra": {},
    "mpnet": {},
}


def other(kind: str, dropout: float, attention: str, **options: Any) -> list[Tensor]:
    """The same of models without rotary embeddings."""
    torch.manual_seed(0)
    shape = SHAPE if kind == "gpt2" else {**SHAPE, "hidden_dropout_prob": dropout, "type_vocab_size": 2}
    drops = {"attn_pdrop": dropout, "resid_pdrop": dropout} if kind == "gpt2" else {}
    drops |= {} if kind == "gpt2" else {"attention_probs_dropout_prob": dropout}
    shape = {key: value for key, value in shape.items() if kind != "gpt2" or key.endswith(("_id", "vocab_size"))}
    config = CONFIG_MAPPING[kind](**shape | (OTHERS[kind] or {}) | drops)
    chosen = {} if kind == "mpnet" else {"attn_implementation": attention}
    maker = AutoModelForCausalLM if kind == "gpt2" else AutoModelForMaskedLM
    model = get_peft_model(
        maker.from_config(config, **chosen),
        LoraConfig(
            r=4,
            init_lora_weights=False,
            target_modules="all-linear",
            fan_in_fan_out=kind == "gpt2",
        ),
    )
    for name, parameter in model.named_parameters():
        # What enters the stack begins both streams, whose gradients autograd adds up in an order of its own.
        parameter.requires_grad_(parameter.requires_grad and (".layer." in name or ".h." in name))
    return gradients(meft.make_reversible(model.train(), gamma=1 / 4, **options))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", OTHERS)
def test_rows_without_rotary_embeddings(kind: str, dropout: float, chains: list[Chain]) -> None:
    for attention in ("sdpa", "eager"):
        chains.clear()
        assert_equal(
            other(kind, dropout, attention, tile_size=99, backward="cached"),
            other(kind, dropout, attention, tile_size=99),
        )
        assert len(chains) == 2 * LAYERS
        rebuilt = other(kind, dropout, attention, tile_size=5)
        kept = other(kind, dropout, attention, tile_size=5, backward="cached")
        assert torch.equal(rebuilt[0], kept[0])
        torch.testing.assert_close(rebuilt, kept, rtol=1e-4, atol=1e-6)
        if not dropout:
            assert_equal(other(kind, dropout, attention, tile_size=99), other(kind, dropout, attention, tile_size=None))


def test_full_fine_tuning_of_all_weights(chains: list[Chain]) -> None:
    def full(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), attn_implementation="sdpa").train()
        # What enters the stack begins both streams, whose gradients autograd adds up in an order of its own.
        model.get_input_embeddings().requires_grad_(False)
        return gradients(meft.make_reversible(model, gamma=1 / 4, **options))

    assert_equal(full(tile_size=5), full(tile_size=5, backward="cached"))
    assert_equal(full(tile_size=99), full(tile_size=None))
    assert len(chains) == 3 * LAYERS


def _listened(layer: Any) -> None:
    layer.self_attn.register_forward_hook(lambda module, args, output: None)


def _tile_listened(layer: Any) -> None:
    layer.mlp.up_proj.register_forward_pre_hook(lambda module, args: None)


def _overridden(layer: Any) -> None:
    attention = layer.self_attn

    class Scaled(type(attention)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, weights = super().forward(*args, **kwargs)
            return output * 2, weights

    attention.__class__ = Scaled


def _patched(layer: Any) -> None:
    forward = layer.self_attn.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output, weights = forward(*args, **kwargs)
        return output * 2, weights

    layer.self_attn.forward = doubled


def _mixing(layer: Any) -> None:
    class Mean(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden - hidden.mean(1, keepdim=True)

    layer.mlp = nn.Sequential(layer.mlp, Mean())


def _grown(layer: Any) -> None:
    layer.self_attn.extra = nn.Linear(4, 4)


CHANGES = [
    (_listened, "a hook on its LlamaAttention would see tiles"),
    (_tile_listened, "a hook on its Linear would see tiles"),
    (_overridden, "the stages of a Scaled are not known"),
    (_patched, "the stages of a LlamaAttention are not known"),
    (_mixing, "a Mean may mix tokens"),
    (_grown, "it has extra, which its stages would leave out"),
]


@pytest.mark.parametrize(("change", "why"), CHANGES)
def test_a_layer_that_is_not_what_its_row_says_runs_whole(change: Any, why: str, chains: list[Chain]) -> None:
    def changed(tile_size: int | None) -> list[Tensor]:
        model = build()
        change(model.base_model.model.model.layers[1])
        model = meft.make_reversible(model, gamma=1 / 4, tile_size=tile_size)
        if tile_size is not None:
            found = meft.report(model)
            assert found.whole == {"base_model.model.model.layers.1": why}
            assert f"not in stages: base_model.model.model.layers.1 ({why})" in str(found)
        return gradients(model)

    staged = changed(99)
    assert len(chains) == LAYERS - 1
    assert_equal(staged, changed(None))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, None),
        ({"tile_size": None}, "tile_size is None"),
        ({"granularity": "block"}, None),
    ],
)
def test_the_report_says_why_no_layer_runs_in_stages(options: dict[str, Any], why: str | None) -> None:
    found = meft.report(meft.make_reversible(build(), **options))
    assert found.whole == ({} if why is None else {"base_model.model.model.layers": why})
    assert ("not in stages" in str(found)) == (why is not None)


def test_the_report_says_that_a_compiled_layer_runs_whole() -> None:
    model = meft.make_reversible(build())
    model.base_model.model.model.layers[2].compile(backend="eager")
    assert meft.report(model).whole == {"base_model.model.model.layers.2": "it is compiled"}


def test_recorded_attention_weights_keep_layers_whole(chains: list[Chain]) -> None:
    model = meft.make_reversible(build(attention="eager"), tile_size=5)
    ids = torch.randint(3, 64, (1, TOKENS))
    assert len(model(input_ids=ids, output_attentions=True).attentions) == LAYERS
    assert not chains


def test_a_gradient_that_cannot_pass_between_stages_is_said() -> None:
    """A loss on what a layer left on the side: its graph ends at the boundary."""
    model = meft.make_reversible(build(), tile_size=5)
    mlp = model.base_model.model.model.layers[1].mlp
    caught: list[Tensor] = []
    activation = mlp.act_fn

    class Caught(type(activation)):
        def forward(self, hidden: Tensor) -> Tensor:
            if not caught:
                caught.append(hidden)
            return super().forward(hidden)

    Caught.__module__ = "transformers.activations"
    activation.__class__ = Caught
    ids = torch.randint(3, 64, (1, TOKENS))
    loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(UnsupportedModelError, match=r"caught inside a reversible layer.*tile_size=None"):
        (loss + caught[0].square().mean()).backward()


def test_stages_take_less_memory() -> None:
    def peak(**options: Any) -> int:
        torch.manual_seed(0)
        shape = {**SHAPE, "hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 1024}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), attn_implementation="sdpa").model
        model = meft.make_reversible(model.to(torch.bfloat16).train(), gamma=1 / 4, **options)
        ids = torch.randint(3, 64, (1, 1024), generator=torch.Generator().manual_seed(1))

        def step() -> None:
            model(input_ids=ids)[0].float().square().mean().backward()

        step()
        return meft.measure(step, model=model).activation_peak_bytes

    whole, staged = peak(tile_size=None), peak()
    assert staged < 0.6 * whole
    assert staged < peak(granularity="block")
