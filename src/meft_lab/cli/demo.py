"""The arguments of `meft demo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from meft.methods.registry import NAMED
from meft.parsing import option


@dataclass
class DemoArguments:
    """What is trained, and where the figures go."""

    _argument_group_name = "demo"

    output_dir: str = option("Folder for the table and the figure.", "demo")
    methods: list[str] = field(
        default_factory=list, metadata={"help": f"Ways to train: full lora+momentum. Of {NAMED}. Left out: a choice."}
    )
    steps: int = option("Training steps of each method; 0 for the usual.", 0)
    seed: int = option("Seed of everything drawn at random.", 0)

    def chosen(self) -> dict[str, Any]:
        """What was not left to the demo."""
        methods = [name for words in self.methods for name in words.split()]
        chosen: dict[str, Any] = {"methods": methods} if methods else {}
        return chosen | ({"steps": self.steps} if self.steps else {})


@dataclass
class LanguageDemoArguments:
    """Which language model is trained, and where the figures go."""

    _argument_group_name = "demo-llm"

    model_name_or_path: str | None = option(
        "Folder of a causal language model with its tokenizer. Left out: what the environment's MEFT_DEMO_MODEL says."
    )
    output_dir: str = option("Folder for the results.", "demo-llm")
    methods: list[str] = field(
        default_factory=list,
        metadata={"help": "Ways to train that the plain model can run. Left out: LoRA, checkpointed, on momentum."},
    )
    steps: int = option("Training steps of each method; 0 for the usual.", 0)
    seed: int = option("Seed of everything drawn at random.", 0)

    def names(self) -> tuple[str, ...]:
        """The methods that were named."""
        return tuple(name for words in self.methods for name in words.split())
