"""Preference tuning with TRL's DPOTrainer; the reference is the same model with the adapter switched off.

python examples/dpo.py                                                        # offline, a tiny random model
python examples/dpo.py --method lora                                          # LoRA on a reversible backbone
python examples/dpo.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized --steps 1000 --length 2048

With `peft_config=meft.MeftConfig(...)` the reference is the plain pretrained model. With `meft.make_reversible(model)`
and LoRA it is the reversible one without LoRA. Rows need the columns `prompt`, `chosen` and `rejected`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from offline import causal_lm, questions
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

import meft


def main(words: Sequence[str] | None = None) -> DPOTrainer:
    """Trains and saves the adapter; returns the trainer, which knows what was logged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model: a folder or a name on the hub")
    parser.add_argument("--dataset", help="a data set with prompt, chosen and rejected")
    parser.add_argument("--method", choices=["meft1", "momentum", "lora"], default="meft1")
    parser.add_argument("--backward", choices=["reversible", "cached"], default="reversible")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=64, help="tokens of prompt and answer")
    parser.add_argument("--output", default="runs/dpo")
    options = parser.parse_args(words)

    model, tokenizer = causal_lm(options.model)
    if options.method == "lora":
        meft.make_reversible(model, backward=options.backward)
        adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    else:
        adapter = meft.MeftConfig(task_type="CAUSAL_LM", coupling=options.method, backward=options.backward)
    trainer = DPOTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=questions(options.dataset, preferences=True),
        peft_config=adapter,
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            max_length=options.length,
            per_device_train_batch_size=4,
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
