"""`meft chat`: talk to what was trained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

from meft.errors import CheckpointError, ConfigError
from meft.loading.folders import is_adapter, load
from meft.loading.models import check_place, is_causal, loading, longest_input, read_config
from meft.loading.tasks import task_type_of
from meft.parsing import option
from meft.storage.claims import read_object, require

_END = ("exit", "quit", "/exit", "/quit")


@dataclass
class ChatArguments:
    """The model and what it is asked."""

    _argument_group_name = "chat"

    folder: str = field(
        metadata={
            "help": "The folder of a run, an adapter or a model, or a model's name on the hub.",
            "positional": True,
        }
    )
    prompt: str | None = option("Answer this and end. Left out: a conversation, until an empty line or exit.")
    system: str | None = option("What the conversation begins with, as the message of the system.")
    max_new_tokens: int = option("The most tokens of an answer.", 256)
    temperature: float = option("How random an answer is; 0 takes the likeliest token each time.", 0.0)
    top_p: float = option("Draw among the likeliest tokens that have this probability together.", 0.95)
    seed: int = option("Of the random numbers, where the temperature is not 0.", 0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("Data type of the weights.", "auto")
    device: str | None = option("cuda or cpu, say. Left out: a GPU, if there is one.")

    def check(self) -> None:
        """Refuses numbers that mean nothing.

        Raises:
            ConfigError: One does.
        """
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")


def chat_command(arguments: ChatArguments, *, ask: Callable[[str], str] = input) -> None:
    """Answers one prompt, or holds a conversation; what the model says is printed as it comes.

    Args:
        arguments: As parsed.
        ask: Asks for the next message.

    Raises:
        ConfigError, CheckpointError: What was given is not valid.
    """
    arguments.check()
    model, tokenizer, plain = open_chat(arguments)
    speaker = _Speaker(model, tokenizer, plain, arguments)
    if arguments.prompt is not None:
        speaker.answer(arguments.prompt)
        return
    if not sys.stdin.isatty() and ask is input:
        for line in sys.stdin:
            if line.strip():
                speaker.answer(line.strip())
        return
    while True:
        try:
            said = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not said or said.lower() in _END:
            return
        try:
            speaker.answer(said)
        except KeyboardInterrupt:
            print(" ...")


def open_chat(arguments: ChatArguments) -> tuple[Any, PreTrainedTokenizerBase, bool]:
    """The model, its tokenizer, and whether it goes on with texts instead of answering messages.

    Raises:
        CheckpointError: There is no such model, or it writes no texts.
    """
    name = arguments.folder
    check_place(name)
    folder, device = Path(name), torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check_writes(name)
    model: Any = load(folder if folder.is_dir() else name, dtype=arguments.dtype).to(device).eval()
    base = getattr(model, "name_or_path", "") or name
    has_own = (folder / "tokenizer_config.json").is_file() or not folder.is_dir()
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name if has_own else base)
    recorded = folder / "task.json"
    found = read_object(recorded) if recorded.is_file() else {}
    messages = require(recorded, "messages", found.get("messages", True), bool)
    plain = tokenizer.chat_template is None or not messages
    if plain and arguments.system:
        raise ConfigError(
            f"system is {arguments.system!r}, but {name} goes on with texts and knows no messages. Leave it out."
        )
    return model, tokenizer, plain


class _Speaker:
    """Answers messages, and remembers them."""

    def __init__(self, model: Any, tokenizer: Any, plain: bool, arguments: ChatArguments) -> None:
        self.model, self.tokenizer, self.plain, self.arguments = model, tokenizer, plain, arguments
        self.messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
        self.streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        torch.manual_seed(arguments.seed)

    def answer(self, said: str) -> str:
        arguments = self.arguments
        if self.plain:
            inputs = self.tokenizer(said, return_tensors="pt")
        else:
            self.messages.append({"role": "user", "content": said})
            inputs = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        ids = inputs["input_ids"].to(self.model.device)
        longest = longest_input(self.model, self.tokenizer)
        room = arguments.max_new_tokens if longest is None else min(arguments.max_new_tokens, longest - ids.shape[1])
        if room < 1:
            raise ConfigError(
                f"What was said is {ids.shape[1]} tokens long, and the model takes {longest}. Begin a new conversation."
            )
        drawn = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
        with torch.no_grad():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                eos_token_id=_ends(self.model, self.tokenizer),
                streamer=self.streamer,
                **(drawn if arguments.temperature else {"do_sample": False, "temperature": None, "top_p": None}),
                **({} if arguments.temperature else {"top_k": None}),
            )
        text: str = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        return text


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return [token for token in dict.fromkeys([*found, tokenizer.eos_token_id]) if token is not None]


def _check_writes(name: str) -> None:
    if is_adapter(name):
        kind = read_object(Path(name, "adapter_config.json")).get("task_type")
        if kind not in (None, "CAUSAL_LM"):
            raise CheckpointError(f"{name} was trained for {kind}, which writes no texts. meft evaluate scores it.")
        return
    config = read_config(name)
    if not is_causal(config) or task_type_of(config) not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"{name} is a {config.model_type} that writes no texts. Give a language model.")
