"""A tiny pretrained model with its tokenizer, tiny data, and runs of `meft train` on them, in folders of a test's own.

>>> model = make_model(tmp_path / "model")
>>> rte = make_rte(tmp_path / "RTE")
>>> found = train(model, f"--task=rte --data_dir={rte}", tmp_path / "run", "--max_steps=4")
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

WORDS = ["a", "the", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "mat", "tree", "house", "not", "never"]
WORDS += ["red", "green", "blue", "big", "small"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
CONTEXT = 24


def make_tokenizer(folder: Path, *, pad: bool = True, end: bool = True) -> PreTrainedTokenizerFast:
    """Splits at whitespace; `<s> ... </s>` around a text (no `end`: `<s> ...`), and a pair likewise."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=CONTEXT, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_config(family: str) -> PretrainedConfig:
    """Two layers, 16 wide, every dropout at 0.1."""
    shared: dict[str, Any] = {
        "vocab_size": len(SPECIAL + WORDS),
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "max_position_embeddings": CONTEXT + 2 if family == "roberta" else CONTEXT,
    }
    if family in ("bert", "roberta"):
        kind = BertConfig if family == "bert" else RobertaConfig
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        return kind(**shared, **sizes)
    if family == "opt":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
        return OPTConfig(**shared, **sizes, word_embed_proj_dim=16)
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()}  # fmt: skip
    return BartConfig(**shared, **sides, d_model=16, decoder_start_token_id=2)


def make_model(folder: Path, family: str = "bert", *, head: bool = False, pad: bool = True) -> Path:
    """Saves a random model and its tokenizer as a checkpoint without a task head (`head`: with one, of two labels)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_config(make_config(family))
    saved = model if head else getattr(model, model.base_model_prefix)
    saved.save_pretrained(folder)
    make_tokenizer(folder, pad=pad)
    return folder


def make_language_model(folder: Path, family: str = "opt") -> Path:
    """Saves a random causal language model with its head, and a tokenizer that leaves the end of a text open."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(make_config(family)).save_pretrained(folder)
    make_tokenizer(folder, end=False)
    return folder


def sentence(generator: random.Random, words: int = 6) -> str:
    return " ".join(generator.choices(WORDS, k=words))


def make_rte(folder: Path, *, train: int = 20, dev: int = 9) -> Path:
    """The official layout of RTE with random sentences; the label says whether the second has the first's last word."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for name, count in (("train", train), ("dev", dev)):
        rows = ["index\tsentence1\tsentence2\tlabel"]
        for index in range(count):
            first, second = sentence(generator), sentence(generator)
            label = "entailment" if first.split()[-1] in second.split() else "not_entailment"
            rows.append(f"{index}\t{first}\t{second}\t{label}")
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def train(
    model: Path, data: Sequence[str], run: Path, *words: str, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """`meft train` in this process, without measuring and without progress bars."""
    from meft.training import TRAIN_TYPES
    from meft.training import train as run_training
    from meft.training.arguments import parse

    fixed = ["--measure_steps=0", "--disable_tqdm=true", "--report_to=none", "--use_cpu=true", "--save_strategy=no"]
    argv = [f"--model_name_or_path={model}", f"--output_dir={run}", *data, *fixed, *words]
    return run_training(*parse(TRAIN_TYPES, argv, command="train"), command="meft train", say=say)


def evaluate(model: Path, *words: str, say: Callable[[str], None] = print) -> dict[str, float | None]:
    """`meft evaluate` in this process."""
    from meft.training.evaluation import evaluate as run_evaluation
    from meft.training.evaluation import parse_evaluation

    argv = [f"--model_name_or_path={model}", "--disable_tqdm=true", "--report_to=none", "--use_cpu=true", *words]
    return run_evaluation(*parse_evaluation(argv), say=say)


def train_and_die(moment: str, model: Path, data: Sequence[str], run: Path, *words: str) -> None:
    """Trains, and is killed with SIGKILL at one of `MOMENTS`; for a process of its own."""
    torch.set_num_threads(1)
    MOMENTS[moment]()
    train(model, data, run, *words)


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_a_step() -> None:
    from meft.training.checkpoints import CheckpointingTrainer as Trainer

    step = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _die() if self.state.global_step == 5 else step(self, *args, **kwargs)

    Trainer.training_step = training_step


def _die_writing_a_checkpoint() -> None:
    """With the weights and the optimizer on disk, and neither generators nor state."""
    from meft.training.checkpoints import CheckpointingTrainer as Trainer

    save = Trainer._save_rng_state

    def save_rng_state(self: Any, folder: str) -> None:
        return _die() if self.state.global_step == 4 else save(self, folder)

    Trainer._save_rng_state = save_rng_state


def _die_before_the_rename() -> None:
    from meft.training import checkpoints

    publish = checkpoints.publish_folder

    def publish_folder(staging: Path, place: Path) -> None:
        return _die() if place.name == "checkpoint-4" else publish(staging, place)

    checkpoints.publish_folder = publish_folder


def _die_removing_an_old_checkpoint() -> None:
    from transformers import trainer_utils

    remove = trainer_utils.shutil.rmtree

    def rmtree(path: Any, **options: Any) -> None:
        if Path(path).name.startswith("checkpoint-"):
            os.remove(Path(path, "optimizer.pt"))
            _die()
        remove(path, **options)

    trainer_utils.shutil.rmtree = rmtree


def _die_saving_the_result() -> None:
    """With the weights under their final name, and without the configuration that makes them loadable."""
    from meft.storage import files as storage

    rename = storage.os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name in ("config.json", "adapter_config.json") and ".saving-final" in str(source):
            _die()
        rename(source, target)

    storage.os.replace = replace


MOMENTS: dict[str, Callable[[], None]] = {
    "in a step": _die_in_a_step,
    "writing a checkpoint": _die_writing_a_checkpoint,
    "before the rename": _die_before_the_rename,
    "removing an old checkpoint": _die_removing_an_old_checkpoint,
    "saving the result": _die_saving_the_result,
}


def hidden_files(folder: Path) -> list[str]:
    """What an unfinished write would leave in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith((".saving", ".removing")))


def hold_a_claim(folder: Path, holding: Any, release: Any) -> None:
    """Claims an output folder until told to stop; for a process of its own."""
    from meft.training.runs import claimed

    with claimed(folder, "resume", {}, ""):
        holding.set()
        release.wait(60)
