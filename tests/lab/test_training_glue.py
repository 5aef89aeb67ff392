"""Every task of GLUE through `meft train` and `meft evaluate`, from its official files."""

from __future__ import annotations

from pathlib import Path

import pytest

from meft_lab.tasks import GLUE_TASKS
from support.glue_layouts import LAYOUTS, write
from support.tiny import evaluate, make_model, train

# Of two rows each layout makes six.
EVERY_STEP = ["--max_steps=2", "--per_device_train_batch_size=3", "--learning_rate=0.01", "--eval_strategy=steps",
              "--eval_steps=1", "--save_strategy=steps", "--save_steps=1", "--load_best_model_at_end"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "bert")


@pytest.mark.parametrize("task", [name for name in GLUE_TASKS if name != "wnli"])
def test_every_task(task: str, model: Path, tmp_path: Path) -> None:
    content = LAYOUTS[task][0].replace("A", "a cat")  # a word that the model knows: predictions differ
    content = content.replace("He ", "the cat ").replace("no wit ", "a cat ")
    header = "" if task == "cola" else content.splitlines(keepends=True)[0]
    rows = content.removeprefix(header)
    data = ["--task", task, f"--data_dir={write(tmp_path / 'glue' / GLUE_TASKS[task].folder, task, header + rows * 3)}"]
    main = GLUE_TASKS[task].metrics[0] if task != "mnli" else "matched_accuracy"
    found = train(model, data, tmp_path / "run", *EVERY_STEP, f"--metric_for_best_model={main}")
    names = [*GLUE_TASKS[task].metrics, "loss"]
    sets = [""] if task != "mnli" else ["matched_", "mismatched_"]
    assert found["metrics"].keys() == {f"{kind}{name}" for kind in sets for name in names}
    assert found["best_step"] in (1, 2) and found["rows"]["train"] == 6
    assert evaluate(tmp_path / "run") == found["metrics"]
