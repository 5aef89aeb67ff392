"""Builds wheel and sdist, installs the wheel alone into an empty environment, and runs the README's first lines there.

    python tests/project/package.py

The model of the README is on the hub; a tiny one with random weights, made here, stands in for it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY_ALONE = ("datasets", "trl", "matplotlib", "sklearn", "lm_eval")

_MODEL = """
import sys
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words = sorted(set(open(sys.argv[2], encoding="utf-8").read().split()))
known = Tokenizer(WordLevel({word: index for index, word in enumerate(["[UNK]", "[END]", *words])}, unk_token="[UNK]"))
known.pre_tokenizer = Whitespace()
PreTrainedTokenizerFast(tokenizer_object=known, unk_token="[UNK]", eos_token="[END]").save_pretrained(sys.argv[1])
LlamaForCausalLM(LlamaConfig(
    vocab_size=len(words) + 2, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
)).save_pretrained(sys.argv[1])
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT))
        [wheel] = (folder / "dist").glob("*.whl")
        assert list((folder / "dist").glob("*.tar.gz")), "there is no sdist"
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        constraints = str(ROOT / "constraints.txt")
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints, str(wheel))
        found = f"import importlib.util as u; print([n for n in {LIBRARY_ALONE!r} if u.find_spec(n)])"
        assert run(python, "-c", found) == "[]\n", "the library alone brings packages that it does not need"
        run(python, "-c", _MODEL, str(folder / "model"), str(ROOT / "README.md"))
        script = lines_of_the_readme(str(folder / "model"))
        (folder / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
        print(run(python, "-c", script, cwd=folder), end="")
        plain = (
            "import sys; from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
            "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('model'), 'my-lora')\n"
            "assert 'meft' not in sys.modules"
        )
        run(python, "-W", "error::UserWarning", "-c", plain, cwd=folder)
        run(str(folder / "venv" / "bin" / "meft"), "--help")
    print("The wheel works alone: the README's lines train an adapter, and PEFT loads it without meft.")


def lines_of_the_readme(model: str) -> str:
    """The README's first block of Python, with another model in the place of its own."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None, "the README has no block of Python"
    script, count = re.subn(r'^name = ".*"$', f"name = {model!r}", block[1], flags=re.MULTILINE)
    assert count == 1, 'the README\'s first block does not say `name = "..."`'
    return script


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} ... failed:\n{done.stdout[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
