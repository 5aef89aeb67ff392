from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from meft.errors import ConfigError, DataError
from meft_lab.tasks.docstrings import CHAPTERS, Docstrings, clean, collect, own_names


@pytest.fixture(scope="module")
def real() -> Docstrings:
    """The task that `meft demo` trains on here."""
    return collect()


def write_module(root: Path, file: str, texts: list[str]) -> None:
    """A library file that holds docstrings and cannot be imported."""
    functions = [f"def f{number}():\n    {text!r}\n" for number, text in enumerate(texts)]
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["raise SystemExit('imported')", *functions]), encoding="utf-8")


def make_texts(seed: str, number: int) -> list[str]:
    """Sentences of eight invented words each."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvw"
    return [" ".join("".join(generator.choices(letters, k=7)) for _ in range(8)) for _ in range(number)]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Two labels with 48 docstrings in six files each."""
    for file in ("threading", "queue", "asyncio/a", "asyncio/b", "asyncio/c", "asyncio/d"):
        write_module(tmp_path, f"{file}.py", make_texts(file, 8))
    for file in ("json/a", "json/b", "json/c", "csv", "shlex", "pprint"):
        write_module(tmp_path, f"{file}.py", make_texts(file, 8))
    return tmp_path


def small(root: Path) -> Docstrings:
    return collect(root, train_per_label=12, validation_per_label=6)


def test_every_label_is_equally_frequent_on_both_sides(real: Docstrings) -> None:
    for side, size in ((real.train, 100), (real.validation, 40)):
        assert Counter(example.label for example in side) == dict.fromkeys(range(len(real.labels)), size)
    assert len(real.labels) >= 5
    assert real.chance == 1 / len(real.labels)
    assert sorted([*real.labels, *real.left_out]) == sorted(CHAPTERS)


def test_no_file_and_no_text_is_on_both_sides(real: Docstrings) -> None:
    files = [{example.file for example in side} for side in (real.train, real.validation)]
    assert not files[0] & files[1]
    texts = Counter(re.sub(r"[^a-z]", "", example.text.lower()) for example in real.train + real.validation)
    assert texts.most_common(1)[0][1] == 1


def test_no_text_is_an_edited_text_of_the_other_side(real: Docstrings) -> None:
    held_out = [(example.label, set(example.text.lower().split())) for example in real.validation]
    for example in real.train:
        words = set(example.text.lower().split())
        assert all(
            len(words & other) <= 0.5 * len(words | other) for label, other in held_out if label == example.label
        ), example


def test_no_text_names_where_it_is_from(real: Docstrings) -> None:
    for example in real.train + real.validation:
        words = {word.strip("_") for word in re.findall(r"\w+", example.text.lower())}
        module = [part.strip("_").lower() for part in example.file.removesuffix(".py").split("/")]
        assert not words & (set(module) - {"init", "main"}), example
        assert not words & set(real.labels), example
        assert not re.search(r"\w\.\w", example.text), example


def test_no_single_file_stands_for_its_label(real: Docstrings) -> None:
    largest = Counter((example.label, example.file) for example in real.validation).most_common(1)[0][1]
    assert largest <= 14


