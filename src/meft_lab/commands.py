"""The laboratory's commands, which `meft` finds through the entry point "meft.commands".

Nothing of the laboratory is imported before one of them runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meft.errors import InterruptedRunError


def add_commands(commands: Any) -> None:
    """Adds sweep, study, demo, demo-llm and families to the command line."""
    for command in (sweep, study, demo, demo_llm, families):
        commands.add(command)


def sweep(words: Sequence[str], line: str) -> int:
    """Run every combination of a recipe, go on where it stopped, and write one table.

    Arguments of meft train follow and hold for every run: --model_name_or_path, --data_dir, and so on. The name of an
    axis of the recipe narrows it: --task rte mrpc --seeds 0.
    """
    from meft.parsing import parse_known
    from meft_lab.cli.sweep import SweepArguments, sweep_command

    arguments, more = parse_known((SweepArguments,), words, command="sweep", description=sweep.__doc__)
    try:
        return sweep_command(
            arguments.recipe,
            more,
            output_dir=arguments.output_dir,
            dry_run=arguments.dry_run,
            table_only=arguments.table_only,
            command=line,
        )
    except KeyboardInterrupt:
        raise InterruptedRunError from None


def study(words: Sequence[str], line: str) -> int:
    """Answer one of the paper's questions with a table and a figure; meft study --help lists them."""
    from meft_lab.cli.study import study_command

    try:
        return study_command(words, command=line)
    except KeyboardInterrupt:
        raise InterruptedRunError from None


def demo(words: Sequence[str], line: str) -> None:
    """Train a real BERT on your own Python library by every method side by side; needs no network."""
    from meft.parsing import parse
    from meft_lab.cli.demo import DemoArguments
    from meft_lab.demo import run

    (arguments,) = parse((DemoArguments,), words, command="demo", description=demo.__doc__)
    run(arguments.output_dir, seed=arguments.seed, command=line, **arguments.chosen())


def demo_llm(words: Sequence[str], line: str) -> None:
    """Train a language model of this machine by LoRA, plain, checkpointed and reversible; needs no network."""
    from dataclasses import replace

    from meft.parsing import parse
    from meft_lab.cli.demo import LanguageDemoArguments
    from meft_lab.demo.language import METHODS, LanguageSettings, run_language

    (arguments,) = parse((LanguageDemoArguments,), words, command="demo-llm", description=demo_llm.__doc__)
    settings = LanguageSettings(seed=arguments.seed)
    run_language(
        arguments.output_dir,
        arguments.model_name_or_path,
        arguments.names() or METHODS,
        settings=replace(settings, steps=arguments.steps) if arguments.steps else settings,
        command=line,
    )


def families(words: Sequence[str], line: str) -> int:
    """Try families of models, and any model type of Transformers, with the libraries installed here."""
    from meft.parsing import parse
    from meft_lab.cli.families import FamiliesArguments, families_command

    (arguments,) = parse((FamiliesArguments,), words, command="families", description=families.__doc__)
    return families_command(arguments.model_type, as_markdown=arguments.markdown, output=arguments.output, command=line)
