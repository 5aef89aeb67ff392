"""The example scripts run offline, and rebuilding activations changes nothing but memory in them."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import meft
from meft.integrations.callbacks import DRIFT, PEAK
from support.launching import EXAMPLES

pytest.importorskip("trl", minversion="1.16")

pytestmark = [
    pytest.mark.usefixtures("quick_collection"),
    # TRL hands on names that Transformers 5.23 deprecates.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),
    # The profiler of the step that is measured meets modules that TRL compiles with annotations.
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.param)


def training_logs(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def run(example: ModuleType, folder: Path, *words: str) -> Any:
    return example.main(["--steps=2", f"--output={folder}", *words])


@pytest.mark.parametrize(
    ("example", "method"),
    [
        ("sft", "meft1"),
        ("sft", "lora"),
        ("dpo", "meft1"),
        ("dpo", "lora"),
        ("trainer", "momentum"),
        ("trainer", "full"),
    ],
    indirect=["example"],
)
def test_losses_are_those_of_stored_activations_and_memory_falls(
    example: ModuleType, method: str, tmp_path: Path
) -> None:
    logs = {
        backward: training_logs(run(example, tmp_path / backward, f"--method={method}", f"--backward={backward}"))
        for backward in ("reversible", "cached")
    }
    losses = {backward: [entry["loss"] for entry in entries] for backward, entries in logs.items()}
    assert len(losses["cached"]) == 2 and losses["cached"][0] != losses["cached"][1]
    assert losses["reversible"] == pytest.approx(losses["cached"], rel=1e-6)
    assert [entry[DRIFT] for entry in logs["reversible"]] == [0.0, 0.0]
    assert logs["reversible"][1][PEAK] < logs["cached"][1][PEAK]
    saved = [load_file(next((tmp_path / backward).glob("*.safetensors"))) for backward in ("reversible", "cached")]
    for name, tensor in saved[1].items():
        torch.testing.assert_close(saved[0][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("example", ["sft"], indirect=True)
def test_what_sft_saved_loads_as_any_adapter(example: ModuleType, tmp_path: Path) -> None:
    from offline import causal_lm

    base, tokenizer = causal_lm(None)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = run(example, tmp_path / "run", f"--model={tmp_path / 'base'}")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.tensor([[0, 4, 6, 9]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("example", ["sft"], indirect=True)
def test_sft_packs_and_takes_the_loss_of_completions_only(example: ModuleType, tmp_path: Path) -> None:
    trainer = run(example, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = batch["position_ids"] == 0
    assert starts.sum() > 2 * len(batch["input_ids"])
    trained = batch["labels"] != -100
    prompt_only = trainer.processing_class.convert_tokens_to_ids(["where", "?"])
    assert trained.any() and not torch.isin(batch["input_ids"][trained], torch.tensor(prompt_only)).any()


@pytest.mark.parametrize("example", ["dpo"], indirect=True)
def test_the_reference_of_dpo_is_the_model_without_its_adapter(example: ModuleType, tmp_path: Path) -> None:
    """LoRA begins as nothing, so policy and reference agree; MEFT couples two streams and begins a little off."""
    lora, meft1 = (training_logs(run(example, tmp_path, f"--method={method}"))[0] for method in ("lora", "meft1"))
    assert lora["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert meft1["loss"] != pytest.approx(math.log(2), rel=1e-6)
    assert meft1["rewards/margins"] != 0


@pytest.mark.parametrize("method", ["meft1", "lora"])
@pytest.mark.parametrize("example", ["dpo"], indirect=True)
def test_dpo_goes_on_from_an_adapter(example: ModuleType, method: str, tmp_path: Path) -> None:
    """Without `peft_config` TRL makes a frozen copy of the adapter the reference: policy and reference agree."""
    from offline import causal_lm, questions
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = causal_lm(None)
    if method == "lora":
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        model: PeftModel = get_peft_model(meft.make_reversible(model), config)
    else:
        model = get_peft_model(model, meft.MeftConfig(task_type="CAUSAL_LM"))
    arguments = DPOConfig(str(tmp_path), max_steps=2, logging_steps=1, bf16=False, use_cpu=True, report_to="none")
    rows = questions(None, preferences=True)
    trainer = DPOTrainer(model, args=arguments, processing_class=tokenizer, train_dataset=rows)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in training_logs(trainer)]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6) and losses[1] != losses[0]
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved and all(".default." in name for name in moved)
