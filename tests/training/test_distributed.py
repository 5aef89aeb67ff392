"""Several processes on the CPU under DistributedDataParallel and FSDP2 compute what one process does.

Each launch pays for the imports of its processes, so a test makes all checks of one launch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from support import tiny
from support.launching import CONFIGURATIONS, EXAMPLES, launch, launcher, run

USUAL = ("meft1", "LoRA")
ALL = (*USUAL, "meft1, frozen and cached layers", "full")


def assert_equal_to_one_process(found: dict[str, dict[str, float]], tolerance: float = 1e-6) -> None:
    assert found
    for name, deviations in found.items():
        assert deviations["loss"] <= tolerance and deviations["gradients"] <= tolerance, (name, deviations)


def check_ddp(found: dict[str, Any], cases: tuple[str, ...], processes: int) -> None:
    assert found["processes"] == processes
    assert set(found["cases"]) == {f"{case}, {precision}" for case in cases for precision in ("no", "bf16")}
    assert_equal_to_one_process(found["cases"])
    for deviations in found["cases"].values():
        assert deviations["difference between processes"] == 0
        assert deviations["difference before the last batch"] > 1e-3


def check_fsdp(found: dict[str, Any], cases: tuple[str, ...], processes: int) -> None:
    assert len(found["equality"]) == 5 * len(cases)
    # Sums of bfloat16 numbers, whose order differs where encoder states get gradients from every layer.
    coarse = (
        {"full, bfloat16 weights": found["equality"].pop("full, bfloat16 weights", None)} if "full" in cases else {}
    )
    assert_equal_to_one_process(found["equality"])
    if coarse:
        assert_equal_to_one_process(coarse, 1e-2)
    for rebuilt, stored in found["collectives"].values():
        assert rebuilt == stored and sum(stored.values()) >= 2 * 3  # at least forward and backward of three layers
    for resumed in found["resuming"].values():
        before, after = resumed["losses"]
        assert before == after and len(before) == 2 and before[0] != before[1]
        assert resumed["in one process"] <= 1e-6
        assert resumed["files"] == processes
    for name, prepared in found["accelerate"].items():
        assert_equal_to_one_process({name: prepared})
        assert prepared["layers that are units"] == prepared["weights that are shards"] == 1
        assert prepared["after loading"] == 0 and prepared["adapter in one process"] <= 1e-6
    assert set(found["accelerate"]) == set(USUAL)


ONE_UNIT = (
    "The layer is rebuilt as a whole, so it must be one unit: call fully_shard on every {} and on nothing inside. With "
    "accelerate, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP does that where fsdp_transformer_layer_cls_to_wrap is "
    "left out."
)
FSDP1 = (
    "runs under FullyShardedDataParallel (FSDP1), which puts views of one flat tensor in the place of its weights. A "
    "reversible layer needs the weights themselves. Use FSDP2: torch.distributed.fsdp.fully_shard on every reversible "
    "layer and on the model, or fsdp_version: 2 in the configuration of accelerate."
)
TOO_LATE = (
    "are spread over processes by fully_shard already, and layers can be exchanged only before that. Call "
    "make_reversible or get_peft_model first, then fully_shard. To take the layers back after training, save the full "
    "state dict and load it into a model that is not sharded."
)
REFUSALS = {
    "pretrained layer": "UnsupportedModelError: model.decoder.layers.0 of OPTDecoder is reversible, and the pretrained "
    "layer inside it was given to fully_shard. " + ONE_UNIT.format("MeftLayer"),
    "attention": "UnsupportedModelError: base_model.model.model.decoder.layers.0 of OPTDecoder is reversible, and "
    "self_attn inside it was given to fully_shard. " + ONE_UNIT.format("ReversibleLayer"),
    "FSDP1": f"UnsupportedModelError: base_model.model.model.decoder.layers.0 of OPTDecoder {FSDP1}",
    "FSDP1, flat": f"UnsupportedModelError: A layer of model.encoder.layers {FSDP1}",
    "conversion afterwards": f"ConfigError: The weights of PeftModelForCausalLM {TOO_LATE}",
    "restoring": f"ConfigError: The weights of PeftModelForCausalLM {TOO_LATE}",
    "another adapter": f"ConfigError: The weights of OPTForCausalLM (model.decoder.layers.0) {TOO_LATE}",
}


@pytest.mark.parametrize("file", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda file: file.stem)
def test_configuration_files(file: Path) -> None:
    """Accelerate knows every key of them, and they run the examples that they say."""
    configuration = load_config_from_file(str(file))
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert configuration.distributed_type == expected[file.stem]
    assert configuration.fsdp_config.get("fsdp_version", 2) == 2
    assert configuration.deepspeed_config.get("zero_stage", 2) == 2
    script = file.read_text().splitlines()[0].split()[-1]
    assert (EXAMPLES.parent / script).is_file()


def test_ddp(tmp_path: Path) -> None:
    """With gradient accumulation under `no_sync`, in float32 and under bfloat16 autocast."""
    check_ddp(launch("ddp_worker.py", tmp_path, *USUAL), USUAL, 2)


def test_fsdp2(tmp_path: Path) -> None:
    """Units of a layer, sharded checkpoints, the configuration file as accelerate reads it, and what is refused."""
    found = launch("fsdp_worker.py", tmp_path, *USUAL, configuration="fsdp2.yaml")
    check_fsdp(found, USUAL, 2)
    assert found["refusals"] == REFUSALS


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_every_case(processes: int, tmp_path: Path) -> None:
    """Three processes divide neither the widths of the weights nor the adapters."""
    check_ddp(launch("ddp_worker.py", tmp_path, *ALL, processes=processes), ALL, processes)
    found = launch("fsdp_worker.py", tmp_path, *ALL, configuration="fsdp2.yaml", processes=processes)
    check_fsdp(found, ALL, processes)


@pytest.mark.slow
def test_meft_train_in_two_processes(tmp_path: Path) -> None:
    """One output folder, written by one process; every row is evaluated once, though nine do not divide by two."""
    model, rte = tiny.make_model(tmp_path / "model"), tiny.make_rte(tmp_path / "RTE")
    script = Path(sys.executable).with_name("meft")
    words = [f"--model_name_or_path={model}", "--task=rte", f"--data_dir={rte}", "--max_steps=4", "--use_cpu=true"]
    words += ["--per_device_train_batch_size=2", "--per_device_eval_batch_size=2", "--measure_steps=0"]
    run([*launcher(), str(script), "train", *words, f"--output_dir={tmp_path / 'two'}"])
    found = json.loads((tmp_path / "two" / "results.json").read_text())
    assert found["steps"] == 4 and found["rows"]["validation"] == 9
    correct = found["metrics"]["accuracy"] * 9
    assert correct == pytest.approx(round(correct))
    file = tmp_path / "evaluated.json"
    words = [f"--model_name_or_path={tmp_path / 'two'}", "--use_cpu=true", f"--results_file={file}"]
    run([sys.executable, str(script), "evaluate", *words])
    metrics = json.loads(file.read_text())["metrics"]
    assert metrics.pop("accuracy") == found["metrics"].pop("accuracy")
    # The Trainer weighs the loss of a last batch that is not full a little differently then.
    assert metrics == pytest.approx(found["metrics"], rel=1e-2)


@pytest.mark.slow
def test_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where DeepSpeed is installed: ZeRO-2 computes what one process does, ZeRO-3 is refused."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = launch("deepspeed_worker.py", tmp_path, *ALL)
    assert set(found["equality"]) == set(found["refused"]) == set(ALL)
    for name, deviations in found["equality"].items():
        # Gradients are read off the weights they were taken from.
        assert deviations["gradients"] <= 1e-5, name
    assert found["refused"]["LoRA"] == (
        "UnsupportedModelError: The weights of base_model.model.model.decoder.layers.0 of OPTDecoder are partitioned "
        "by DeepSpeed ZeRO-3, which takes them away between the forward pass of a module and its backward pass, so a "
        "reversible layer cannot return their gradients. Use ZeRO stage 2 (gradients and optimizer state are sharded), "
        "or FSDP2, which shards the weights as well."
    )
