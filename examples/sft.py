"""Supervised fine-tuning with TRL's SFTTrainer: packed sequences, and the loss of completions only.

python examples/sft.py                                                        # offline, a tiny random model
python examples/sft.py --method lora                                          # LoRA on a reversible backbone
python examples/sft.py --model Qwen/Qwen3-0.6B --dataset trl-lib/tldr --steps 1000 --length 2048

Nothing but one line is MEFT's: `peft_config=meft.MeftConfig(...)`, or `meft.make_reversible(model)` beside LoRA. Rows
need the columns `prompt` and `completion`. For several processes: accelerate launch --config_file
examples/accelerate/ddp.yaml examples/sft.py ...
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from offline import causal_lm, questions
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import meft


def main(words: Sequence[str] | None = None) -> SFTTrainer:
    """Trains and saves the adapter; returns the trainer, which knows what was logged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model: a folder or a name on the hub")
    parser.add_argument("--dataset", help="a data set with prompt and completion")
    parser.add_argument("--method", choices=["meft1", "momentum", "lora"], default="meft1")
    parser.add_argument("--backward", choices=["reversible", "cached"], default="reversible")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=64, help="tokens of a packed sequence")
    parser.add_argument("--output", default="runs/sft")
    options = parser.parse_args(words)

    model, tokenizer = causal_lm(options.model)
    if options.method == "lora":
        meft.make_reversible(model, backward=options.backward)
        adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    else:
        adapter = meft.MeftConfig(task_type="CAUSAL_LM", coupling=options.method, backward=options.backward)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=questions(options.dataset),
        peft_config=adapter,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            packing=True,
            completion_only_loss=True,
            max_length=options.length,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        callbacks=[meft.MeftCallback()],
    )
    trainer.train()
    if trainer.is_fsdp_enabled:  # a sharded model is saved whole only if asked to
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
