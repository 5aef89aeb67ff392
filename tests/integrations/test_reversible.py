"""`ReversibleCallback` in every trainer: the weights of `make_reversible` and `restore` around it, bit for bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import meft
from meft.backbone.layers import ReversibleLayer
from meft.backbone.report import reversible_stacks
from meft.errors import ConfigError, MeftWarning
from support import models
from support.launching import EXAMPLES, launch
from support.peft_helpers import assert_equal, snapshot
from support.tiny import make_model

GAMMA = 1 / 16

pytestmark = [
    pytest.mark.usefixtures("quick_collection"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


class Rows(torch.utils.data.Dataset):
    def __init__(self, size: int = 24, seed: int = 0) -> None:
        self.columns = models.batch("opt", "CAUSAL_LM", size=size, seed=seed)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


ARGUMENTS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 7,
    "dataloader_pin_memory": False,
}


def llama(task: type[Any] = LlamaForCausalLM) -> nn.Module:
    from offline import word_tokenizer

    tokenizer = word_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return task(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=1, **sizes, **ids))


def with_lora(model: nn.Module) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        task = "CAUSAL_LM" if hasattr(model, "lm_head") else "SEQ_CLS"
        return get_peft_model(model, LoraConfig(task_type=task, target_modules=["q_proj", "v_proj"], r=4))


def lora() -> nn.Module:
    base = models.build("opt", "CAUSAL_LM", layers=3, dropout=0.1)
    return with_lora(base)


def full() -> nn.Module:
    return models.build("opt", "CAUSAL_LM", layers=3, dropout=0.1)


def transformers_trainer(model: nn.Module | None, folder: Path, callbacks: Any, **options: Any) -> Trainer:
    more = {name: options.pop(name) for name in ("model_init",) if name in options}
    arguments = TrainingArguments(str(folder), **{**ARGUMENTS, **options})
    rows = {"train_dataset": Rows(), "eval_dataset": Rows(8, seed=1)}
    return Trainer(model=model, args=arguments, callbacks=callbacks, **rows, **more)


def sft(model: nn.Module, folder: Path, callbacks: Any, **options: Any) -> Trainer:
    from offline import questions, word_tokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(str(folder), **{**ARGUMENTS, **options})
    tokenizer = word_tokenizer()
    return SFTTrainer(model, arguments, train_dataset=questions(None), processing_class=tokenizer, callbacks=callbacks)


def dpo(model: nn.Module, folder: Path, callbacks: Any, **options: Any) -> Trainer:
    from offline import questions, word_tokenizer
    from trl import DPOConfig, DPOTrainer

    rows = questions(None, preferences=True)
    arguments = DPOConfig(str(folder), **{**ARGUMENTS, **options})
    return DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=word_tokenizer(), callbacks=callbacks)


def grpo(model: nn.Module, folder: Path, callbacks: Any, **options: Any) -> Trainer:
    from offline import questions, word_tokenizer
    from trl import GRPOConfig, GRPOTrainer

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    own = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
    arguments = GRPOConfig(str(folder), **{**ARGUMENTS, **own, **options})
    rows, tokenizer = questions(None).select_columns(["prompt"]), word_tokenizer()
    return GRPOTrainer(
        model, length, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
    )


def reward(model: nn.Module, folder: Path, callbacks: Any, **options: Any) -> Trainer:
    from offline import questions, word_tokenizer
    from trl import RewardConfig, RewardTrainer

    rows = questions(None, preferences=True)
    arguments = RewardConfig(str(folder), **{**ARGUMENTS, **options})
    return RewardTrainer(
        model, args=arguments, train_dataset=rows, processing_class=word_tokenizer(), callbacks=callbacks
    )


def sentences(model: nn.Module, folder: Path, callbacks: Any, **options: Any) -> Trainer:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    pairs = [{"anchor": f"the {word} cat", "positive": f"a {word} dog"} for word in ("red", "green", "blue", "big") * 4]
    arguments = SentenceTransformerTrainingArguments(str(folder), **{**ARGUMENTS, **options})
    return SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=callbacks,
    )


TRAINERS: dict[str, tuple[Callable[..., Trainer], Callable[[Path], nn.Module]]] = {
    "Trainer, LoRA": (transformers_trainer, lambda folder: lora()),
    "Trainer, all weights": (transformers_trainer, lambda folder: full()),
    "SFTTrainer": (sft, lambda folder: with_lora(llama())),
    "DPOTrainer": (dpo, lambda folder: with_lora(llama())),
    "GRPOTrainer": (grpo, lambda folder: with_lora(llama())),
    "RewardTrainer": (reward, lambda folder: with_lora(llama(LlamaForSequenceClassification))),
    "SentenceTransformerTrainer": (sentences, lambda folder: embedder(folder)),
}


def embedder(folder: Path) -> nn.Module:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(make_model(folder / "bert")))
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


def is_reversible(model: nn.Module) -> bool:
    return bool(reversible_stacks(model))


class _Spy(TrainerCallback):
    """Sees whether the model is reversible at each step; may end the training there."""

    def __init__(self, ends: BaseException | None = None, at: int = 2) -> None:
        self.seen: list[bool] = []
        self.ends, self.at = ends, at

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(is_reversible(model))
        if self.ends is not None and state.global_step == self.at:
            raise self.ends


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", TRAINERS)
def test_weights_are_those_of_two_lines(kind: str, tmp_path: Path) -> None:
    make, build = TRAINERS[kind]
    by_hand = meft.make_reversible(build(tmp_path), gamma=GAMMA)
    expected = make(by_hand, tmp_path / "hand", [])
    expected.train()
    expected.save_model(tmp_path / "hand" / "saved")
    meft.restore(by_hand)

    spy = _Spy()
    model = build(tmp_path)
    before = snapshot(model)
    run = make(model, tmp_path / "callback", [meft.ReversibleCallback(gamma=GAMMA), spy])
    run.train()
    run.save_model(tmp_path / "callback" / "saved")
    assert spy.seen == [True] * 3 and not is_reversible(run.model)
    assert losses(run) == losses(expected) and len(losses(run)) == 3
    assert_equal(run.model.state_dict(), by_hand.state_dict())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    files = sorted((tmp_path / "callback" / "saved").rglob("*.safetensors"))
    assert files
    for file in files:
        other = tmp_path / "hand" / file.relative_to(tmp_path / "callback")
        assert file.read_bytes() == other.read_bytes()


def test_the_model_is_reversible_before_it_is_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    prepared: list[bool] = []
    prepare = Accelerator.prepare_model

    def spied(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        prepared.append(is_reversible(model))
        return prepare(self, model, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "prepare_model", spied)
    run = transformers_trainer(lora(), tmp_path, [meft.ReversibleCallback()])
    assert is_reversible(run.model) and not prepared
    for times in (1, 2):
        run.train()
        assert prepared == [True] * times and not is_reversible(run.model)
    prepared.clear()
    run = transformers_trainer(None, tmp_path, [meft.ReversibleCallback()], model_init=lora)
    first = run.model
    run.train()
    assert run.model is not first and prepared == [True] and not is_reversible(run.model)


def test_checkpoints_are_the_ordinary_models(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    run = transformers_trainer(full(), tmp_path, [meft.ReversibleCallback(gamma=GAMMA)], **options)
    run.train()
    plain = transformers_trainer(full(), tmp_path / "plain", [], **options)
    plain.train()
    for step in (1, 3):
        saved, ordinary = (folder / f"checkpoint-{step}" for folder in (tmp_path, tmp_path / "plain"))
        weights = load_file(saved / "model.safetensors")
        assert weights.keys() == load_file(ordinary / "model.safetensors").keys()
        assert (saved / "config.json").read_text() == (ordinary / "config.json").read_text()
    loaded = type(run.model).from_pretrained(tmp_path / "checkpoint-3")
    assert_equal(loaded.state_dict(), run.model.state_dict())


def test_what_was_trained_merges(tmp_path: Path) -> None:
    run = transformers_trainer(lora(), tmp_path, [meft.ReversibleCallback(gamma=GAMMA)])
    run.train()
    batch = models.batch("opt", "CAUSAL_LM", size=4)
    with torch.no_grad():
        expected = run.model.eval()(**batch).logits
        merged = run.model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, ReversibleLayer) for module in merged.modules())


def test_the_best_model_is_loaded_into_the_ordinary_one(tmp_path: Path) -> None:
    run = transformers_trainer(
        lora(),
        tmp_path,
        [meft.ReversibleCallback(gamma=GAMMA)],
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.5,
    )
    run.train()
    assert not is_reversible(run.model)
    best = load_file(Path(run.state.best_model_checkpoint) / "adapter_model.safetensors")
    found = {name.replace(".default", ""): tensor for name, tensor in run.model.state_dict().items() if "lora" in name}
    assert_equal(found, best)
    # During training the coupled model was evaluated, afterwards the ordinary one.
    assert run.evaluate()["eval_loss"] != run.state.best_metric


@pytest.mark.parametrize("build", [lora, full])
def test_resuming_is_as_if_never_stopped(build: Any, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    callback = meft.ReversibleCallback
    whole = transformers_trainer(build(), tmp_path / "whole", [callback(gamma=GAMMA)], **options)
    whole.train()
    spy = _Spy(RuntimeError("stopped"), at=3)
    stopped = transformers_trainer(build(), tmp_path / "stopped", [callback(gamma=GAMMA), spy], **options)
    with pytest.raises(RuntimeError, match="stopped"):
        stopped.train()
    assert not is_reversible(stopped.model)
    for restoring in (False, True):
        arguments = {**options, "restore_callback_states_from_checkpoint": restoring}
        resumed = transformers_trainer(build(), tmp_path / "stopped", [callback(gamma=GAMMA)], **arguments)
        resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
        assert losses(resumed) == losses(whole) and not is_reversible(resumed.model)
        assert_equal(resumed.model.state_dict(), whole.model.state_dict())


def test_going_on_with_other_options_is_said(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    transformers_trainer(lora(), tmp_path, [meft.ReversibleCallback(gamma=GAMMA, stacks=["layers"])], **options).train()
    recorded = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert recorded["stateful_callbacks"]["ReversibleCallback"]["args"]["gamma"] == GAMMA
    run = transformers_trainer(lora(), tmp_path, [meft.ReversibleCallback(gamma=1 / 8, output=("sum", 0.5))], **options)
    changed = r"gamma=0.0625 there and 0.125 now, output=None there and \('sum', 0.5\) now, stacks=\['layers'\] there"
    with pytest.warns(MeftWarning, match=changed):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("ending", [RuntimeError("broken"), KeyboardInterrupt()])
def test_after_an_exception_the_model_is_ordinary_and_trains_on(ending: BaseException, tmp_path: Path) -> None:
    """A second call begins with the weights and the optimizer as they are, reversible again."""
    spy = _Spy(ending)
    run = transformers_trainer(lora(), tmp_path, [meft.ReversibleCallback(gamma=GAMMA), spy])
    with pytest.raises(type(ending)):
        run.train()
    assert not is_reversible(run.model)

    by_hand = _Spy(type(ending)())
    other = transformers_trainer(meft.make_reversible(lora(), gamma=GAMMA), tmp_path, [by_hand])
    with pytest.raises(type(ending)):
        other.train()
    spy.ends = by_hand.ends = None
    for each in (run, other):
        torch.manual_seed(1)  # a Trainer seeds when it is made; there is dropout
        each.train()
    assert spy.seen == [True] * 5 and not is_reversible(run.model)
    assert losses(run) == losses(other)
    assert_equal(run.model.state_dict(), meft.restore(other.model).state_dict())


def test_an_exception_in_the_middle_of_a_backward_pass(tmp_path: Path) -> None:
    run = transformers_trainer(lora(), tmp_path, [meft.ReversibleCallback(gamma=GAMMA)])

    def fail(grad: Tensor) -> None:
        raise KeyboardInterrupt

    parameter = next(p for name, p in run.model.named_parameters() if "layers.1" in name and "lora_B" in name)
    handle = parameter.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    handle.remove()
    assert not is_reversible(run.model)
    run.train()
    assert len(losses(run)) == 3 and not is_reversible(run.model)


def test_a_trainer_that_was_only_set_up_does_not_stand_in_the_way(tmp_path: Path) -> None:
    model = lora()
    transformers_trainer(model, tmp_path, [meft.ReversibleCallback(gamma=1 / 8)])
    run = transformers_trainer(model, tmp_path, [meft.ReversibleCallback(gamma=GAMMA)])
    run.train()
    expected = transformers_trainer(meft.make_reversible(lora(), gamma=GAMMA), tmp_path, [])
    expected.train()
    assert losses(run) == losses(expected)


def test_one_that_the_user_restored_is_made_reversible_again(tmp_path: Path) -> None:
    spy = _Spy()
    run = transformers_trainer(lora(), tmp_path, [meft.ReversibleCallback(gamma=GAMMA), spy])
    meft.restore(run.model)
    run.train()
    assert spy.seen == [True] * 3 and not is_reversible(run.model)


def test_without_the_callback_the_model_is_left_alone(tmp_path: Path) -> None:
    spy = _Spy()
    run = transformers_trainer(lora(), tmp_path, [meft.ReversibleCallback, spy])
    run.remove_callback(meft.ReversibleCallback)
    meft.restore(run.model)
    run.train()
    assert spy.seen == [False] * 3


def test_models_that_are_reversible_already_are_refused(tmp_path: Path) -> None:
    model = meft.make_reversible(lora())
    with pytest.raises(ConfigError, match=r"ReversibleCallback makes the model reversible, and .*layers of .* already"):
        transformers_trainer(model, tmp_path, [meft.ReversibleCallback()])
    assert is_reversible(model)
    adapted = get_peft_model(full(), meft.MeftConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match=r"model.unload\(\) with an adapter"):
        transformers_trainer(adapted, tmp_path, [meft.ReversibleCallback()])


def test_options_are_checked_where_they_are_given() -> None:
    with pytest.raises(ConfigError, match="gamma"):
        meft.ReversibleCallback(gamma=0.3)
    with pytest.raises(TypeError, match=r"ReversibleCallback\(\) .*'gama'.*Its options are coupling, .*gamma"):
        meft.ReversibleCallback(gama=1 / 4)
    assert "gamma: Factor of momentum" in (meft.ReversibleCallback.__doc__ or "")


def test_every_option_arrives(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gamma": 1 / 8, "backward": "cached", "frozen_layers": 1, "fused_loss": False}
    run = transformers_trainer(lora(), tmp_path, [meft.ReversibleCallback("momentum", **options)])
    (stack,) = reversible_stacks(run.model).values()
    (expected,) = reversible_stacks(meft.make_reversible(lora(), **options)).values()
    assert stack.plan.differences(expected.plan) == "" and stack.heads == [] == expected.heads
    run.train()
    assert not is_reversible(run.model)


def test_added_afterwards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spy = _Spy()
    run = transformers_trainer(lora(), tmp_path, [spy])
    run.add_callback(meft.ReversibleCallback(gamma=GAMMA))
    assert not is_reversible(run.model)
    run.train()
    assert spy.seen == [True] * 3 and not is_reversible(run.model)
    assert "was added after the Trainer was made" in caplog.text
    expected = transformers_trainer(meft.make_reversible(lora(), gamma=GAMMA), tmp_path, [])
    expected.train()
    assert losses(run) == losses(expected)
    spy.ends = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        run.train()
    assert not is_reversible(run.model)


def test_gradient_checkpointing_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    found = []
    for checkpointing in (False, True):
        run = transformers_trainer(lora(), tmp_path, [meft.ReversibleCallback()], gradient_checkpointing=checkpointing)
        run.train()
        assert ("Gradient checkpointing is redundant on reversible layers" in caplog.text) == checkpointing
        found.append((losses(run), snapshot(run.model)))
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])


def test_two_processes(tmp_path: Path) -> None:
    found = launch("reversible_worker.py", tmp_path)
    assert found["wrapped in"] == "DistributedDataParallel" and found["reversible in training"]
    assert found["equal"] and len(found["losses"]) == 3
    assert not found["reversible afterwards"] and found["warnings"] == []


def test_weights_that_are_spread_out_stay_in_reversible_layers(tmp_path: Path) -> None:
    """Spread by whatever `refuse_sharded` knows; here DeepSpeed's mark, which needs no processes."""
    run = transformers_trainer(lora(), tmp_path, [meft.ReversibleCallback(gamma=GAMMA), _Shard()])
    with pytest.warns(MeftWarning, match="PeftModelForCausalLM stays reversible after training, since its weights"):
        run.train()
    assert is_reversible(run.model)


class _Shard(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            next(model.parameters()).ds_status = "partitioned"
