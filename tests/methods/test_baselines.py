"""(IA)3 and BitFit: each trains exactly what it says, and what was trained is saved and loaded alike."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    ModernBertConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    XLMRobertaConfig,
)

import meft
from meft.errors import ConfigError, UnsupportedModelError
from meft.methods.baselines import ia3_config
from meft.methods.registry import PLAIN_METHODS, apply_method, read_way
from support.models import batch, build
from support.tiny import evaluate, make_model, make_rte, train

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
XLMR = XLMRobertaConfig(**SMALL, max_position_embeddings=24)
DISTILBERT = DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
MODERN = ModernBertConfig(**SMALL, cls_token_id=0, sep_token_id=2)
GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2, pad_token_id=1)
MIXTRAL = MixtralConfig(**SMALL, num_key_value_heads=1)
EXPERTS = Qwen3MoeConfig(**SMALL, num_key_value_heads=1, moe_intermediate_size=8, num_experts=2)


def classifier(config: PretrainedConfig) -> nn.Module:
    return AutoModelForSequenceClassification.from_config(config)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def scaled(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The modules that (IA)3 scales, by their place in layer 0, and the shapes of the factors."""
    return {
        name.split(".ia3_l")[0].partition(".0.")[2]: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if ".ia3_l." in name and ".0." in name
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # PEFT knows GPT-2; keys and values are one matrix with the queries there.
        (GPT2, {"attn.c_attn": (48, 1), "mlp.c_proj": (1, 64)}),
        # The others it does not know.
        (XLMR, {"attention.self.key": (16, 1), "attention.self.value": (16, 1), "output.dense": (1, 24)}),
        (DISTILBERT, {"attention.k_lin": (16, 1), "attention.v_lin": (16, 1), "ffn.lin2": (1, 24)}),
        (MODERN, {"attn.Wqkv": (48, 1), "mlp.Wo": (1, 24)}),
    ],
)
def test_ia3_scales_keys_values_and_the_inside_of_feed_forwards(
    config: PretrainedConfig, expected: dict[str, tuple[int, ...]]
) -> None:
    model = apply_method(classifier(config), "ia3", task_type="SEQ_CLS")
    assert scaled(model) == expected
    assert isinstance(model.peft_config["default"], peft.IA3Config)
    rest = {name for name in trained(model) if ".ia3_l." not in name}
    assert rest and all(".modules_to_save." in name for name in rest)  # the head


def test_ia3_starts_from_the_pretrained_model() -> None:
    model, inputs = build("bert").eval(), batch("bert")
    plain = copy.deepcopy(model)(**inputs).logits
    torch.testing.assert_close(apply_method(model, "ia3", task_type="SEQ_CLS").eval()(**inputs).logits, plain)


def test_ia3_takes_the_modules_of_peft_where_peft_knows_them_all() -> None:
    assert ia3_config(build("bert"), "SEQ_CLS", None).target_modules is None
    model = apply_method(build("opt"), "ia3", task_type="SEQ_CLS")
    assert model.peft_config["default"].target_modules == {"q_proj", "k_proj", "fc2"}


@pytest.mark.parametrize("config", [MIXTRAL, EXPERTS])
def test_ia3_refuses_feed_forwards_without_linear_layers(config: PretrainedConfig) -> None:
    """PEFT's table knows the experts of Mixtral by a name that they no longer have."""
    message = (
        r"Method 'ia3' .* but the second linear layer of the feed-forward of model\.layers\.0 of \w+, a \w+, was not"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        apply_method(classifier(config), "ia3", task_type="SEQ_CLS")


def test_ia3_refuses_an_attention_without_keys_and_values() -> None:
    model = classifier(XLMR)
    model.roberta.encoder.layer[1].attention.self.value = nn.Identity()
    with pytest.raises(
        UnsupportedModelError, match=r"projections to keys and values of roberta\.encoder\.layer\.1 of XLMRobertaM"
    ):
        apply_method(model, "ia3", task_type="SEQ_CLS")


@pytest.mark.parametrize(
    ("family", "head", "named"),
    [
        ("bert", "classifier", None),
        ("opt", "score", None),
        # PEFT does not know BART's head; whoever trains it names it, as `meft train` does.
        ("bart", "classification_head", ("classification_head",)),
    ],
)
def test_bitfit_trains_the_biases_and_the_head_only(family: str, head: str, named: tuple[str, ...] | None) -> None:
    model = build(family)
    assert apply_method(model, "bitfit", task_type="SEQ_CLS", modules_to_save=named) is model
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    heads = {name for name, _ in model.named_parameters() if name.startswith(head)}
    assert len(biases) > 20 and heads - biases
    assert trained(model) == biases | heads


def test_bitfit_trains_whole_modules_that_are_named() -> None:
    model = apply_method(build("bert"), "bitfit", task_type="SEQ_CLS", modules_to_save=("pooler",))
    weights = {name for name in trained(model) if name.endswith("weight")}
    assert weights == {"bert.pooler.dense.weight", "classifier.weight"}
    with pytest.raises(
        ConfigError, match=r"modules_to_save names 'poller', but BertFor\w+ has no such module\. Its mo"
    ):
        apply_method(build("bert"), "bitfit", task_type="SEQ_CLS", modules_to_save=("poller",))


def test_bitfit_refuses_a_model_without_biases() -> None:
    config = LlamaConfig(**SMALL)
    with pytest.raises(UnsupportedModelError, match=r"LlamaFor\w+ has no biases outside of its task head, so method"):
        apply_method(classifier(config), "bitfit", task_type="SEQ_CLS")


@pytest.mark.parametrize("method", ["ia3", "bitfit"])
def test_a_coupling_goes_under_the_method(method: str) -> None:
    model = apply_method(build("bert"), method, task_type="SEQ_CLS")
    meft.make_reversible(model, coupling="momentum")
    assert meft.verify(model, batch("bert")).passed()
    assert method in PLAIN_METHODS and read_way(f"{method}+momentum", {}).coupled


@pytest.mark.parametrize("method", ["ia3", "bitfit"])
def test_what_was_trained_is_saved_and_evaluated_alike(method: str, tmp_path: Path) -> None:
    model, data = make_model(tmp_path / "model"), make_rte(tmp_path / "RTE")
    words = [f"--task=rte --data_dir={data}".split(), tmp_path / "run", f"--method={method}", "--max_steps=6"]
    found = train(model, *words, "--learning_rate=0.05")
    again = evaluate(tmp_path / "run")
    assert again == found["metrics"]
    saved = {path.name for path in (tmp_path / "run").iterdir()}
    assert ("adapter_config.json" in saved) == (method == "ia3") and ("config.json" in saved) == (method == "bitfit")
    if method == "bitfit":
        before = AutoModelForSequenceClassification.from_pretrained(model).state_dict()
        after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        # The pooler is new, so `meft train` trains it with the head.
        assert all(re.search(r"bias$|^classifier|pooler", name) for name in moved)
        assert any("encoder" in name for name in moved)
