"""`meft study`: answers one of the paper's questions with a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from meft.errors import ConfigError
from meft_lab.studies import STUDIES, run_study
from meft_lab.studies.report import table


def study_command(argv: Sequence[str], *, command: str) -> int:
    """Runs the words after `meft study`.

    Example:
        >>> study_command(["depth", "--depths", "12", "24", "--output_dir", "studies"], command="meft study depth ...")
        0

    Returns:
        0.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedModelError, OutputFolderError: What was given is not valid.
    """
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        _list_studies()
        return 0
    if words[0] not in STUDIES:
        raise ConfigError(
            f"There is no study {words[0]!r}; the studies are {', '.join(STUDIES)}. meft study --help says what each "
            "is about."
        )
    study = STUDIES[words[0]]
    results = run_study(study, words[1:], command=command)
    Console().print(table(study, results))
    return 0


def _list_studies() -> None:
    console = Console(highlight=False)
    console.print("Usage: meft study NAME [arguments.yaml] [--name value ...]\n", markup=False)
    console.print("Answers one question with a table (markdown and JSON) and a figure. The same command goes on where")
    console.print("it stopped. meft study NAME --help lists the arguments; --quick is a smoke run.\n", markup=False)
    for study in STUDIES.values():
        console.print(f"  [bold]{study.name:<18}[/bold]{study.sentence}", soft_wrap=True)