def test_the_task_is_the_same_every_time(library: Path) -> None:
    # Another process has other hashes of strings, on which the order in a set depends.
    code = (
        "import sys; from meft_lab.tasks.docstrings import collect; "
        "print(collect(sys.argv[1], train_per_label=12, validation_per_label=6))"
    )
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    command = [sys.executable, "-c", code, str(library)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(small(library))
    assert small(library) == small(library)


def test_training_texts_come_mixed(real: Docstrings) -> None:
    assert len({example.label for example in real.train[:16]}) >= 4


def test_nothing_is_imported(library: Path) -> None:
    before = set(sys.modules)
    small(library)  # each of its files raises SystemExit when imported
    assert set(sys.modules) == before


def test_functions_methods_and_classes_are_read_and_modules_are_not(library: Path) -> None:
    source = (
        '"""Alpha module words stand here alone today."""\n'
        'class C:\n    """Bravo classes words stand here alone today."""\n'
        '    async def f(self):\n        """Charlie methods words stand here alone today."""\n'
    )
    (library / "calendar.py").write_text(source)
    assert small(library).left_out["numbers"] == 2


def test_a_label_with_too_few_docstrings_is_left_out_and_named(library: Path) -> None:
    write_module(library, "calendar.py", make_texts("calendar", 3))
    task = small(library)
    assert task.labels == ("concurrency", "text")
    assert task.left_out["numbers"] == 3
    assert task.left_out["graphics"] == 0


def test_short_docstrings_and_folders_of_tests_are_skipped(library: Path) -> None:
    write_module(library, "calendar.py", ["Two words.", "Only five words stand here."])
    write_module(library, "zoneinfo/test/cases.py", make_texts("cases", 30))
    assert small(library).left_out["numbers"] == 0


def test_a_text_that_stands_under_two_labels_is_dropped(library: Path) -> None:
    shared = make_texts("shared", 1)
    write_module(library, "signal.py", [*shared, *make_texts("signal", 1)])
    write_module(library, "textwrap.py", [f"{shared[0].upper()}!"])
    task = collect(library, train_per_label=24, validation_per_label=6)
    texts = {example.text.casefold().rstrip("!") for example in task.train + task.validation}
    assert shared[0] not in texts
    assert clean(make_texts("signal", 1)[0], "signal.py") in texts


def test_an_edited_copy_of_a_held_out_text_is_not_trained_on(library: Path) -> None:
    original = next(example for example in small(library).validation if example.file == "asyncio/b.py")
    twin = original.text.rsplit(" ", 1)[0] + " otherwise"
    write_module(library, "multiprocessing/pool.py", [*make_texts("pool", 11), twin])
    task = collect(library, train_per_label=24, validation_per_label=6)
    assert original in task.validation
    assert "multiprocessing/pool.py" in {example.file for example in task.train}
    assert twin not in {example.text for example in task.train}


@pytest.mark.parametrize(
    ("text", "file", "cleaned"),
    [
        ("Open a socket\n   as a SocketType.", "socket.py", "Open a as a ."),
        ("The http.client class and an HTTPClient.", "http/client.py", "The class and an ."),
        ("Use re to compile, there.", "re/__init__.py", "Use to compile, there."),
        ("A Decimal of __decimal__ numbers, or number.", "_pydecimal.py", "A of , or ."),
        ("Text in the context of files.", "queue.py", "in the context of ."),
        ("Calls os.path.join or str.", "queue.py", "Calls or str."),
    ],
)
def test_what_gives_the_origin_away_is_taken_out(text: str, file: str, cleaned: str) -> None:
    assert clean(text, file) == cleaned


def test_own_names() -> None:
    assert own_names("_pydecimal.py") == {"pydecimal", "decimal"}
    assert own_names("xml/etree/ElementTree.py") == {"xml", "etree", "elementtree"}
    assert own_names("asyncio/__init__.py") == {"asyncio"}
    assert own_names("pyclbr.py") == {"pyclbr"}


def test_a_library_without_sources(tmp_path: Path) -> None:
    (tmp_path / "os.pyc").touch()
    zipped = tmp_path / "python311.zip"
    with pytest.raises(DataError) as caught:
        collect(zipped)
    assert str(caught.value) == (
        f"no sources of the Python standard library at {zipped}: a folder with .py files is needed, and this Python "
        "seems to ship its library zipped or compiled. Run it under a Python that has the sources (python.org, conda, "
        "or your system's python3 package)."
    )
    with pytest.raises(DataError, match="zipped or compiled"):
        collect(tmp_path)


def test_a_library_with_too_few_docstrings(library: Path) -> None:
    with pytest.raises(
        DataError, match=r"give 0 label\(s\) with 100 \+ 40 docstrings, .*'concurrency': 48.*Ask for fewer"
    ):
        collect(library)


def test_a_file_that_is_no_python(library: Path) -> None:
    (library / "signal.py").write_text("def f(:\n")
    with pytest.raises(DataError, match=r"signal\.py is no Python source that this interpreter reads"):
        collect(library)


@pytest.mark.parametrize("sizes", [{"train_per_label": 0}, {"validation_per_label": -1}])
def test_sizes_below_one(library: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"at least 1 docstring of each label on each side, got .*the defaults are"):
        collect(library, **sizes)
