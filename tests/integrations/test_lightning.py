"""`ReversibleCallback` of Lightning, in Lightning's own Trainer where it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import meft
from meft.backbone.report import reversible_stacks
from meft.errors import ConfigError, MeftWarning
from support import models
from support.peft_helpers import assert_equal

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step.:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def language_model() -> nn.Module:
    base = models.build("opt", "CAUSAL_LM", layers=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4))


def module(make: Any = language_model, *, late: bool = False, ends: BaseException | None = None) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[bool] = []
            if not late:
                self.model = make()

        def configure_model(self) -> None:
            if late and not hasattr(self, "model"):
                self.model = make()

        def training_step(self, batch: Any, index: int) -> Any:
            self.seen.append(bool(reversible_stacks(self)))
            if ends is not None and index == 1:
                raise ends
            return self.model(**batch).loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.seen.append(bool(reversible_stacks(self)))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    return Module()


def rows() -> Any:
    columns = models.batch("opt", "CAUSAL_LM", size=12)
    parts = [{name: column[i] for name, column in columns.items()} for i in range(12)]
    return torch.utils.data.DataLoader(parts, batch_size=4)


def trainer(folder: Path, callbacks: list[Any], **options: Any) -> Any:
    import lightning.pytorch as pl

    quiet = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks, **{"max_epochs": 1, **quiet, **options})


@pytest.mark.parametrize("late", [False, True])
def test_weights_are_those_of_two_lines(late: bool, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from meft.integrations.lightning import ReversibleCallback

    by_hand = module(lambda: meft.make_reversible(language_model(), gamma=1 / 16))
    trainer(tmp_path / "hand", []).fit(by_hand, rows())
    meft.restore(by_hand.model)
    trained = module(late=late)
    run = trainer(tmp_path / "callback", [ReversibleCallback(gamma=1 / 16)])
    run.fit(trained, rows())
    assert trained.seen == [True] * 3 and not reversible_stacks(trained)
    assert_equal(trained.state_dict(), by_hand.state_dict())
    (checkpoint,) = (tmp_path / "callback").rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert_equal(saved["state_dict"], trained.state_dict())

    resumed = trainer(tmp_path, [ReversibleCallback(gamma=1 / 8)], max_epochs=2, enable_checkpointing=False)
    with pytest.warns(MeftWarning, match="gamma=0.0625 there and 0.125 now"):
        resumed.fit(module(), rows(), ckpt_path=checkpoint)
    trained.seen.clear()
    run.validate(trained, rows(), verbose=False)
    assert trained.seen == [False] * 3
    run.fit_loop.max_epochs = 2
    run.fit(trained, rows())
    assert trained.seen[3:] == [True] * 3 and not reversible_stacks(trained)


@pytest.mark.parametrize("ending", [RuntimeError("broken"), KeyboardInterrupt()])
def test_after_an_exception_the_model_is_ordinary(ending: BaseException, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from meft.integrations.lightning import ReversibleCallback

    broken = module(ends=ending)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer(tmp_path, [ReversibleCallback()]).fit(broken, rows())
    assert broken.seen == [True] * 2 and not reversible_stacks(broken)


def test_models_that_are_reversible_already_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from meft.integrations.lightning import ReversibleCallback

    with pytest.raises(ConfigError, match=r"ReversibleCallback makes the model reversible, and .* already"):
        trainer(tmp_path, [ReversibleCallback()]).fit(module(lambda: meft.make_reversible(language_model())), rows())


def test_without_lightning_the_module_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "import meft\n"
        "try:\n    import meft.integrations.lightning\n"
        "except meft.errors.MissingPackageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install lightning" in done.stdout
