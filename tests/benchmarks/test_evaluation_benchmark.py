from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from meft.errors import DataError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evaluation.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluation_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_place_is_filled_with_the_results_of_its_name(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "depth.md").write_text("# Depth\n\n| a |\n\n![Depth](depth.svg)\n")
    page = "before\n<!-- studies/depth -->\nold\n<!-- end of studies/depth -->\nafter\n"
    filled = script.fill(page, tmp_path)
    assert filled == (
        "before\n<!-- studies/depth -->\n| a |\n\n![Depth](../benchmarks/results/studies/depth.svg)\n"
        "<!-- end of studies/depth -->\nafter\n"
    )
    assert script.fill(filled, tmp_path) == filled


def test_missing_results_are_named(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.md, which the page has a place for, does not exist"):
        script.fill("<!-- none -->\n<!-- end of none -->", tmp_path)
    with pytest.raises(DataError, match=r"has no table\.json, .*Give the output folder of a sweep"):
        script.take_over(tmp_path, tmp_path)


def test_the_pages_say_what_the_results_say(script: ModuleType, tmp_path: Path) -> None:
    for path in script.PAGES:
        page = path.read_text(encoding="utf-8")
        of_the_site = path.parent == script.DOCS
        assert script.fill(page, script.RESULTS, tmp_path if of_the_site else None) == page
        assert "<!-- end of " in page
    for copy in (tmp_path / "figures").iterdir():
        assert (script.DOCS / "figures" / copy.name).read_text() == copy.read_text()


def test_figures_of_the_users_site_lie_within_it(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "gamma.md").write_text("| a |\n\n![Gamma](gamma.svg)\n")
    (tmp_path / "gamma.svg").write_text("<svg/>")
    site = tmp_path / "docs"
    site.mkdir()
    filled = script.fill("<!-- gamma -->\n<!-- end of gamma -->", tmp_path, site)
    assert filled == "<!-- gamma -->\n| a |\n\n![Gamma](figures/gamma.svg)\n<!-- end of gamma -->"
    assert (site / "figures" / "gamma.svg").read_text() == "<svg/>"
