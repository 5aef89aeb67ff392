"""Plug-ins of other programs, against the interfaces that these publish; `meft run` on programs that train.

Axolotl, ms-swift and LLaMA-Factory ask for other versions of Transformers than the newest, each for its own. Where one
is not installed beside the tests, a stand-in with its published functions takes its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import meft
from integrations.test_reversible import GAMMA, _Spy, lora, losses, transformers_trainer
from meft.backbone.report import reversible_stacks
from meft.errors import ConfigError
from support.peft_helpers import assert_equal


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module, with the packages it lies in."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


def trains_as_two_lines(callbacks: list[Any], folder: Path) -> None:
    """The callbacks make a run that of `make_reversible` with GAMMA before it."""
    spy = _Spy()
    run = transformers_trainer(lora(), folder, [*callbacks, spy])
    run.train()
    assert spy.seen == [True] * 3 and not reversible_stacks(run.model)
    expected = transformers_trainer(meft.make_reversible(lora(), gamma=GAMMA), folder, [])
    expected.train()
    assert losses(run) == losses(expected)
    assert_equal(run.model.state_dict(), meft.restore(expected.model).state_dict())


def test_axolotl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plugins` names the class; `get_input_args` the model of its keys; callbacks are asked for with the model."""
    if importlib.util.find_spec("axolotl") is None:
        stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    monkeypatch.delitem(sys.modules, "meft.integrations.axolotl", raising=False)
    module, name = ["meft.integrations.axolotl", "MeftPlugin"]
    plugin = getattr(importlib.import_module(module), name)()
    module, name = plugin.get_input_args().rsplit(".", 1)
    keys = getattr(importlib.import_module(module), name)
    configuration = keys(**{"meft": {"gamma": GAMMA}})
    trains_as_two_lines(plugin.add_callbacks_pre_trainer(configuration, lora()), tmp_path)
    with pytest.raises(ConfigError, match="gamma"):
        plugin.add_callbacks_pre_trainer(keys(meft={"gamma": 0.3}), lora())
    assert plugin.add_callbacks_pre_trainer(keys(), lora())[0].state()["args"]["coupling"] == "momentum"


def test_ms_swift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--external_plugins` runs the file, `--callbacks meft` calls what it has put in `callbacks_map`."""
    if importlib.util.find_spec("swift") is None:
        stand_in(monkeypatch, "swift.callbacks", callbacks_map={})
    done = subprocess.run(
        [sys.executable, "-m", "meft.integrations.ms_swift"], capture_output=True, text=True, check=True
    )
    file = Path(done.stdout.strip())
    assert [each.name for each in file.parent.glob("*.py")] == [file.name], "modules beside it would hide others"
    spec = importlib.util.spec_from_file_location("_swift_external", file)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    from swift.callbacks import callbacks_map

    monkeypatch.setenv("MEFT_OPTIONS", json.dumps({"gamma": GAMMA}))
    trains_as_two_lines([callbacks_map["meft"](None, None)], tmp_path)
    monkeypatch.setenv("MEFT_OPTIONS", "gamma=0.03125")
    with pytest.raises(ConfigError, match=r"MEFT_OPTIONS is 'gamma=0.03125', which is no JSON object"):
        callbacks_map["meft"](None, None)


def test_llamafactory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_exp` takes the arguments without the key that is not its own, and callbacks."""
    given: list[tuple[Any, list[Any]]] = []
    arguments: dict[str, Any] = {"stage": "sft", "meft": {"gamma": GAMMA}}
    stand_in(monkeypatch, "llamafactory.hparams.parser", read_args=lambda: dict(arguments))
    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=lambda args, callbacks: given.append((args, callbacks)))
    monkeypatch.setitem(sys.modules, "llamafactory.hparams", types.ModuleType("llamafactory.hparams"))
    parser = types.ModuleType("llamafactory.hparams.parser")
    parser.read_args = lambda: dict(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, parser.__name__, parser)
    from meft.integrations.llamafactory import main

    main()
    ((passed, callbacks),) = given
    assert passed == {"stage": "sft"}
    trains_as_two_lines(callbacks, tmp_path)
    arguments["meft"] = 0.03125
    with pytest.raises(ConfigError, match=r"meft: 0.03125 in the arguments is no mapping"):
        main()


PROGRAM = """
import sys
import torch
from transformers import Trainer
from integrations.test_reversible import lora, transformers_trainer
run = transformers_trainer(lora(), sys.argv[1], eval(sys.argv[2]))
from meft.backbone.report import reversible_stacks
stacks = reversible_stacks(run.model)
run.train()
if run.is_world_process_zero():
    gammas = [stack.plan.coupling.steps[0].factor for stack in stacks.values()]
    torch.save({"state": run.model.state_dict(), "gammas": gammas}, sys.argv[1] + "/found.pt")
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return file


