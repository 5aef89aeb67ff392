"""What strangers hand in: every command and every public function that reads a folder, and a folder that lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file

import meft
from meft.errors import MeftError
from meft.loading.folders import adapter_config, load_adapter, load_base, load_plain, trained_labels
from meft.loading.models import read_config, read_model
from meft.training.checkpoints import check_checkpoint, newest_complete, read_state
from meft.training.evaluation import parse_evaluation
from meft.training.recorded import read_task
from meft.training.runs import inspect_folder
from meft.tuner import MeftConfig
from support.strangers import ELSE, KINDS, REFUSED, THROUGH, Ground, Trial, trials_of
from support.strangers import meft as command

# Code that leaves a trace where it is run.
EVIL = "import pathlib\npathlib.Path({trace!r}).touch()\nfrom transformers import BertConfig as Evil\n"
VERIFIED = ("--device=cpu", "--seq_length=8")
QUIET = ("--disable_tqdm=true", "--report_to=none", "--use_cpu=true")

COMMANDS: dict[str, Callable[[Path, Path, Ground], list[str]]] = {
    "train": lambda folder, out, ground: ground.training(out / "run", model=folder),
    "train on": lambda folder, out, ground: ground.training(folder, "--method=meft1"),
    "train from": lambda folder, out, ground: ground.training(out / "run", f"--resume_from_checkpoint={folder}"),
    "evaluate": lambda folder, out, ground: ["evaluate", f"--model_name_or_path={folder}", *QUIET],
    "verify": lambda folder, out, ground: ["verify", f"--model_name_or_path={folder}", *VERIFIED],
    "export": lambda folder, out, ground: ["export", str(folder), f"--output_dir={out / 'exported'}"],
    "estimate": lambda folder, out, ground: ["estimate", str(folder), "--method=lora", "--seq_len=8"],
}  # fmt: skip
FUNCTIONS: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda folder, out: meft.load(folder),
    "load trainable": lambda folder, out: meft.load(folder, is_trainable=True),
    "export": lambda folder, out: meft.export(folder, out / "exported"),
    "estimate": lambda folder, out: meft.estimate(str(folder), method="lora", seq_len=8),
    "adapter_config": lambda folder, out: adapter_config(folder),
    "load_base": lambda folder, out: load_base(folder, None),
    "load_plain": lambda folder, out: load_plain(folder),
    "read_config": lambda folder, out: read_config(str(folder)),
    "read_model": lambda folder, out: read_model(str(folder), None),
    "trained_labels": lambda folder, out: trained_labels(folder),
    "read_task": lambda folder, out: read_task(str(folder)),
    "parse_evaluation": lambda folder, out: parse_evaluation([f"--model_name_or_path={folder}"]),
    "inspect_folder": lambda folder, out: inspect_folder(folder, {}),
    "newest_complete": lambda folder, out: newest_complete(folder),
    "check_checkpoint": lambda folder, out: check_checkpoint(folder),
    "read_state": lambda folder, out: read_state(folder),
    "MeftConfig": lambda folder, out: MeftConfig.from_pretrained(str(folder)),
}
FILES = ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json", "task.json",
         "run.json", "results.json", "checkpoint.json", "trainer_state.json", "start.json")  # fmt: skip
QUICK_LIES = {("full", "config.json"), ("full", "task.json"), ("meft1", "adapter_config.json")}
LIES: dict[str, Any] = {
    "trust": {"trust_remote_code": True, "tokenizer_kwargs": {"trust_remote_code": True},
              "arguments": {"trust_remote_code": True, "text_column": ["a", "--trust_remote_code"]}},
    "types": {"arguments": [1], "labels": "x", "files": [], "coupling": ["x"], "peft_type": [], "model_type": 7,
              "architectures": {"x": 1}, "global_step": "x", "hidden_size": "x", "rows": 1, "started": None},
    "a list": [1, 2],
    "nothing": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground.make(tmp_path_factory.mktemp("ground"))


@pytest.fixture
def lying(ground: Ground, tmp_path: Path) -> Callable[[str, str, str], tuple[Path, Path]]:
    """Copies a run or a checkpoint, lets one of its files lie, and lays code beside it that must not run."""

    def make(method: str, file: str, lie: str) -> tuple[Path, Path]:
        source = ground.runs[method]
        source = source if (source / file).exists() else source / "checkpoint-1"
        folder = Path(shutil.copytree(source, tmp_path / "lying"))
        trace = tmp_path / "ran"
        for name in ("evil.py", "configuration_evil.py", "tokenizer_evil.py"):
            (folder / name).write_text(EVIL.format(trace=str(trace)))
        path, said = folder / file, LIES[lie]
        found = json.loads(path.read_text()) if path.is_file() else {}
        if isinstance(said, dict):
            names = {each: "evil.Evil" for each in ("AutoConfig", "AutoModel", "AutoTokenizer")}
            said = {**found, **said, "auto_map": names}
            said = said if lie != "trust" or file == "task.json" else {**said, "model_type": "evil"}
        path.write_text(json.dumps(said))
        return folder, trace

    return make


def _case(method: str, file: str, lie: str) -> Any:
    quick = lie == "trust" and (method, file) in QUICK_LIES
    return pytest.param(method, file, lie, marks=() if quick else pytest.mark.slow, id=f"{method}-{file}-{lie}")


@pytest.mark.parametrize(
    ("method", "file", "lie"),
    [_case(method, file, lie) for method in ("full", "meft1") for file in FILES for lie in LIES],
)
def test_every_reader_and_a_folder_that_lies_in_each_of_its_files(
    method: str, file: str, lie: str, lying: Any, ground: Ground, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """A result, or an error of meft's own; no code of the folder runs, and nothing is left half-written."""
    folder, trace = lying(method, file, lie)
    for name, words in COMMANDS.items():
        out = tmp_path / name
        out.mkdir()
        said = command(*words(folder, out, ground))
        assert said.startswith((REFUSED, THROUGH)), f"{name}: {said}"
        assert not trace.exists(), name
        assert not list(out.rglob(".saving-*")), name
    for name, read in FUNCTIONS.items():
        out = tmp_path / f"function {name}"
        out.mkdir()
        if name == "MeftConfig" and not (folder / "adapter_config.json").is_file():
            continue  # which PEFT looks for on the hub
        try:
            read(folder, out)
        except MeftError as error:
            assert str(error).strip(), name
        assert not trace.exists(), name


