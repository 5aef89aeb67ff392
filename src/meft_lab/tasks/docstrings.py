"""A text classification task out of the user's own Python: which part of the library is a docstring from?

    >>> task = collect()
    >>> task.labels
    ('concurrency', 'files', 'graphics', 'language', 'networking', 'numbers', 'text')
    >>> task.train[0].file, task.train[0].text, task.labels[task.train[0].label]
    ('asyncio/events.py', 'Cancel the callback.', 'concurrency')

Nothing is downloaded and nothing is imported: the sources of the standard library are parsed. The labels follow
the chapters of the Python Library Reference. Three things keep the score honest. Whole files go to one side of
the split, so a model cannot recognise a module it has seen; the names that would give the answer away (the
module's own, dotted names, the words of the labels) are taken out of the text; and every label has the same number
of examples, so chance is one over the number of labels. Which examples are chosen, and for which side, is decided by
hashes of file names and texts alone: the same Python gives the same task, on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import math
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from meft.errors import ConfigError, DataError

# Top-level modules and packages by label. A name that a Python version lacks is skipped, and so is a whole label
# with too few docstrings (Debian, for one, ships tkinter apart); `Docstrings.left_out` then names it.
CHAPTERS: dict[str, str] = {
    "concurrency": "asyncio asyncore concurrent contextvars multiprocessing queue sched selectors "
    "signal subprocess threading",
    "files": "_pyio bz2 dbm filecmp fileinput fnmatch genericpath glob gzip io linecache lzma ntpath nturl2path os "
    "pathlib posixpath shelve shutil sqlite3 stat tarfile tempfile zipapp zipfile",
    "graphics": "colorsys curses tkinter turtle",
    "language": "__future__ abc ast code codeop compileall copyreg dis enum functools imp importlib inspect keyword "
    "modulefinder opcode operator pkgutil py_compile pyclbr runpy symtable tabnanny token tokenize types typing "
    "weakref zipimport",
    "networking": "asynchat cgi email ftplib http imaplib ipaddress mailbox mimetypes nntplib poplib smtpd smtplib "
    "socket socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc",
    "numbers": "_pydatetime _pydecimal _strptime bisect calendar datetime decimal fractions heapq numbers random "
    "statistics zoneinfo",
    "text": "_markupbase base64 codecs configparser csv difflib encodings gettext html json locale optparse "
    "argparse plistlib pprint quopri re reprlib shlex string stringprep textwrap tomllib xml",
}
_LABEL_WORDS = {form for label in CHAPTERS for form in (label, label.removesuffix("s"))}
MIN_WORDS = 6  # a shorter docstring ("Return the value.") does not say where it is from
MAX_FILE_SHARE = 1 / 3  # of the validation examples of a label: no single file may stand for its label
TWIN_SHARE = 0.5  # of all words of two texts that are in both: above it they are the same text, slightly edited
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOTTED_NAME = re.compile(r"\w+(?:\.\w+)+")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Example:
    """One docstring: its cleaned `text`, the index of its `label`, and the `file` it is from, within the library."""

    text: str
    label: int
    file: str


@dataclass(frozen=True)
class Docstrings:
    """A balanced, split dataset.

    Attributes:
        labels: Names of the labels; `Example.label` indexes them.
        train, validation: Examples, each label equally often on each side, no file on both sides.
        left_out: Labels that this Python has too few docstrings for, with the number of them found.
    """

    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    left_out: dict[str, int]

    @property
    def chance(self) -> float:
        """Accuracy of always giving the same answer (every label is equally frequent)."""
        return 1 / len(self.labels)


def collect(
    root: str | Path | None = None, *, train_per_label: int = 100, validation_per_label: int = 40
) -> Docstrings:
    """Build the task from the sources of the standard library.

    Args:
        root: Folder of the library's sources; by default that of the running interpreter.
        train_per_label: Number of docstrings of each label to train on.
        validation_per_label: The same to be scored on.

    Returns:
        The task; training examples come in a fixed, mixed order.

    Raises:
        ConfigError: A number of docstrings below 1.
        DataError: There are no sources at `root` (some distributions ship only a zip or compiled files), or so few
            that fewer than two labels are left.
    """
    if train_per_label < 1 or validation_per_label < 1:
        raise ConfigError(
            f"a task needs at least 1 docstring of each label on each side, got train_per_label={train_per_label} and "
            f"validation_per_label={validation_per_label}; the defaults are 100 and 40."
        )
    folder = _sources(root)
    files_by_label = {label: _docstrings_by_file(folder, names.split()) for label, names in CHAPTERS.items()}
    _drop_duplicates(files_by_label)
    sides, left_out = {}, {}
    for label, files in files_by_label.items():
        side = _split(files, validation_per_label, train_per_label)
        if side is None:
            left_out[label] = sum(len(texts) for texts in files.values())
        else:
            sides[label] = side
    if len(sides) < 2:
        raise DataError(
            f"the Python sources at {folder} give {len(sides)} label(s) with {train_per_label} + "
            f"{validation_per_label} docstrings, and a task needs at least 2 (too few: {left_out}). Ask for fewer "
            "docstrings of each label, or use a Python that ships its complete standard library as .py files."
        )
    labels = tuple(sorted(sides))
    train = [Example(text, labels.index(label), file) for label in labels for file, text in sides[label][1]]
    validation = [Example(text, labels.index(label), file) for label in labels for file, text in sides[label][0]]
    train.sort(key=lambda example: _hash(example.text))
    return Docstrings(labels, tuple(train), tuple(validation), left_out)


def clean(text: str, file: str) -> str:
    """Take out of a docstring what would give its origin away, and all white space but single blanks.

        >>> clean("Open a socket as socket.socket() does, see socketpair.", "socket.py")
        'Open a as () does, see .'

    Removed are dotted names, the labels themselves (also in the singular), and every word that contains the name of
    the module or of a package it is in (names of up to three letters only where they are the whole word).
    """
    names = own_names(file)
    without_paths = _DOTTED_NAME.sub(" ", text)

    def keep(match: re.Match[str]) -> str:
        word = match.group().casefold().strip("_")
        gives_away = word in _LABEL_WORDS or any(name in word if len(name) > 3 else name == word for name in names)
        return "" if gives_away else match.group()

    return " ".join(_WORD.sub(keep, without_paths).split())


def own_names(file: str) -> set[str]:
    """Names that a file goes by: `_pydecimal.py` is `decimal` to its users, `http/client.py` is `http` and `client`."""
    parts = [part.strip("_") for part in PurePosixPath(file).with_suffix("").parts]
    names = {part.casefold() for part in parts if part not in ("init", "main")}
    return names | {name[2:] for name in names if name.startswith("py") and f"_{name}" in file.casefold()}


def _sources(root: str | Path | None) -> Path:
    folder = Path(root) if root is not None else Path(sysconfig.get_path("stdlib"))
    if not any(folder.glob("*.py")):
        raise DataError(
            f"no sources of the Python standard library at {folder}: a folder with .py files is needed, and this "
            "Python seems to ship its library zipped or compiled. Run it under a Python that has the sources "
            "(python.org, conda, or your system's python3 package)."
        )
    return folder


def _docstrings_by_file(folder: Path, modules: list[str]) -> dict[str, list[str]]:
    """Cleaned docstrings of the modules' files, in the files' own order, keyed by path relative to `folder`."""
    found = {}
    for module in modules:
        candidates = [folder / f"{module}.py", *sorted((folder / module).rglob("*.py"))]
        for path in candidates:
            relative = path.relative_to(folder)
            if path.is_file() and not _SKIPPED_FOLDERS & set(relative.parts):
                name = relative.as_posix()
                texts = [clean(text, name) for text in _raw_docstrings(path)]
                found[name] = [text for text in texts if len(re.findall(r"[A-Za-z]{2,}", text)) >= MIN_WORDS]
    return found


def _raw_docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old library files hold invalid escapes, which is not the user's concern
        try:
            tree = ast.parse(path.read_bytes(), filename=str(path))
        except (SyntaxError, ValueError) as error:
            raise DataError(
                f"{path} is no Python source that this interpreter reads ({error}): the library must be that of the "
                "running Python version. Leave `root` unset to use it, or repair the file."
            ) from error
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _drop_duplicates(files_by_label: dict[str, dict[str, list[str]]]) -> None:
    """Keep a text once; a text that stands under two labels has no right answer and is dropped from both."""
    labels_of: dict[str, set[str]] = {}
    for label, files in files_by_label.items():
        for texts in files.values():
            for text in texts:
                labels_of.setdefault(_key(text), set()).add(label)
    seen: set[str] = set()
    for files in files_by_label.values():
        for file, texts in files.items():
            kept = []
            for text in texts:
                if len(labels_of[_key(text)]) == 1 and _key(text) not in seen:
                    seen.add(_key(text))
                    kept.append(text)
            files[file] = kept


def _split(
    files: dict[str, list[str]], validation_size: int, train_size: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]] | None:
    """Choose (file, text) pairs for validation and training, whole files to one side; None if there are too few.

    The shortest files are taken for validation until they suffice: many files, so that the score does not hang on the
    luck of one. Training has the others.
    """
    pairs = {file: [(file, text) for text in sorted(files[file], key=_hash)] for file in files if files[file]}
    order = sorted(pairs, key=lambda file: (len(pairs[file]), _hash(file)))
    most = max(1, math.ceil(MAX_FILE_SHARE * validation_size))
    available = list(itertools.accumulate(min(most, len(pairs[file])) for file in order))
    needed = 1 + sum(total < validation_size for total in available)
    validation = _spread([pairs[file][:most] for file in order[:needed]], validation_size)
    held_out = [_words(text) for _, text in validation]
    train = _spread(
        [[pair for pair in pairs[file] if not _resembles(pair[1], held_out)] for file in order[needed:]], train_size
    )
    enough = len(validation) == validation_size and len(train) == train_size
    return (validation, train) if enough else None


def _spread(groups: list[list[tuple[str, str]]], size: int) -> list[tuple[str, str]]:
    """The first `size` items, one from each group in turn, so that as many files as possible are represented."""
    rounds = itertools.zip_longest(*groups)
    return [item for items in rounds for item in items if item is not None][:size]


def _resembles(text: str, others: list[set[str]]) -> bool:
    """Whether a text shares most of its words with one of the others, as those of ntpath and posixpath do."""
    words = _words(text)
    return any(len(words & other) > TWIN_SHARE * len(words | other) for other in others)


def _words(text: str) -> set[str]:
    return set(text.casefold().split())


def _key(text: str) -> str:
    return "".join(re.findall(r"[a-z]+", text.casefold()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
