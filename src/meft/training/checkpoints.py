"""Checkpoints that are whole or absent, and a Trainer that writes them.

The Trainer of Transformers writes a checkpoint in place, file by file: a process killed in the middle leaves a folder
that looks like the newest checkpoint and cannot be resumed from. Here it writes into a staging folder, which is given
a manifest of its files and sizes, forced to disk and renamed. Older checkpoints are removed after that, never before.
A checkpoint counts as complete when every file of its manifest is there as it was written, by size and digest; that
also recognises one that was half removed or damaged later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, rotate_checkpoints

from meft.errors import CheckpointError, ConfigError, MeftError, MissingPackageError, first_line
from meft.loading.models import loading, quiet_transformers
from meft.storage.claims import check_model_folder, read_object
from meft.storage.files import STAGING_PREFIX, publish_folder, staged, write_json
from meft.storage.manifest import MANIFEST, check_files, manifest_of
from meft.storage.outputs import writing

from .selection import EarlyStopping

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def write_manifest(folder: Path, *, resumable: bool) -> None:
    """Records the name, size in bytes and SHA-256 of every file in `folder`."""
    write_json(folder / MANIFEST, manifest_of(folder, resumable=resumable))


def check_checkpoint(folder: Path) -> None:
    """Refuses a folder that cannot be resumed from.

    Raises:
        CheckpointError: The folder or its manifest is missing, a file of it is missing or is not as it was written, or
            it holds the weights only.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        state = f"has no {MANIFEST}, so it is no complete checkpoint of meft" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"{folder} {state}. Give a folder named {PREFIX_CHECKPOINT_DIR}-<step> of a run.")
    content = read_object(manifest, {"resumable": bool, "files": dict})
    check_files(folder, content["files"])
    if not content["resumable"]:
        raise CheckpointError(
            f"{folder} holds the weights only (--save_only_model), so training cannot go on from it as if it had "
            "never stopped. Start anew with --resume never."
        )


def read_state(checkpoint: Path) -> TrainerState:
    """The Trainer's state in a checkpoint.

    Raises:
        CheckpointError: It is missing or cannot be read.
    """
    path = checkpoint / TRAINER_STATE_NAME
    content = read_object(path, {"global_step": int, "max_steps": int, "log_history": list})
    try:
        return TrainerState(**content)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no state of the Trainer: {first_line(error)} Resume from an earlier checkpoint."
        ) from error


@contextmanager
def _reading_state(checkpoint: str | None) -> Iterator[None]:
    """Names the checkpoint where PyTorch cannot read the state of an optimizer, a scheduler or a generator."""
    try:
        yield
    except (MeftError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint} has a state of optimizer, scheduler or generators that cannot be read: "
            f"{type(error).__name__}: {first_line(error)} Resume from an earlier checkpoint, or start anew with "
            "--overwrite_run."
        ) from error


