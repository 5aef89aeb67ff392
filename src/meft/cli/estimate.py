"""`meft estimate`: what a training step will need, by method, from a configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from meft.errors import ConfigError, UnsupportedModelError
from meft.memory.estimation.estimate import estimate
from meft.memory.estimation.report import WEIGHTS, BudgetError, MemoryEstimate
from meft.memory.estimation.sizes import parse_size
from meft.memory.measurement.causes import CAUSES, GRADIENTS, OPTIMIZER_STATE
from meft.methods.arguments import OptionArguments
from meft.methods.registry import COMPARED, NAMED, own_options, read_way
from meft.parsing import option
from meft.storage.files import write_json
from meft.storage.outputs import check_output_file
from meft.storage.results import format_bytes, provenance

ALL = "all"
Failure = BudgetError | UnsupportedModelError
_ACTIVATIONS = tuple(cause for cause in CAUSES if cause not in (GRADIENTS, OPTIMIZER_STATE))
# Columns of a terminal from which on there is room for every cause.
_WIDE = 140


@dataclass
class EstimateArguments:
    """What is estimated."""

    _argument_group_name = "estimate"

    model: str = field(metadata={"help": "A name on the hub, a model's folder, or a config.json.", "positional": True})
    method: list[str] = field(
        default_factory=lambda: [ALL],
        metadata={"help": f"Ways to train: lora lora+momentum. Of {NAMED}. Left out: {ALL}, a choice of them."},
    )
    batch_size: int = option("Rows of a batch.", 1)
    seq_len: int = option("Tokens of a row.", 512)
    dtype: str = option("Of the weights.", "bfloat16")
    optimizer: str = option("adamw, sgd, adafactor, ..., none.", "adamw")
    task_type: str | None = option("The head. Left out: the model's own.")
    device: str | None = option("cpu or cuda. Left out: cuda if there is one.")
    attn_implementation: str | None = option("sdpa or eager.")
    padded: bool = option("Batches have padding.", False)
    autocast: str | None = option("Mixed precision to this dtype.")
    budget: str | None = option("24GiB, say: find the largest that fits.")
    longest: str | None = option(
        "With a budget, what to find: the largest batch, the longest sequence, or the fastest setting. Left out: the "
        "fastest setting of LoRA; the largest batch of each method that is named."
    )
    revision: str | None = option("Of the model on the hub.")
    trust_remote_code: bool = option("Run the model's own code.", False)
    json: str | None = option("Write everything that was found to this file.")

    def methods(self) -> list[str]:
        """The ways to train, however they are separated."""
        names = [name for words in self.method for name in words.replace(",", " ").split()]
        if names == [ALL] and self.budget is not None and self.finds == "setting":
            return ["lora"]
        return list(COMPARED) if names == [ALL] else names

    @property
    def finds(self) -> Any:
        """What is looked for in a budget."""
        return self.longest or ("setting" if self.method == [ALL] else "batch")


def estimate_command(arguments: EstimateArguments, method_options: OptionArguments, *, command: str) -> int:
    """Runs `meft estimate`, prints the table, and the lines of Python to copy.

    Args:
        arguments: as in `meft.estimate`.
        method_options: of several methods, each takes its own.
        command: the command line, for the record.

    Returns:
        0 if there is an estimate for any method that was asked for, and 2 if for none.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: what was given is not valid.
    """
    shared = asdict(arguments)
    names, options = arguments.methods(), method_options.given()
    model, budget, json = (shared.pop(name) for name in ("model", "budget", "json"))
    longest = arguments.finds
    del shared["method"], shared["longest"]
    if not names:
        raise ConfigError(
            f"method is {' '.join(arguments.method)!r}; give {ALL}, or one or more of {', '.join(COMPARED)}."
        )
    for name in names:
        read_way(name)
    if budget is not None:
        parse_size(budget)
    if json is not None:
        check_output_file("json", json)
    found: list[MemoryEstimate] = []
    failed: dict[str, Failure] = {}
    with _progress(names) as report:
        for name in names:
            try:
                advance = report(name)
                found.append(
                    estimate(
                        model,
                        method=name,
                        budget=budget,
                        longest=longest,
                        progress=advance,
                        **shared,
                        **_own(name, options, alone=len(names) == 1),
                    )
                )
            except (BudgetError, UnsupportedModelError) as error:
                if len(names) == 1:
                    raise
                failed[name] = error
    _show(Console(), found, failed, names, budget, longest)
    if json is not None:
        write_json(Path(json), _record(found, failed, command))
    return 0 if found else 2


def _show(
    console: Console,
    found: Sequence[MemoryEstimate],
    failed: Mapping[str, Failure],
    names: Sequence[str],
    budget: str | None,
    longest: str,
) -> None:
    if len(names) == 1:
        if budget is not None:
            console.print(_answer(found[0], budget, longest), highlight=False, soft_wrap=True)
        if found[0].tried:
            console.print(_settings(found[0]))
        console.print(found[0].table())
        console.print(found[0].code, highlight=False, markup=False, soft_wrap=True)
        return
    if found:
        console.print(_comparison(found, failed, names, budget, longest, split=console.width >= _WIDE))
        console.print("\nTo train so:", highlight=False)
        for report in found:
            console.print(f"\n# {report.method}\n{report.code}", highlight=False, markup=False, soft_wrap=True)
    for name, error in failed.items():
        if not isinstance(error, BudgetError):
            console.print(f"\n{name} is left out. {error}", highlight=False, markup=False, soft_wrap=True)
        elif not found:
            console.print(f"\n{error}", highlight=False, markup=False, soft_wrap=True)


def _answer(report: MemoryEstimate, budget: str, longest: str) -> str:
    if longest == "setting":
        best = next(each for each in reversed(report.tried) if each.fits)
        return f"In {budget}, {report.shape}: the fastest setting that fits is {best.name}."
    if longest == "batch":
        return f"In {budget}, {report.method} fits {report.shape}."
    more = "; the model has no more positions" if report.limited else ""
    return f"In {budget}, {report.method} fits {report.seq_len} tokens a row, in a batch of {report.batch_size}{more}."


def _settings(report: MemoryEstimate) -> Table:
    """What was tried, from the fastest on."""
    table = Table(title="Tried, the fastest first", title_justify="left")
    for heading in ("setting", "a whole step needs", "fits"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    plain = report.tried[0].method
    # With fewer cached layers more is run twice.
    for each in sorted(report.tried, key=lambda each: (each.method != plain, -each.options.get("cached_layers", 0))):
        table.add_row(each.name, format_bytes(each.total_bytes), "yes" if each.fits else "no")
    return table


def _comparison(
    found: Sequence[MemoryEstimate],
    failed: Mapping[str, Failure],
    names: Sequence[str],
    budget: str | None,
    longest: str,
    *,
    split: bool,
) -> Table:
    """One row a method; `split` gives every cause of activations a column, rather than all of them together."""
    first = found[0]
    size = first.shape if budget is None else f"in {budget}"
    note = f"Worst moment of a step on {first.device}; optimizer: its state and what it makes while it steps."
    table = Table(
        title=f"A training step of {first.model}: {first.task_type}, {first.dtype}, {size}, {first.optimizer}",
        caption=note + (" +: no more was looked for." if any(report.limited for report in found) else ""),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    if budget is not None:
        table.add_column("largest batch" if longest == "batch" else "longest sequence", justify="right")
    columns: list[tuple[str, tuple[str, ...]]] = [(each, (each,)) for each in (WEIGHTS, OPTIMIZER_STATE, GRADIENTS)]
    columns += [(cause, (cause,)) for cause in _ACTIVATIONS] if split else [("activations", _ACTIVATIONS)]
    columns = [(name, causes) for name, causes in columns if any(_sum(report, causes) for report in found)]
    for heading in ("sum", *(name for name, _ in columns)):
        table.add_column(heading, justify="right")
    reports = {report.method: report for report in found}
    for name in names:
        error = failed.get(name)
        if isinstance(error, BudgetError):
            table.add_row(name, "none", f"{format_bytes(error.needed)} at least")
        elif name in reports:
            report = reports[name]
            largest = report.batch_size if longest == "batch" else report.seq_len
            answer = [] if budget is None else [f"{largest}{'+' if report.limited else ''}"]
            sizes = [_sum(report, causes) for _, causes in columns]
            cells = [format_bytes(size) if size else "" for size in sizes]
            table.add_row(name, *answer, format_bytes(report.total_bytes), *cells)
    return table


def _sum(report: MemoryEstimate, causes: Sequence[str]) -> int:
    return sum(report.total_causes[cause] for cause in causes)


def _own(name: str, options: dict[str, Any], *, alone: bool) -> dict[str, Any]:
    """The options that mean something to a method: of several methods, each takes its own."""
    return options if alone else own_options(name, options)


@contextmanager
def _progress(names: Sequence[str]) -> Iterator[Callable[[str], Callable[[str], None]]]:
    """A bar over the methods that says what is being run; gone when all is done."""
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(names))

        def begin(name: str) -> Callable[[str], None]:
            progress.update(task, completed=names.index(name), description=name)
            return lambda description: progress.update(task, description=description)

        yield begin


def _record(found: Sequence[MemoryEstimate], failed: Mapping[str, Failure], command: str) -> dict[str, Any]:
    return {
        "kind": "meft estimate",
        **provenance(command),
        "estimates": [report.as_dict() for report in found],
        "left_out": {name: str(error) for name, error in failed.items()},
    }
