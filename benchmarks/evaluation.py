"""Puts what sweeps, studies and the other scripts found into research/evaluation.md and research/deploying.md.

    meft sweep glue-minilm --data_dir glue --use_cpu
    python benchmarks/evaluation.py --sweep runs/glue-minilm

copies the sweep's table beside the other results and fills the pages. Figures on those of
the users' site are copied to docs/figures. A page has `<!-- name -->` and
`<!-- end of name -->` around the place of `results/name.md`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from meft.errors import DataError
from meft.storage.files import write_text
from meft_lab.cli.sweep import TABLE_FILES

HERE = Path(__file__).resolve().parent
RESULTS, RESEARCH, DOCS = HERE / "results", HERE.parent / "research", HERE.parent / "docs"
PAGES = (RESEARCH / "evaluation.md", RESEARCH / "deploying.md", DOCS / "gamma.md")
_PLACE = re.compile(r"<!-- (?P<name>[\w/-]+) -->\n.*?<!-- end of (?P=name) -->", re.DOTALL)
_IMAGE = re.compile(r"\]\(([\w-]+\.svg)\)")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, help="the output folder of a sweep whose table is taken over")
    arguments = parser.parse_args(words)
    if arguments.sweep is not None:
        take_over(arguments.sweep, RESULTS)
    for path in PAGES:
        # The users' site is built of docs/ alone, so a figure on one of its pages lies there.
        write_text(path, fill(path.read_text(encoding="utf-8"), RESULTS, DOCS if path.parent == DOCS else None))


def take_over(folder: Path, results: Path) -> None:
    """Copies a sweep's table, in all its forms, to `results/<name of the folder>/`."""
    missing = [name for name in TABLE_FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} has no {', '.join(missing)}. Give the output folder of a sweep that has run.")
    place = results / folder.resolve().name
    place.mkdir(parents=True, exist_ok=True)
    for name in TABLE_FILES:
        write_text(place / name, (folder / name).read_text(encoding="utf-8"))


def fill(page: str, results: Path, site: Path | None = None) -> str:
    """Replaces what stands at each place of a page by the results of that name, their headings left out.

    Args:
        page: The page's text.
        results: Where the results are.
        site: The folder of a site that the page belongs to; the figures are copied to its `figures`.
    """

    def filled(place: re.Match[str]) -> str:
        name = place["name"]
        path = results / f"{name}.md"
        if not path.is_file():
            raise DataError(f"{path}, which the page has a place for, does not exist. Run what writes it first.")
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# ")]
        text = "\n".join(lines).strip()
        if site is None:
            text = _IMAGE.sub(rf"](../benchmarks/results/{path.parent.relative_to(results)}/\1)", text)
        else:
            (site / "figures").mkdir(exist_ok=True)
            for image in _IMAGE.findall(text):
                write_text(site / "figures" / image, (path.parent / image).read_text(encoding="utf-8"))
            text = _IMAGE.sub(r"](figures/\1)", text)
        return f"<!-- {name} -->\n{text}\n<!-- end of {name} -->"

    return _PLACE.sub(filled, page)


if __name__ == "__main__":
    main()
