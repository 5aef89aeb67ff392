"""What `meft.estimate` answers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import PretrainedConfig, Qwen2Config, T5Config

import meft
from meft.errors import CheckpointError, ConfigError, MeftWarning, UnsupportedModelError
from meft.memory import BudgetError, MemoryEstimate
from meft.memory.estimation.blueprint import Blueprint, read_blueprint
from meft.memory.estimation.predict import Predictor, optimizer_bytes
from meft.memory.measurement.causes import CAUSES, GRADIENTS, OPTIMIZER_STATE
from meft.methods.registry import COMPARED, read_way
from support.memory_families import real_step, small_config

SMALL: dict[str, Any] = {"batch_size": 2, "seq_len": 32, "dtype": "float32", "device": "cpu"}


def estimate(family: str = "bert", layers: int = 3, **options: Any) -> MemoryEstimate:
    return meft.estimate(small_config(family, layers=layers), **{"task_type": None, **SMALL, **options})


def text_of(report: Any) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report)
    return capture.get()


def test_the_report_is_consistent() -> None:
    report = estimate("opt", method="lora")

    assert (report.method, report.task_type, report.dtype) == ("lora", "CAUSAL_LM", "float32")
    assert report.peak_bytes == sum(report.causes.values())
    assert report.activation_peak_bytes == sum(report.activation_causes.values())
    assert report.total_bytes == sum(report.total_causes.values())
    assert tuple(report.causes) == CAUSES
    assert report.activation_causes[GRADIENTS] == 0
    assert report.weights_bytes == 4 * report.parameters
    assert report.gradient_bytes == 4 * report.trainable_parameters
    # Two moments, and a counter for each of 3 x 6 pairs of matrices.
    assert report.optimizer_bytes == 8 * report.trainable_parameters + 4 * 3 * 6 * 2
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


def test_the_report_prints_a_table_by_cause_and_the_code() -> None:
    report = estimate(method="momentum", task_type="SEQ_CLS", gamma=0.125)

    text = text_of(report)

    for word in ("weights", "streams", "residues", "working set of a layer", "sum"):
        assert word in text
    assert 'get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", coupling="momentum", gamma=0.125))' in text


@pytest.mark.parametrize("method", COMPARED)
def test_every_recipe_runs_and_its_code_is_python(method: str) -> None:
    report = estimate(method=method)

    assert report.method == method
    assert report.peak_bytes > 0
    compile(report.code, method, "exec")


def test_reversible_layers_need_less_than_stored_activations() -> None:
    needs = {method: estimate(layers=6, method=method).activation_peak_bytes for method in ("full", "lora", "momentum")}

    assert needs["momentum"] < 0.5 * needs["full"] < needs["lora"]


def test_code_can_be_run() -> None:
    from peft import LoraConfig, get_peft_model

    for method in ("full+checkpointing", "lora+momentum", "meft1"):
        report = estimate("bert", method=method, task_type="SEQ_CLS")
        base = read(small_config("bert"), "SEQ_CLS").build()
        names = {"base": base, "get_peft_model": get_peft_model, "LoraConfig": LoraConfig, "meft": meft}
        code = report.code.replace("gradient_checkpointing_enable", "activation_checkpointing_enable")
        exec(code if hasattr(base, "activation_checkpointing_enable") else report.code, names)
        assert any(parameter.requires_grad for parameter in names["model"].parameters())  # type: ignore[attr-defined]


def read(config: PretrainedConfig, task_type: str | None = None, **options: Any) -> Blueprint:
    usual = {"dtype": "float32", "attn_implementation": None, "padded": False, "attention_dropout": True}
    return read_blueprint(config, task_type=task_type, **{**usual, **options})


@pytest.mark.parametrize(
    ("family", "method"),
    [("bert", "full"), ("bert", "lora+checkpointing"), ("opt", "lora+momentum"), ("bert", "meft3"), ("bart", "full")],
)
def test_carried_on_from_few_layers_is_what_all_layers_give(family: str, method: str) -> None:
    blueprint = read(small_config(family, layers=8))
    few = Predictor(blueprint, read_way(method, {}), None, 1)
    every = Predictor(blueprint, read_way(method, {}), None, 1)
    every.whole = True

    assert few.at(2, 24) == every.at(2, 24)
    assert not few.whole
    assert max(max(depths) for depths in few._built) < 8


@pytest.mark.parametrize("index", [1, 4, 7])
def test_layers_that_are_not_alike_are_all_run(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("llama", layers=8)
    build = Blueprint.build

    def uneven(blueprint: Blueprint) -> Any:
        model = build(blueprint)
        with torch.device("meta"):
            model.model.layers[index].mlp = type(model.model.layers[index].mlp)(_wider(config))
        return model

    monkeypatch.setattr(Blueprint, "build", uneven)
    predictor = Predictor(read(config), read_way("full", {}), None, 1)

    predictor.at(2, 24)

    assert predictor.whole == (index > 1)  # the lowest two are in every run
    assert ((8,) in predictor._built) == predictor.whole


def test_layers_that_turn_out_not_to_be_alike_are_all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every second layer attends to a window, for which it needs a mask.
    monkeypatch.setattr("meft.memory.estimation.predict._alike", lambda layers: True)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    windows = {"sliding_window": 8, "layer_types": [*["full_attention", "sliding_attention"] * 4, "full_attention"]}
    config = Qwen2Config(**sizes, **windows, use_sliding_window=True, num_hidden_layers=9, vocab_size=100)
    predictor = Predictor(read(config), read_way("full", {}), None, 1)

    predictor.at(2, 24)

    assert predictor.whole


def _wider(config: PretrainedConfig) -> PretrainedConfig:
    other = type(config)(**config.to_dict())
    other.intermediate_size = 8 * config.hidden_size
    return other


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "sgd+momentum", "adafactor", "rmsprop", "adagrad", "none"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_optimizers(name: str, device: str) -> None:
    from meft.memory.estimation.optimizers import optimizer_maker

    weights = [nn.Parameter(torch.ones(16, 32)), nn.Parameter(torch.ones(16))]
    make = optimizer_maker(name, foreach=device == "cuda")

    state, most = optimizer_bytes(weights, make)

    if make is None:
        assert (state, most) == (0, 0)
        return
    optimizer = make(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    assert state == sum(value.nbytes for value in kept)
    measured = meft.measure(optimizer.step, parameters=weights, optimizer=optimizer).peak_bytes
    assert most == pytest.approx(measured, rel=0.05, abs=100)


def test_the_step_of_the_optimizer_may_be_the_worst_moment() -> None:
    report = estimate(method="full", batch_size=1, seq_len=2)

    assert report.total_causes[GRADIENTS] == report.gradient_bytes
    assert report.total_causes[OPTIMIZER_STATE] > report.optimizer_bytes
    assert estimate(method="full", batch_size=1, seq_len=2, optimizer="none").total_causes[OPTIMIZER_STATE] == 0


def test_a_budget_gives_the_largest_batch() -> None:
    enough = estimate(method="lora", batch_size=7).total_bytes

    report = estimate(method="lora", budget=enough)

    assert (report.batch_size, report.seq_len, report.total_bytes) == (7, 32, enough)
    assert estimate(method="lora", budget=enough - 1).batch_size == 6


def test_a_budget_gives_the_longest_sequence_up_to_the_positions() -> None:
    enough = estimate(method="meft1", seq_len=77).total_bytes

    report = estimate(method="meft1", budget=enough, longest="sequence")

    assert (report.batch_size, report.limited) == (2, False)
    assert 77 <= report.seq_len < 80
    assert report.total_bytes <= enough < estimate(method="meft1", seq_len=report.seq_len + 1).total_bytes
    limited = estimate(method="meft1", budget="1GiB", longest="sequence")
    assert (limited.seq_len, limited.limited) == (162, True)


def test_images_have_no_sequences() -> None:
    report = estimate("vit", method="momentum", budget="64MiB")

    assert report.batch_size > 10
    assert report.shape == f"batch {report.batch_size}"
    with pytest.raises(ConfigError) as caught:
        estimate("vit", method="momentum", budget="64MiB", longest="sequence")
    assert str(caught.value) == (
        "longest is 'sequence', but vit is a model of images, whose size is fixed. Ask for the largest batch: 'batch'."
    )


def test_a_budget_in_which_nothing_fits() -> None:
    with pytest.raises(BudgetError) as caught:
        estimate(method="full", budget="1MiB")

    needed = estimate(method="full", batch_size=1).total_bytes
    assert caught.value.needed == needed
    assert str(caught.value) == (
        f"budget is 1.0 MiB, in which nothing fits: full needs at least {needed / 2**20:.1f} MiB (1 x 32 tokens), "
        f"{estimate(method='full').weights_bytes / 2**10:.1f} KiB of it for weights. Give a larger budget, another "
        "method, or a smaller seq_len."
    )
    with pytest.raises(ConfigError, match=r"full needs at least .* \(2 x 2 tokens\).*or a smaller batch_size\.$"):
        estimate(method="full", budget="1MiB", longest="sequence")


def test_cuda_rounds_and_keeps_attention_weights_out() -> None:
    config = small_config("bert", dropout=0.1)

    on_cpu = meft.estimate(config, method="full", **{**SMALL, "seq_len": 150})
    on_cuda = meft.estimate(config, method="full", **{**SMALL, "seq_len": 150, "device": "cuda"})

    assert all(size % 512 == 0 for size in on_cuda.causes.values())
    weights_of_attention = 3 * 2 * 4 * 150 * 150 * 4
    assert on_cpu.peak_bytes - on_cuda.peak_bytes > weights_of_attention


def test_layer_drop_keeps_every_layer() -> None:
    config = small_config("opt")
    config.layerdrop = 0.5

    assert meft.estimate(config, method="full", **SMALL).peak_bytes == estimate("opt", method="full").peak_bytes


def test_padding_costs_a_mask() -> None:
    assert estimate("llama", method="full", padded=True).peak_bytes > estimate("llama", method="full").peak_bytes


def test_autocast_stores_activations_in_half() -> None:
    full = estimate(method="full", seq_len=128)
    mixed = estimate(method="full", seq_len=128, autocast="bfloat16")

    assert mixed.weights_bytes == full.weights_bytes
    assert mixed.activation_peak_bytes < 0.9 * full.activation_peak_bytes


def test_folders_and_files(tmp_path: Path) -> None:
    small_config("bert").save_pretrained(tmp_path)

    from_folder = meft.estimate(tmp_path, method="full", **SMALL)
    from_file = meft.estimate(str(tmp_path / "config.json"), method="full", **SMALL)

    assert from_folder.model == str(tmp_path)
    assert from_folder.peak_bytes == from_file.peak_bytes == estimate(method="full").peak_bytes


def test_what_is_passed_in_stays_as_it_is() -> None:
    config = small_config("llama", dropout=0.0)
    config.attention_dropout = 0.1
    before = config.to_dict()

    meft.estimate(config, method="lora", **{**SMALL, "device": "cuda"})

    assert config.to_dict() == before


def test_real_models_still_run_after_an_estimate() -> None:
    before = real_step("llama", "momentum").peak_bytes
    estimate("llama", method="momentum")

    assert real_step("llama", "momentum").peak_bytes == before


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 0}, "batch_size=0"),
    ({"seq_len": 1}, "seq_len=1"),
    ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, bfloat16, float16, float64."),
    ({"optimizer": "adamx"}, "optimizer is 'adamx'; it must be one of adamw, adam, sgd, sgd+momentum, adafactor,"),
    ({"task_type": "SPEECH"}, "task_type is 'SPEECH'; it must be one of CAUSAL_LM, SEQ_2_SEQ_LM,"),
    ({"device": "tpu"}, "device='tpu' is unknown. Valid: 'cpu', 'cuda'."),
    ({"longest": "layers"}, "longest='layers' is unknown. Valid: 'batch', 'sequence', 'setting'."),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation is 'flash_attention_2'; steps on tensors"),
    (
        {"method": "meft9"},
        "method is 'meft9'; it must be one of full, lora, ia3, bitfit, adapter, meft1, meft2, meft3, momentum; full, "
        "lora, ia3, bitfit may stand on a reversible backbone (+meft1, +meft2, +meft3, +momentum: lora+momentum), and "
        "full, lora, ia3, bitfit, adapter may be followed by +checkpointing or +offload.",
    ),
    ({"method": "meft1+offload"}, "method is 'meft1+offload'; it must be one of"),
    ({"method": "lora+"}, "method is 'lora+'; it must be one of"),
    ({"method": "adapter+momentum"}, "method is 'adapter+momentum', but the adapters of meft are coupled by their own"),
    ({"method": "meft1", "depth": 3}, "Unknown option 'depth'; the options of a method are bottleneck_dim,"),
    ({"method": "lora", "gamma": 0.5}, "gamma is 0.5, but method 'lora' has no such option; it belongs to momentum."),
    ({"method": "meft1", "lam": 0.3}, "lam=0.3 has no integer inverse"),
    ({"method": "lora+momentum", "gamma": 0.3}, "gamma=0.3 has no integer inverse"),
    ({"seq_len": 163}, "seq_len is 163, but bert takes at most 162 tokens. Use 162 or less."),
    ({"budget": "much"}, "budget is 'much', which is no size."),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        estimate(**{"method": "meft1", **options})

    assert str(caught.value).startswith(message)


def test_a_sequence_longer_than_rotary_positions_is_only_warned_of() -> None:
    with pytest.warns(MeftWarning) as caught:
        report = estimate("llama", method="lora", seq_len=200)

    assert report.seq_len == 200
    assert [str(warning.message) for warning in caught if warning.category is MeftWarning] == [
        "seq_len is 200, but llama was made for at most 160 tokens. The memory is estimated all the same."
    ]


def test_roberta_counts_positions_from_its_padding() -> None:
    with pytest.raises(ConfigError, match="seq_len is 161, but roberta takes at most 160 tokens"):
        estimate("roberta", method="lora", seq_len=161)


def test_places_without_a_configuration(tmp_path: Path) -> None:
    missing, adapter, empty, broken = (tmp_path / name for name in ("missing", "adapter", "empty", "broken"))
    for folder in (adapter, empty, broken):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (broken / "config.json").write_text("{")
    (tmp_path / "other.json").write_text('{"model_type": "no_such_model"}')

    for path, kind, message in [
        (missing, CheckpointError, f"{missing} does not exist. Give a model's folder, its config.json, or its name on"),
        (empty, CheckpointError, f"{empty} has no config.json, so it holds no model that could be built. Give a model"),
        (adapter, CheckpointError, f"{adapter} has no config.json, so it holds no model that could be built. It is an"),
        (broken, CheckpointError, f"{broken} could not be loaded: "),
        (tmp_path / "other.json", UnsupportedModelError, "is no model that Transformers"),
    ]:
        with pytest.raises(kind) as caught:
            meft.estimate(path, method="lora", **SMALL)
        assert message in str(caught.value)


def test_a_name_that_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no-such-owner/no-such-model could not be loaded"):
        meft.estimate("no-such-owner/no-such-model", method="lora", **SMALL)


def test_a_step_that_looks_at_values() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        estimate("bart", method="full", task_type="SEQ_CLS")

    text = str(caught.value)
    assert text.startswith("A step of bart (BartForSequenceClassification) by full with batch_size=2 and seq_len=32 ")
    assert "cannot run on tensors without values" in text
    assert text.endswith("Measure a real step with meft.measure instead, or choose another task_type.")


def test_a_model_without_that_head() -> None:
    with pytest.raises(UnsupportedModelError, match="t5 cannot be built for IMAGE_CLS with Transformers"):
        meft.estimate(T5Config(), method="full", task_type="IMAGE_CLS", **SMALL)
