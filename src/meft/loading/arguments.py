"""What is said of a model that is to be loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from meft.parsing import option


@dataclass
class ModelArguments:
    """The pretrained model."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "A model's folder or its name on the hub."})
    config_name: str | None = option("Another configuration than the model's own: a folder or a name on the hub.")
    tokenizer_name: str | None = option("Another tokenizer than the model's own: a folder or a name on the hub.")
    cache_dir: str | None = option("Where what comes from the hub is kept.")
    revision: str = option("The version of a model on the hub: a branch, a tag or a commit.", "main")
    trust_remote_code: bool = option("Run model code that comes with the model, from the hub or its folder.", False)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "Data type of the weights; auto takes what the checkpoint has. For mixed precision leave float32 and give "
        "--bf16 or --fp16.",
        "float32",
    )
    attn_implementation: str | None = option("The attention of Transformers: eager, sdpa, flash_attention_2, ...")
    ignore_mismatched_sizes: bool = option("Start a task head of another size than this task's anew.", False)

    def hub(self) -> dict[str, Any]:
        """Options of `from_pretrained` that say where from, and what is trusted."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }

    def weights(self) -> dict[str, Any]:
        """Options of `from_pretrained` for a model."""
        options: dict[str, Any] = {"dtype": self.dtype, "ignore_mismatched_sizes": self.ignore_mismatched_sizes}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        return options | self.hub()
