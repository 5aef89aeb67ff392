"""Several hundred calls with what strangers hand in, by kind, and what became of each.

>>> trials = trials_of("bad options", Ground.make(folder), seed=0)
>>> outcomes = [trial.run() for trial in trials]

`python tests/support/strangers.py research/strangers.md` tries all of them and writes the table; the slow tests try
the same and fail where one ends in anything but a result or one line that says what was wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.tiny import make_model, sentence

KINDS = ("bad options", "bad data", "damaged files", "lying folders", "full disks", "signals", "two at once")
OUTCOMES = ("refused in a line", "went through", "went on after", "something else")
REFUSED, THROUGH, AFTER, ELSE = OUTCOMES
QUIET = ["--measure_steps=0", "--disable_tqdm=true", "--report_to=none", "--use_cpu=true", "--save_strategy=no"]
STEPS = ["--max_steps=2", "--per_device_train_batch_size=4", "--learning_rate=0.01"]
PROCESSES = multiprocessing.get_context("fork")


LONGEST = 40
"""Seconds that a trial may take: a pipe that nobody writes to must not be waited for."""


class TooLong(BaseException):
    """Raised by the alarm; nothing that catches errors catches it."""


def _too_long(*_: Any) -> None:
    raise TooLong


@dataclass(frozen=True)
class Trial:
    """One call: its kind, what is wrong with it, and what runs it."""

    kind: str
    title: str
    call: Callable[[], str]

    def run(self) -> tuple[str, str]:
        """The outcome, and what was said."""
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LONGEST)
        try:
            said = self.call()
        except BaseException:
            return ELSE, f"{self.title}\n{traceback.format_exc()}"
        finally:
            signal.alarm(0)
        return said.split("\n", 1)[0], said


@dataclass(frozen=True)
class Ground:
    """A tiny model, rows, and runs on them, to be copied and damaged."""

    folder: Path
    model: Path
    rows: Path
    runs: dict[str, Path]

    @classmethod
    def make(cls, folder: Path) -> Ground:
        model = make_model(folder / "model")
        generator = random.Random(0)
        lines = [f"{sentence(generator)},{'yes' if index % 2 else 'no'}" for index in range(12)]
        rows = folder / "rows.csv"
        rows.write_text("text,label\n" + "\n".join(lines) + "\n")
        ground = cls(folder, model, rows, {})
        for method in ("full", "lora", "meft1", "lora+momentum"):
            ground.runs[method] = folder / method
            said = meft(
                *ground.training(folder / method, f"--method={method}", "--save_strategy=steps", "--save_steps=1")
            )
            assert said.startswith(THROUGH), said
        return ground

    def training(self, run: Path, *words: str, model: Path | None = None, rows: Path | None = None) -> list[str]:
        data = [f"--train_file={rows or self.rows}", f"--validation_file={self.rows}"]
        return [
            "train",
            f"--model_name_or_path={model or self.model}",
            f"--output_dir={run}",
            *data,
            *QUIET,
            *STEPS,
            *words,
        ]

    @contextlib.contextmanager
    def copy(self, of: Path) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            yield Path(shutil.copytree(of, Path(place) / of.name))

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            yield Path(place)


def meft(*words: str) -> str:
    """Runs a command line in this process; the outcome, and below it what was said."""
    from meft import cli

    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    before = warnings.showwarning
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.simplefilter("ignore")
        try:
            cli.main(words)
        except SystemExit as end:
            code = end.code or 0
        except TooLong:
            raise
        except BaseException:
            err.write(traceback.format_exc())
        finally:
            warnings.showwarning = before
    said = err.getvalue()
    errors = [line for line in said.splitlines() if line.startswith("Error: ")]
    if code == 0:
        outcome = THROUGH
    elif len(errors) == 1 and "Traceback" not in said and "[Errno" not in said and "with --traceback" not in said:
        outcome = REFUSED
    else:
        outcome = ELSE
    if outcome == REFUSED and len(errors[0]) > 2000:
        outcome = ELSE
    return f"{outcome}\nmeft {' '.join(words)}\n{said[-3000:]}"


# -- bad options -----------------------------------------------------------------------------------------------------

_OTHERS = {
    "optim": ["nothing", "adamw_bnb_8bit", "galore_adamw", "lomo"],
    "report_to": ["wandb", "nothing"],
    "lr_scheduler_type": ["nothing", "cosine_with_min_lr", "reduce_lr_on_plateau"],
    "lr_scheduler_kwargs": ['{"nothing": 1}', "[1]", "{", "null"],
    "optim_args": ["nothing", "a=b", "betas=1"],
    "attn_implementation": ["flash_attention_2", "nothing", "a/b"],
    "dtype": ["int8", "object"],
    "deepspeed": ["nothing.json"],
    "fsdp": ["full_shard", "nothing"],
    "accelerator_config": ["{", "nothing.json", '{"a": 1}'],
    "eval_strategy": ["steps", "nothing"],
    "metric_for_best_model": ["nothing"],
    "load_best_model_at_end": ["true"],
    "resume_from_checkpoint": ["nothing", "."],
    "neftune_noise_alpha": ["5"],
    "bf16": ["true", "perhaps"],
    "fp16": ["true"],
    "tf32": ["true"],
    "label_names": ["nothing"],
    "train_sampling_strategy": ["group_by_length", "nothing"],
    "length_column_name": ["nothing"],
    "ddp_backend": ["nothing"],
    "modules_to_save": ["nothing", "dropout", "encoder"],
    "stacks": ["nothing", ""],
    "config_name": ["nothing/at/all", "."],
    "tokenizer_name": ["nothing/at/all", "."],
    "cache_dir": ["/proc/nothing"],
    "output_dir": ["/proc/nothing/run", "/dev/null", ""],
    "max_train_samples": ["0", "-1", "1"],
    "max_eval_samples": ["0"],
    "max_seq_length": ["0", "1", "2", "99999"],
    "labels": ["yes", "yes yes", "a b", "--help"],
    "num_labels": ["0", "1", "2", "99999"],
    "text_column": ["nothing", "text text text", ""],
    "label_column": ["nothing", "text", ""],
    "method": ["nothing", "lora+nothing", "meft1+momentum", ""],
    "coupling": ["meft1"],
    "early_stopping_patience": ["-1", "1"],
    "total_train_batch_size": ["0", "3", "-4"],
    "measure_steps": ["-1"],
    "validation_share": ["0.5"],
    "train_file": ["nothing.csv", "/dev/null", "/dev/zero", ".", "/dev/stdin"],
}
_NUMBERS = ("nan", "inf", "-inf", "0", "-1", "-5", "1e400", "1/0", "x", "")


def bad_options(ground: Ground) -> Iterator[Trial]:
    from meft.options import METHOD, options_of
    from meft.training.numbers import RANGES

    options = {name: _NUMBERS for name in (*RANGES, *options_of(METHOD))} | _OTHERS
    for name, values in options.items():
        for value in values:

            def call(name: str = name, value: str = value) -> str:
                with ground.place() as place, contextlib.chdir(place) if sys.version_info >= (3, 11) else _nothing():
                    words = ground.training(place / "run")
                    return meft(*words, f"--{name}={value}")

            yield Trial("bad options", f"--{name}={value}", call)


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


# -- bad data --------------------------------------------------------------------------------------------------------

_TEXTS: dict[str, bytes | str] = {
    "empty.csv": "",
    "blank.csv": "\n\n\n",
    "bom.csv": b"\xef\xbb\xbf",
    "header.csv": "text,label\n",
    "one.csv": "text,label\nthe cat sat,yes\n",
    "utf16.csv": "text,label\na,yes\n".encode("utf-16"),
    "nul.csv": "text,label\nthe\0cat,yes\na,no\n",
    "binary.csv": bytes(range(256)) * 40,
    "quote.csv": 'text,label\n"the cat,yes\n',
    "columns.csv": "text,label\na,b,c\n",
    "twice.csv": "text,text,label\na,b,yes\n",
    "other.csv": "sentence,stars\na,1\n",
    "empty_texts.csv": "text,label\n" + ",yes\n,no\n" * 6,
    "spaces.csv": "text,label\n" + "  ,yes\n\t,no\n" * 6,
    "unknown.csv": "text,label\n" + "zebra gnu,yes\nyak,no\n" * 6,
    "partly.csv": "text,label\n" + "the zebra sat,yes\nthe cat,no\n" * 6,
    "one_label.csv": "text,label\n" + "the cat,yes\n" * 6,
    "no_label.csv": "text,label\nthe cat,\nthe dog,yes\n",
    "many.csv": "text,label\n" + "".join(f"the cat,label {min(i, 115)}\n" for i in range(120)),
    "numbers.csv": "text,label\n" + "".join(f"the cat,{i * 7}\n" for i in range(120)),
    "floats.csv": "text,label\n" + "the cat,0.5\nthe dog,1.5\n" * 6,
    "new_label.csv": "text,label\n" + "the cat,maybe\nthe dog,never\n" * 6,
    "long.csv": "text,label\n" + "the cat " * 100_000 + ",yes\nthe dog,no\n",
    "cell.csv": "text,label\n" + "the " * 40_000 + ",yes\nthe dog,no\n",
    "long_label.csv": "text,label\n" + f"the cat,{'y' * 20_000}\nthe dog,no\n" * 4,
    "surrogate.jsonl": '{"text": "the \\ud800", "label": "yes"}\n{"text": "a", "label": "no"}\n',
    "surrogate_label.jsonl": '{"text": "the", "label": "\\udfff"}\n{"text": "a", "label": "no"}\n',
    "surrogate_key.jsonl": '{"text": "the", "label": "yes", "\\udfff": 1}\n{"text": "a", "label": "no"}\n',
    "deep.jsonl": '{"text": ' + "[" * 100_000 + "\n",
    "deep_closed.jsonl": '{"text": "a", "label": "yes", "x": ' + "[" * 900 + "]" * 900 + "}\n",
    "array.jsonl": "[1, 2]\n",
    "word.jsonl": "nothing\n",
    "types.jsonl": '{"text": 1, "label": "yes"}\n{"text": null, "label": "no"}\n',
    "lists.jsonl": '{"text": "a", "label": ["yes"]}\n{"text": "b", "label": {}}\n',
    "null.jsonl": '{"text": "a", "label": null}\n',
    "huge.jsonl": '{"text": "a", "label": ' + "1" * 10_000 + "}\n",
    "nan.jsonl": '{"text": "a", "label": NaN}\n{"text": "b", "label": Infinity}\n',
    "bool.jsonl": '{"text": "the", "label": true}\n{"text": "a", "label": false}\n' * 6,
    "whole.json": '[{"text": "a", "label": "yes"}]',
    "rows.txt": "the cat\n",
    "rows": "text,label\n",
    "rows.parquet": b"PAR1",
    "rows.tsv": "text\tlabel\nthe\tyes\nthe\n",
}


def bad_data(ground: Ground) -> Iterator[Trial]:
    def with_rows(name: str, content: bytes | str, words: Sequence[str], split: str) -> Callable[[], str]:
        def call() -> str:
            with ground.place() as place:
                path = place / name
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
                given = ground.training(place / "run", *words)
                return meft(*given, f"--{split}_file={path}")

        return call

    for name, content in _TEXTS.items():
        for split in ("train", "validation"):
            yield Trial("bad data", f"{split}: {name}", with_rows(name, content, [], split))
        yield Trial("bad data", f"regression: {name}", with_rows(name, content, ["--regression"], "train"))

    def special(make: Callable[[Path], Any], name: str) -> Callable[[], str]:
        def call() -> str:
            with ground.place() as place:
                path = place / name
                make(path)
                return meft(*ground.training(place / "run", rows=path))

        return call

    yield Trial("bad data", "a pipe", special(os.mkfifo, "rows.csv"))
    yield Trial("bad data", "a folder", special(Path.mkdir, "rows.csv"))
    yield Trial("bad data", "a link to nothing", special(lambda path: path.symlink_to("nothing"), "rows.csv"))
    yield Trial("bad data", "a link to itself", special(lambda path: path.symlink_to(path), "rows.csv"))
    yield Trial("bad data", "a name that is too long", special(lambda path: None, "x" * 300 + ".csv"))
    for content in (
        "[" * 100_000,
        "a: " * 5_000,
        "- a\n- b",
        "\xff",
        '{"learning_rate": "\\ud800"}',
        "a: &a [*a]",
        "labels: [--x]",
    ):
        yield Trial("bad data", f"arguments: {content[:20]!r}", _with_arguments(ground, content))


def _with_arguments(ground: Ground, content: str) -> Callable[[], str]:
    def call() -> str:
        with ground.place() as place:
            (place / "a.yaml").write_text(content, encoding="latin-1")
            first, *words = ground.training(place / "run")
            return meft(first, str(place / "a.yaml"), *words)

    return call


# -- damaged files and lying folders ---------------------------------------------------------------------------------


def _readers(folder: Path, place: Path) -> dict[str, list[str]]:
    quiet = ["--disable_tqdm=true", "--report_to=none", "--use_cpu=true"]
    return {
        "evaluate": ["evaluate", f"--model_name_or_path={folder}", *quiet],
        "export": ["export", str(folder), f"--output_dir={place / 'exported'}"],
        "verify": ["verify", f"--model_name_or_path={folder}", "--device=cpu", "--seq_length=8"],
    }


_DAMAGES: dict[str, Callable[[Path, random.Random], Any]] = {
    "empty": lambda path, _: path.write_bytes(b""),
    "half": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path, _: path.write_bytes(path.read_bytes() + b"\0" * 9),
    "flipped": lambda path, generator: _flip(path, generator),
    "gone": lambda path, _: path.unlink(),
    "a folder": lambda path, _: (path.unlink(), path.mkdir()),
    "a pipe": lambda path, _: (path.unlink(), os.mkfifo(path)),
    "a link to nothing": lambda path, _: (path.unlink(), path.symlink_to("nothing")),
    "zeros": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path, generator: path.write_bytes(generator.randbytes(path.stat().st_size)),
}


def _flip(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def damaged_files(ground: Ground, seed: int, share: float = 0.25) -> Iterator[Trial]:
    generator = random.Random(seed)
    for method, run in ground.runs.items():
        for source in (run, run / "checkpoint-1"):
            for file in sorted(path.name for path in source.iterdir() if path.is_file() and path.name != ".lock"):
                for damage in _DAMAGES:
                    if generator.random() < share:
                        reader = generator.choice(["evaluate", "export", "verify"])
                        yield _damaged(ground, source, file, damage, reader, generator.random(), method)
    for damage in _DAMAGES:
        parts = ("optimizer.pt", "adapter_model.safetensors", "checkpoint.json", "trainer_state.json", "rng_state.pth")
        for file in ("run.json", "start.json", *(f"checkpoint-1/{part}" for part in parts)):
            yield _resumed(ground, file, damage, generator.random())
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            yield _begun(ground, file, damage, generator.random())


def _damaged(ground: Ground, source: Path, file: str, damage: str, reader: str, seed: float, method: str) -> Trial:
    def call() -> str:
        with ground.copy(source) as folder, ground.place() as place:
            _DAMAGES[damage](folder / file, random.Random(seed))
            return meft(*_readers(folder, place)[reader])

    return Trial("damaged files", f"{reader} {method} {source.name}/{file}: {damage}", call)


def _resumed(ground: Ground, file: str, damage: str, seed: float) -> Trial:
    def call() -> str:
        with ground.copy(ground.runs["meft1"]) as run:
            for name in ("results.json", "adapter_config.json", "adapter_model.safetensors"):
                (run / name).unlink()
            shutil.rmtree(run / "checkpoint-2")
            _DAMAGES[damage](run / file, random.Random(seed))
            words = ground.training(run, "--method=meft1", "--save_strategy=steps", "--save_steps=1")
            return meft(*words)

    return Trial("damaged files", f"resume {file}: {damage}", call)


def _begun(ground: Ground, file: str, damage: str, seed: float) -> Trial:
    def call() -> str:
        with ground.copy(ground.model) as model, ground.place() as place:
            _DAMAGES[damage](model / file, random.Random(seed))
            return meft(*ground.training(place / "run", model=model))

    return Trial("damaged files", f"train {file}: {damage}", call)


_LIES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    "",
    "x",
    "../../x",
    "\ud800",
    [],
    ["x"],
    [[]],
    {},
    {"x": 1},
    "--x",
)
_PLACES = {
    "full": ("config.json", "tokenizer_config.json", "task.json", "tokenizer.json"),
    "lora": ("adapter_config.json", "task.json"),
    "meft1": ("adapter_config.json", "task.json", "tokenizer_config.json"),
    "lora+momentum": ("adapter_config.json", "task.json"),
}


def lying_folders(ground: Ground, seed: int, share: float = 0.2) -> Iterator[Trial]:
    """Every JSON file of a run with one value replaced, at any depth; and those by which runs go on."""
    generator = random.Random(seed)
    for method, files in _PLACES.items():
        for file in files:
            content = json.loads((ground.runs[method] / file).read_text())
            for keys in _all_keys(content):
                for lie in _LIES:
                    if generator.random() < share * (0.1 if file == "tokenizer.json" else 1):
                        reader = generator.choice(["evaluate", "export", "verify"])
                        yield _lying(ground, method, file, keys, lie, reader)
    for file in ("run.json", "start.json", "checkpoint-1/checkpoint.json", "checkpoint-1/trainer_state.json"):
        content = json.loads((ground.runs["meft1"] / file).read_text())
        for keys in _all_keys(content):
            for lie in _LIES:
                if generator.random() < share / (4 if file == "run.json" else 1):
                    yield _going_on(ground, file, keys, lie)


def _all_keys(value: Any, depth: int = 3) -> Iterator[tuple[Any, ...]]:
    yield ()
    if depth and isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(len(value), 2)):
            for keys in _all_keys(value[key], depth - 1):
                yield (key, *keys)


def _put(path: Path, keys: Sequence[Any], lie: Any) -> None:
    content = json.loads(path.read_text())
    if not keys:
        content = lie
    else:
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = lie
    path.write_text(json.dumps(content))


def _lying(ground: Ground, method: str, file: str, keys: Sequence[Any], lie: Any, reader: str) -> Trial:
    def call() -> str:
        with ground.copy(ground.runs[method]) as folder, ground.place() as place:
            _put(folder / file, keys, lie)
            return meft(*_readers(folder, place)[reader])

    return Trial("lying folders", f"{reader} {method}/{file}: {'.'.join(map(str, keys))} = {lie!r}", call)


def _going_on(ground: Ground, file: str, keys: Sequence[Any], lie: Any) -> Trial:
    def call() -> str:
        with ground.copy(ground.runs["meft1"]) as run:
            for name in ("results.json", "adapter_config.json", "adapter_model.safetensors"):
                (run / name).unlink()
            shutil.rmtree(run / "checkpoint-2")
            _put(run / file, keys, lie)
            if file.endswith("trainer_state.json"):  # whoever can write the one can write the other
                from meft.training.checkpoints import write_manifest

                write_manifest(run / "checkpoint-1", resumable=True)
            words = ground.training(run, "--method=meft1", "--save_strategy=steps", "--save_steps=1")
            return meft(*words)

    return Trial("lying folders", f"resume {file}: {'.'.join(map(str, keys))} = {lie!r}", call)


# -- full disks, signals, two at once --------------------------------------------------------------------------------


def _in_a_process(
    work: Callable[[], str], before: Callable[[], None] | None = None, kill_after: float | None = None
) -> str:
    """Runs `work` in a process of its own; what it returns, or that it was killed."""
    receive, send = PROCESSES.Pipe(duplex=False)

    def run() -> None:
        if before is not None:
            before()
        send.send(work())

    process = PROCESSES.Process(target=run)
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 300
    while process.is_alive() and not receive.poll(0.05) and time.monotonic() < deadline:
        pass
    said = receive.recv() if receive.poll(0.05) else f"{ELSE}\nkilled: {process.exitcode}"
    process.join()
    return said


def _limited(size: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def full_disks(ground: Ground) -> Iterator[Trial]:
    """A file may not grow beyond a size, which the library meets where it would meet a full disk."""
    for size in (0, 100, 1_000, 3_000, 10_000, 30_000):
        for method in ("full", "meft1"):

            def train(size: int = size, method: str = method) -> str:
                with ground.place() as place:
                    words = ground.training(
                        place / "run", f"--method={method}", "--save_strategy=steps", "--save_steps=1"
                    )
                    first = _in_a_process(lambda: meft(*words), _limited(size))
                    if not first.startswith(REFUSED):
                        return first
                    left = [path for path in place.rglob(".saving-*")]
                    again = meft(*words)
                    return f"{AFTER if again.startswith(THROUGH) and not left else ELSE}\n{first}\n{again}"

            yield Trial("full disks", f"train {method} with {size} bytes", train)

            def export(size: int = size, method: str = method) -> str:
                with ground.place() as place:
                    words = _readers(ground.runs[method], place)["export"]
                    first = _in_a_process(lambda: meft(*words), _limited(size))
                    if not first.startswith(REFUSED) or list(place.iterdir()):
                        return f"{ELSE}\n{first}\n{list(place.iterdir())}"
                    again = meft(*words)
                    return f"{AFTER if again.startswith(THROUGH) else ELSE}\n{first}\n{again}"

            yield Trial("full disks", f"export {method} with {size} bytes", export)


def signals(ground: Ground, seed: int, times: int = 12) -> Iterator[Trial]:
    """A training killed at a random moment goes on to the bits of one that was not."""
    generator = random.Random(seed)
    for _ in range(times):
        after = generator.uniform(0.05, 2.5)

        def call(after: float = after) -> str:
            with ground.place() as place:
                words = ground.training(place / "run", "--method=meft1", "--save_strategy=steps", "--save_steps=1")
                words += ["--max_steps=6"]
                whole = [*words, f"--output_dir={place / 'whole'}"]
                _in_a_process(lambda: meft(*words), kill_after=after)
                again, plain = meft(*words), meft(*whole)
                finished = (place / "run" / "results.json").is_file()
                same = finished and _weights(place / "run") == _weights(place / "whole")
                # A run that had been finished when the signal came is refused to be done again.
                ended = again.startswith(THROUGH) or "holds a finished run" in again
                return f"{AFTER if same and ended else ELSE}\n{again}\n{plain}"

        yield Trial("signals", f"SIGKILL after {after:.2f} s", call)


def _weights(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def two_at_once(ground: Ground, times: int = 3) -> Iterator[Trial]:
    def both(words: Callable[[Path], list[str]], whole: Callable[[Path], bool]) -> Callable[[], str]:
        def call() -> str:
            with ground.place() as place:
                given = words(place)
                pairs = [PROCESSES.Pipe(duplex=False) for _ in range(2)]

                def run(end: Any) -> None:
                    end.send(meft(*given))

                processes = [PROCESSES.Process(target=run, args=(send,)) for _, send in pairs]
                for process in processes:
                    process.start()
                said = [receive.recv() for receive, _ in pairs]
                for process in processes:
                    process.join()
                good = all(text.startswith((THROUGH, REFUSED)) for text in said) and any(
                    text.startswith(THROUGH) for text in said
                )
                left = list(place.rglob(".saving-*"))
                refused = any(text.startswith(REFUSED) for text in said)
                outcome = (REFUSED if refused else THROUGH) if good and whole(place) and not left else ELSE
                return f"{outcome}\n" + "\n".join(said) + f"\n{left}"

        return call

    for _ in range(times):
        for method in ("full", "meft1"):
            export = both(
                lambda place, method=method: _readers(ground.runs[method], place)["export"],
                lambda place: meft(*_readers(place / "exported", place / "again")["export"]).startswith(THROUGH),
            )
            yield Trial("two at once", f"exports of {method} into one folder", export)
        train = both(
            lambda place: ground.training(place / "run", "--method=meft1"),
            lambda place: (place / "run" / "results.json").is_file(),
        )
        yield Trial("two at once", "trainings in one folder", train)
        score = both(
            lambda place: [*_readers(ground.runs["full"], place)["evaluate"], f"--results_file={place / 'r.json'}"],
            lambda place: "metrics" in json.loads((place / "r.json").read_text()),
        )
        yield Trial("two at once", "evaluations into one file", score)


def trials_of(kind: str, ground: Ground, seed: int = 0) -> list[Trial]:
    """All trials of a kind; where there are too many, a choice that depends on the seed."""
    makers: dict[str, Callable[[], Iterator[Trial]]] = {
        "bad options": lambda: bad_options(ground),
        "bad data": lambda: bad_data(ground),
        "damaged files": lambda: damaged_files(ground, seed),
        "lying folders": lambda: lying_folders(ground, seed),
        "full disks": lambda: full_disks(ground),
        "signals": lambda: signals(ground, seed),
        "two at once": lambda: two_at_once(ground),
    }
    return list(makers[kind]())


def main(page: Path, kinds: Sequence[str], seed: int = 0) -> int:
    """Tries everything, writes the table, and prints what ended otherwise."""
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        ground = Ground.make(Path(place))
        for kind in kinds:
            counts[kind] = Counter()
            for trial in trials_of(kind, ground, seed):
                outcome, said = trial.run()
                counts[kind][outcome] += 1
                if outcome == ELSE:
                    print(f"== {kind}: {trial.title}\n{said[-1500:]}", flush=True)
            print(kind, dict(counts[kind]), flush=True)
    if tuple(kinds) == KINDS:
        page.write_text(_page(counts, seed))
    return sum(found[ELSE] for found in counts.values())


def _page(counts: dict[str, Counter[str]], seed: int) -> str:
    from meft.storage.results import now, versions

    lines = [
        "# What strangers hand in",
        "",
        "Calls of `meft` with what should not be handed in, by kind, and what became of them. Made by",
        f"`PYTHONPATH=src:tests python tests/support/strangers.py research/strangers.md` (seed {seed}); the slow tests",
        "of `tests/project/test_strangers.py` try the same.",
        "",
        "- *refused in a line*: exit code 1 or 2 and one line `Error: ...`, no traceback, no bare error number.",
        "- *went through*: the result is what it would have been, or the value is a valid one after all.",
        "- *went on after*: failed in a line or was killed, and the same command then ended as if nothing had been.",
        "- *something else*: anything else.",
        "",
        "| kind | tried | " + " | ".join(OUTCOMES) + " |",
        "|---|---:|" + "---:|" * len(OUTCOMES),
    ]
    for kind, found in counts.items():
        lines.append(f"| {kind} | {sum(found.values())} | " + " | ".join(str(found[each]) for each in OUTCOMES) + " |")
    known = versions()
    lines += ["", f"{now()[:10]}; " + ", ".join(f"{name} {version}" for name, version in known.items()) + "."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1]), sys.argv[2:] or KINDS), 1))
