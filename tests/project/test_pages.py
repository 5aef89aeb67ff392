"""Pages lead somewhere, and name everything that is public."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import meft

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "research").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(#[\w-]+)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_reference_lists_what_is_public() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = {line.split(".")[-1] for line in page.splitlines() if line.startswith("::: ")}
    public = {name for name in meft.__all__ if not name.startswith("_")} - {"MeftError"}
    assert listed == public


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