@contextmanager
def setting_up() -> Iterator[None]:
    """Says what the Trainer finds wrong with its arguments when it is made, and makes optimizer and schedule.

    Raises:
        ConfigError: A value is not valid, alone or beside the others.
        MissingPackageError: A package that an argument asks for is not installed.
    """
    try:
        yield
    except (MeftError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = first_line(error)
        if isinstance(error, ImportError) or "to be installed" in said or "not installed" in said:
            raise MissingPackageError(f"{said} Install it, or leave out the option that needs it.") from error
        raise ConfigError(
            f"The Trainer of Transformers does not take its arguments: {said} See meft train --help."
        ) from error


def newest_complete(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed from, and why each newer one cannot."""
    found = {int(match[1]): path for path in run_folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    reasons = []
    for _, path in sorted(found.items(), reverse=True):
        try:
            check_checkpoint(path)
        except CheckpointError as error:
            reasons.append(str(error))
        else:
            return path, reasons
    return None, reasons


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints are whole or absent.

    Args:
        before_training: Called with the model when it is ready for its first step, before the Trainer's clock starts.
        extra_files: Called with the folder of every checkpoint, to write files of the run's own into it.
        surroundings: Makes the context that every forward pass runs in.
        scorer: Scores the model at every evaluation, beside `compute_metrics`; returns metrics by name.
        *args: As for `transformers.Trainer`.
        **kwargs: As for `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        before_training: Callable[[Any], None] | None = None,
        extra_files: Callable[[Path], None] | None = None,
        scorer: Callable[[Any], dict[str, float]] | None = None,
        surroundings: Callable[[], AbstractContextManager[Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._before_training = before_training
        self._extra_files = extra_files
        self._scorer = scorer
        self._surroundings = surroundings
        self._staging: Path | None = None
        self._resumed_from: Path | None = None

    def train_or_restore(self, checkpoint: Path | None) -> None:
        """Trains from `checkpoint` on; one that stands at the last step, or where training stopped, is only loaded.

        The Trainer's loop, given such a checkpoint, would train one step more in the middle of an epoch.
        """
        if checkpoint is None:
            self.train()
            return
        state = read_state(checkpoint)
        stopped = any([callback.restore(state) for callback in self._stoppers])
        if state.global_step < state.max_steps and not stopped:
            self._resumed_from = checkpoint
            self.train(resume_from_checkpoint=os.fspath(checkpoint))
            return
        self.state = state
        self._own_best(checkpoint.parent)
        self._load_from_checkpoint(os.fspath(checkpoint))
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()

    @property
    def stopped_early(self) -> bool:
        """Whether training stopped for want of progress before its last step."""
        return self.state.global_step < self.state.max_steps and any(callback.stopped for callback in self._stoppers)

    @property
    def _stoppers(self) -> list[EarlyStopping]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStopping)]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._before_training is not None:
            self._before_training(self.model)
        return prepared

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, with what the scorer finds among the metrics, so that it can choose the best checkpoint."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._scorer is None or metric_key_prefix != "eval":
            return output
        scores = {f"{metric_key_prefix}_{name}": value for name, value in self._scorer(self.model).items()}
        return output._replace(metrics={**(output.metrics or {}), **scores})

    def compute_loss_context_manager(self) -> ExitStack:
        """As the Trainer's, with the surroundings of the way to train."""
        stack = super().compute_loss_context_manager()
        if self._surroundings is not None:
            stack.enter_context(self._surroundings())
        return stack

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, without a progress bar of its own inside that of the training."""
        with quiet_transformers():
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_model_folder(Path(resume_from_checkpoint))
        with loading(resume_from_checkpoint):
            if not self._load_whole_model(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with setting_up():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with setting_up():
            return super().create_scheduler(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading_state(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading_state(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        """Called when the Trainer has read the state of a checkpoint."""
        if self._resumed_from is not None:
            self._own_best(self._resumed_from.parent)
        super()._load_callback_state()

    def _own_best(self, run_folder: Path) -> None:
        """Takes the best checkpoint from the run that is gone on with, wherever its state says that it is."""
        said = self.state.best_model_checkpoint
        name = None if said is None else Path(str(said)).name
        own = None if name is None or _NAME.fullmatch(name) is None else run_folder / name
        self.state.best_model_checkpoint = None if own is None or not own.is_dir() else str(own)

    def _load_best_model(self) -> None:
        if not self._load_whole_model(Path(self.state.best_model_checkpoint or "")):
            super()._load_best_model()

    def _load_whole_model(self, checkpoint: Path) -> bool:
        """Loads a model that was saved whole, as `from_pretrained` does; `False` for whatever is saved otherwise.

        The Trainer compares the names of weights as they are. But some models, ViT for one, are saved under the names
        that they had in Transformers 4: it would load none of their weights and go on with a warning.
        """
        model = self.model
        if not isinstance(model, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        with quiet_transformers():
            saved = type(model).from_pretrained(checkpoint, config=model.config, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
        return True

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            advice = "Make room, and the same command goes on from the checkpoint before."
            with writing(run_folder / name, advice), staged(run_folder, name) as staging:
                self._write_checkpoint(model, trial, staging, run_folder / name)
        else:
            self._write_checkpoint(model, trial, run_folder / f"{STAGING_PREFIX}{name}", run_folder / name)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _write_checkpoint(self, model: Any, trial: Any, staging: Path, place: Path) -> None:
        """Every process writes its part into `staging`; the one that saves renames it to `place`."""
        # The limit and the upload concern the finished checkpoint, so both are kept from the Trainer while it writes.
        limit, push = self.args.save_total_limit, self.args.push_to_hub
        self._staging, self.args.save_total_limit, self.args.push_to_hub = staging, None, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging, self.args.save_total_limit, self.args.push_to_hub = None, limit, push
        self.accelerator.wait_for_everyone()
        # The Trainer looked for the best checkpoint inside the staging folder.
        best = place.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if self.state.best_global_step and (best == place or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            written = staging / place.name
            self.state.save_to_json(os.fspath(written / TRAINER_STATE_NAME))
            if self._extra_files is not None:
                self._extra_files(written)
            write_manifest(written, resumable=not self.args.save_only_model)
            publish_folder(written, place)
        self.accelerator.wait_for_everyone()
