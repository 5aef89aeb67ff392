"""What the studies are made of: changes to a model, what is looked at in it, and the batches that all of them share."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meft.errors import ConfigError
from meft.methods.registry import apply_method
from meft.training.checkpoints import CheckpointingTrainer
from meft_lab.studies import STUDIES, factors, figures, report, runner
from meft_lab.studies.base import StudyArguments
from meft_lab.studies.encoder_decoder import Grid as EncoderDecoderGrid
from meft_lab.studies.encoder_decoder import _base, _batch
from meft_lab.studies.initialisation import draw_adapters
from meft_lab.studies.probes import adapter_gradients, gradient_distance, largest_stream, verified, without_dropout
from meft_lab.studies.quick import quick_defaults
from meft_lab.studies.starting_point import draw_factors, fill_vectors
from meft_lab.studies.trained import Change, depth_of, settings_of, starting_point, training_cells
from support.models import batch, build


def method(name: str, **options: Any) -> nn.Module:
    return apply_method(build("bert"), name, task_type="SEQ_CLS", **options)


def request_of(folder: Path, *words: str) -> Any:
    console = runner.Console(quiet=True)
    return runner._request(STUDIES["starting-point"], ["--quick", "--output_dir", str(folder), *words], console)


def test_both_factors_of_lora_are_drawn_with_the_scale() -> None:
    model = method("lora", lora_rank=8)
    draw_factors(model, std=0.3)
    drawn = [p.detach() for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n]
    assert all(value.std() == pytest.approx(0.3, rel=0.35) for value in drawn)
    others = {n for n, p in model.named_parameters() if "lora_" not in n}
    before = dict(method("lora", lora_rank=8).named_parameters())
    assert all(torch.equal(before[n], dict(model.named_parameters())[n]) for n in others if "classifier" not in n)


def test_the_vectors_of_ia3_are_filled() -> None:
    model = method("ia3")
    fill_vectors(model, value=0.5)
    vectors = [p for n, p in model.named_parameters() if ".ia3_l." in n]
    assert len(vectors) == 4 * 4 and all(bool((vector == 0.5).all()) for vector in vectors)


def test_adapters_are_drawn_larger_or_silenced() -> None:
    model = method("meft1")
    draw_adapters(model, std=0.5)
    weights = {n: p.detach() for n, p in model.named_parameters() if "meft_" in n and n.endswith("weight")}
    assert weights and all(value.std() == pytest.approx(0.5, rel=0.3) for value in weights.values())
    draw_adapters(model, std=0.0)
    for name, value in weights.items():
        assert bool(value.any()) == ("_up." not in name)


def test_the_starting_point_is_the_change_of_the_last_hidden_state() -> None:
    inputs = batch("bert")
    lora = method("lora").eval()
    assert starting_point(lora, inputs) == 0.0
    draw_factors(lora, std=0.3)
    lora.eval()
    with torch.no_grad():
        hidden = lora(**inputs, output_hidden_states=True).hidden_states[-1]
        with lora.disable_adapter():
            plain = lora(**inputs, output_hidden_states=True).hidden_states[-1]
    expected = float((hidden - plain).norm() / plain.norm())
    assert expected > 0.01 and starting_point(lora, inputs) == pytest.approx(expected, rel=1e-5)
    assert starting_point(build("bert"), inputs) is None
    momentum, meft1 = (starting_point(method(name), inputs) for name in ("momentum", "meft1"))
    assert 0 < momentum < meft1


def test_everyone_trains_on_the_same_batches_with_the_same_dropout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    step = CheckpointingTrainer.training_step

    def watched(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        seen.append((inputs["input_ids"], torch.get_rng_state()))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(CheckpointingTrainer, "training_step", watched)

    def steps(seed: str, method: str, change: Change | None = None) -> tuple[list[Tensor], Tensor]:
        seen.clear()
        request = request_of(tmp_path, "--max_steps", "3", "--seeds", seed)
        (cell,) = training_cells(request, "", ("--method", method), change)
        cell.run(lambda share: None)
        return [ids for ids, _ in seen], seen[0][1]

    # Numbers that are drawn for another start leave batches and dropout as they are.
    change = Change({"scale": 0.1}, partial(draw_adapters, std=0.1))
    plain, changed, other = steps("3", "adapter"), steps("3", "meft1", change), steps("4", "adapter")
    assert len(plain[0]) == 3 and all(map(torch.equal, plain[0], changed[0]))
    assert torch.equal(plain[1], changed[1])
    assert not all(map(torch.equal, plain[0], other[0]))


def test_gradients_are_compared_as_one_vector() -> None:
    one, two = torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])
    assert gradient_distance([one, two], [one, two]) == 0
    assert gradient_distance([one, two + 1], [one, two]) == pytest.approx(1 / 5)
    assert gradient_distance([one, None], [one, two]) == pytest.approx(4 / 5)
    assert gradient_distance([one, None, None], [one, two, None]) == pytest.approx(4 / 5)
    assert math.isnan(gradient_distance([one * math.nan], [one]))


def test_only_gradients_of_adapters_are_looked_at() -> None:
    model = method("meft1")
    adapters = [p for n, p in model.named_parameters() if "meft_" in n]
    found = adapter_gradients(model, batch("bert"))
    assert [value.shape for value in found if value is not None] == [p.shape for p in adapters]
    again = adapter_gradients(model, batch("bert"))
    assert gradient_distance(found, again) == 0
    assert gradient_distance(found, adapter_gradients(method("meft1", arithmetic="float"), batch("bert"))) > 0


def test_the_largest_stream_and_its_overflow_are_findings() -> None:
    inputs = batch("bert")
    found = largest_stream(method("meft1", lam=1.0), inputs)
    small = largest_stream(method("meft1"), inputs)
    assert not found["overflow"] and 1 < small["largest_stream"] < found["largest_stream"]
    model = method("meft1", fraction_bits=24)
    with torch.no_grad():
        model.get_base_model().bert.encoder.layer[-1].pretrained.output.LayerNorm.weight.mul_(1000)
    assert largest_stream(model, inputs)["overflow"]


def test_verified_tells_exact_from_float_arithmetic() -> None:
    exact, drifted = (verified(method("meft1", arithmetic=name), batch("bert")) for name in ("exact", "float"))
    assert exact["bitwise"] and exact["reconstruction_error"] == 0
    assert not drifted["bitwise"] and drifted["reconstruction_error"] > 0
    assert exact["starting_point"] == pytest.approx(drifted["starting_point"], rel=1e-2)


def test_dropout_is_switched_off_everywhere() -> None:
    model = build("bert", dropout=0.5)
    without_dropout(model)
    adapted = apply_method(copy.deepcopy(model), "meft1", task_type="SEQ_CLS").train()
    losses = {float(adapted(**batch("bert")).loss.detach()) for _ in range(3)}
    assert len(losses) == 1


def test_factors_that_are_trained_differ_in_one_from_the_couplings_own() -> None:
    assert factors._own("meft1") == {"lam": 0.1, "beta": 1}
    assert factors._own("meft3") == {"lam": 0.1, "beta": 0.1}
    assert factors._own("momentum") == {"gamma": 1 / 32}
    assert factors._away("meft1", {"lam": 0.5, "beta": 1.0}) == 1
    assert factors._away("meft1", {"lam": 0.5, "beta": 0.1}) == 2
    # What a coupling has anyway is left out, so that it is the same training as that of another study.
    assert factors._own_left_out("meft1", {"lam": 0.1, "beta": 1.0}) == ("--method", "meft1")
    assert factors._own_left_out("meft1", {"lam": 0.5, "beta": 1.0}) == ("--method", "meft1", "--lam", "0.5")


def test_instability_is_a_finding(tmp_path: Path) -> None:
    request = request_of(tmp_path, "--fraction_bits", "24", "--method", "meft1")

    def grow(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_base_model().bert.embeddings.LayerNorm.weight.mul_(1e6)

    (cell,) = training_cells(request, "grown", ("--method", "meft1"), Change({"grown": 1}, grow))
    found = cell.run(lambda share: None)
    assert found["score"] is None and found["problem"].startswith("StreamOverflowError: ")


def test_full_fine_tuning_takes_none_of_the_modules_that_others_train_by_default(tmp_path: Path) -> None:
    request = request_of(tmp_path).with_defaults(modules_to_save=("pooler",))
    words = ("--method", "full")
    assert settings_of(request, words)["modules_to_save"] == "None"
    assert settings_of(request, ("--method", "lora"))["modules_to_save"] == "['pooler']"
    asked = request_of(tmp_path, "--modules_to_save", "classifier")
    assert settings_of(asked, words)["modules_to_save"] == "['classifier']"  # the user's own are refused, not dropped


def test_the_depth_of_a_model_is_read(tmp_path: Path) -> None:
    assert depth_of(request_of(tmp_path)) == 2


def test_smoke_runs_keep_what_the_user_gives(tmp_path: Path) -> None:
    parsed = request_of(
        tmp_path, "--train_file", "mine.tsv", "--validation_file", "mine.tsv", "--seeds", "1", "2"
    ).parsed()
    assert parsed[StudyArguments].seeds == [1, 2]
    defaults = quick_defaults(STUDIES["starting-point"], tmp_path, parsed)
    assert "train_file" not in defaults and "model_name_or_path" not in defaults


def test_texts_are_copied_backwards() -> None:
    grid = EncoderDecoderGrid(batch_size=2, seq_length=6)
    found = _batch(grid, _base("t5").config, seed=0)
    assert torch.equal(found["labels"][0], found["input_ids"][0].flip(0))
    assert found["input_ids"][1, 3:].tolist() == [1, 1, 1] and found["attention_mask"][1].sum() == 3
    assert torch.equal(found["labels"][1, :3], found["input_ids"][1, :3].flip(0))
    assert found["labels"][1, 3:].tolist() == [-100] * 3


def test_numbers_are_written_short() -> None:
    assert [report.number(value) for value in (None, 0, 0.12345, 1.5e-7, 32768.0)] == [
        "not finite",
        "0",
        "0.123",
        "1.5e-07",
        "3.3e+04",
    ]
    assert (report.score(None), report.score(0.5)) == ("diverged", "0.5000")
    assert (report.yes_no(None), report.yes_no(True), report.yes_no(False)) == ("", "yes", "no")
    assert (report.plain(0.0625), report.plain(3), report.plain(None)) == ("0.0625", "3", "")


def test_bars_say_where_there_is_nothing() -> None:
    axes = figures.new(3, 2).subplots()
    figures.bars(axes, ["a", "b"], [2.0, None], "{:.1f}", ["red", "blue"])
    assert [text.get_text() for text in axes.texts] == ["2.0", "none"]


def test_an_unknown_study_is_refused() -> None:
    from meft_lab.cli.study import study_command

    with pytest.raises(ConfigError, match=r"There is no study 'depht'; the studies are starting-point, factors, "):
        study_command(["depht"], command="meft study depht")


def test_the_studies_are_listed_each_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    from meft_lab.cli.study import study_command

    assert study_command(["--help"], command="meft study --help") == 0
    listed = capsys.readouterr().out
    assert all(study.name in listed and study.sentence in listed for study in STUDIES.values())
    with pytest.raises(SystemExit) as stopped:
        study_command(["depth", "--help"], command="meft study depth --help")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "--depths" in shown and "--output_dir" in shown
