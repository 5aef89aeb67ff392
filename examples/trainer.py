"""The Trainer of Transformers, unmodified: MEFT adapters, LoRA or all weights on a reversible backbone.

python examples/trainer.py                                                    # offline, a tiny random model
python examples/trainer.py --method full
python examples/trainer.py --model Qwen/Qwen3-0.6B --dataset trl-lib/tldr --steps 1000 --length 2048
accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/trainer.py --model Qwen/Qwen3-0.6B

Rows need the columns `prompt` and `completion`, which are trained on as one text.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from offline import causal_lm, questions
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

import meft


def main(words: Sequence[str] | None = None) -> Trainer:
    """Trains and saves the model; returns the trainer, which knows what was logged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model: a folder or a name on the hub")
    parser.add_argument("--dataset", help="a data set with prompt and completion")
    parser.add_argument("--method", choices=["meft1", "momentum", "lora", "full"], default="meft1")
    parser.add_argument("--backward", choices=["reversible", "cached"], default="reversible")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--output", default="runs/trainer")
    parser.add_argument("--report_to", default="none", help="trackers that also get memory and drift: tensorboard, ...")
    options = parser.parse_args(words)

    model, tokenizer = causal_lm(options.model)
    if options.method in ("meft1", "momentum"):
        config = meft.MeftConfig(task_type="CAUSAL_LM", coupling=options.method, backward=options.backward)
        model = get_peft_model(model, config)
    elif options.method == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    callbacks: list[TrainerCallback] = [meft.MeftCallback()]
    if options.method in ("lora", "full"):
        callbacks.append(meft.ReversibleCallback(backward=options.backward))

    rows = questions(options.dataset)
    rows = rows.map(
        lambda row: tokenizer(row["prompt"] + row["completion"], truncation=True, max_length=options.length),
        remove_columns=rows.column_names,
    )
    trainer = Trainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            report_to=options.report_to,
        ),
        callbacks=callbacks,
    )
    trainer.train()
    if trainer.is_fsdp_enabled:  # a sharded model is saved whole only if asked to
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