def meft_run(*words: str) -> subprocess.CompletedProcess[str]:
    from support.launching import environment

    start = [sys.executable, "-c", "from meft.cli import main; main()", "run"]
    return subprocess.run([*start, *words], capture_output=True, text=True, env=environment())


def test_run_makes_every_trainer_reversible(program: Path, tmp_path: Path) -> None:
    done = meft_run("--gamma", str(GAMMA), "--", sys.executable, str(program), str(tmp_path), "[]")
    assert done.returncode == 0, done.stderr
    assert "meft run: reversible: base_model.model.model.decoder.layers (3 layers)" in done.stderr
    expected = transformers_trainer(meft.make_reversible(lora(), gamma=GAMMA), tmp_path, [])
    expected.train()
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert_equal(found["state"], meft.restore(expected.model).state_dict())


def test_run_reaches_the_processes_that_a_launcher_starts(program: Path, tmp_path: Path) -> None:
    from support.launching import launcher

    done = meft_run("--gamma", str(GAMMA), "--", *launcher(), str(program), str(tmp_path), "[]")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("meft run: reversible") == 1, "one process of a machine says so"
    assert (tmp_path / "found.pt").exists()


def test_a_callback_of_the_programs_own_is_kept(program: Path, tmp_path: Path) -> None:
    own = "[__import__('meft').ReversibleCallback(gamma=1 / 8)]"
    done = meft_run("--gamma", str(GAMMA), "--", sys.executable, str(program), str(tmp_path), own)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "found.pt", weights_only=True)["gammas"] == [1 / 8]


def test_run_says_when_nothing_was_reversible_and_hands_the_exit_code_on() -> None:
    done = meft_run("--", sys.executable, "-c", "print('here')")
    assert done.returncode == 0 and done.stdout == "here\n"
    assert "made no Trainer of Transformers, so nothing was reversible" in done.stderr
    done = meft_run("--", sys.executable, "-c", "raise SystemExit(7)")
    assert done.returncode == 7 and done.stderr == ""
    done = meft_run("--", sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 128 + 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trl", "sft"], "'meft run trl sft' names no program behind '--'. Write the options, then --"),
        ([], "'meft run' names no program"),
        (["--", "no-such-program"], "No program 'no-such-program' was found."),
        (["--gama", "1", "--", sys.executable], "Unknown argument '--gama'. Did you mean --gamma?"),
        (["--gamma", "0.3", "--", sys.executable], "gamma"),
    ],
)
def test_bad_input_is_refused_before_the_program_starts(words: list[str], message: str) -> None:
    from meft.cli.run import run_command

    with pytest.raises(ConfigError) as caught:
        run_command(words)
    assert message in str(caught.value)


def test_the_program_keeps_its_own_startup_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('own')\n")
    import os

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    done = meft_run("--", sys.executable, "-c", "print('program')")
    assert done.stdout == "own\nown\nprogram\n"  # of meft run itself, of the program, and what that prints


def test_a_python_without_meft_is_refused(tmp_path: Path) -> None:
    """One that has transformers; others are left alone."""
    from meft.integrations import startup

    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").touch()
    site = str(Path(startup.__file__).parent)
    code = f"import sys; sys.path[:0] = {[site, str(tmp_path)]!r}; import sitecustomize; print('on')"
    bare = [sys.executable, "-I", "-S", "-c"]
    done = subprocess.run([*bare, code], capture_output=True, text=True)
    assert done.returncode == 1 and "has transformers, and no meft" in done.stderr
    (tmp_path / "transformers" / "__init__.py").unlink()
    (tmp_path / "transformers").rmdir()
    done = subprocess.run([*bare, code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "on\n"