def test_an_adapter_that_lacks_a_layer_is_refused_by_peft_itself_only_with_a_warning(
    ground: Ground, tmp_path: Path
) -> None:
    """Which is why everything of meft goes through `load_adapter`."""
    folder = shutil.copytree(ground.runs["lora"], tmp_path / "lora")
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "layer.1." not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(load_base(folder, None), str(folder))
    with pytest.raises(MeftError, match="of its weights are missing"):
        load_adapter(load_base(folder, None), folder)


QUICK = ("--learning_rate=nan", "--num_train_epochs=0", "--save_steps=inf", "--logging_steps=-1", "--seed=-1",
         "--adam_beta1=1e400", "--report_to=wandb", "--modules_to_save=nothing",
         "--output_dir=/dev/null", "--train_file=/dev/stdin", "train: unknown.csv", "train: many.csv", "train: bom.csv",
         "train: numbers.csv", "train: empty_texts.csv", "train: surrogate.jsonl", "train: deep.jsonl",
         "validation: new_label.csv", "a pipe", "a link to nothing")  # fmt: skip


def test_a_few_of_each(ground: Ground) -> None:
    trials = {trial.title: trial for kind in ("bad options", "bad data") for trial in trials_of(kind, ground)}
    for title in QUICK:
        outcome, said = trials[title].run()
        assert outcome == REFUSED, said


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_them(kind: str, ground: Ground) -> None:
    def ended(trial: Trial) -> str | None:
        outcome, said = trial.run()
        return said if outcome == ELSE else None

    otherwise = [said for trial in trials_of(kind, ground) if (said := ended(trial)) is not None]
    assert not otherwise, "\n\n".join(otherwise[:5])
