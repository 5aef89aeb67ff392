"""Reads images and the names of their classes from local files: a folder a class, or the archives of CIFAR and SVHN."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from meft.errors import DataError
from meft.training.data.base import require_file

from .pixels import Stored, encode

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_SIDE = 32  # pixels; CIFAR's and SVHN's images are square
_TEST_BATCH = 50


@dataclass(frozen=True)
class Labelled:
    """The images of a split.

    Attributes:
        images: As stored.
        names: The name of each one's class; `None` where the rows have no labels.
        classes: All classes that the source names, in its order.
    """

    images: list[Stored]
    names: list[str] | None
    classes: tuple[str, ...] = ()


def image_folder_splits(folder: Path) -> dict[str, Path]:
    """The folders of the splits that there are: `train`, `validation` (also `valid`, `val`, `dev`) and `test`."""
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        present = [name for name in names if (folder / name).is_dir()]
        if len(present) > 1:
            raise DataError(f"{folder} has {' and '.join(present)}, which both mean {split}. Keep one of them.")
        if present:
            found[split] = folder / present[0]
    return found


def class_names(folder: Path) -> tuple[str, ...]:
    """The folders in `folder`, each of which is a class."""
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def read_image_folder(folder: Path) -> Labelled:
    """The images of a split, by class and then by name.

    Raises:
        DataError: There are no images, images lie beside the folders of the classes, or a file is no image.
    """
    classes = class_names(folder)
    loose = _images(folder.iterdir())
    if loose and classes:
        raise DataError(
            f"{loose[0]} lies beside the folders of the classes ({some(classes)}), so its class is not known. Move it "
            "into one of them."
        )
    if not loose and not classes:
        raise DataError(f"{folder} has no images. Put them into it, one folder a class: {folder}/cat/1.png, say.")
    paths = loose or [path for name in classes for path in _class_images(folder / name)]
    for path in paths:
        _check_header(path)
    images: list[Stored] = [{"bytes": None, "path": str(path)} for path in paths]
    if loose:
        return Labelled(images, None)
    return Labelled(images, [path.relative_to(folder).parts[0] for path in paths], classes)


def has_png_batches(folder: Path) -> bool:
    """Whether `folder` has CIFAR-10 as PNG batches."""
    return any(folder.glob("*_batch_*.png")) or any(folder.glob("*_labels.js"))


def read_png_batches(folder: Path, split: str, names: Sequence[str]) -> Labelled:
    """CIFAR-10 in the layout of ConvNetJS: each row of pixels of a batch is one image, and batch 50 is the test set.

    The label of row j of batch i is `labels[1000 * i + j]` of the file of labels.
    """
    label_file = _only(folder, "*_labels.js", "the labels of the images")
    labels = _js_array(label_file)
    batches = {
        int(match[1]): path for path in folder.glob("*.png") if (match := re.search(r"_batch_(\d+)$", path.stem))
    }
    wanted = sorted(number for number in batches if (number == _TEST_BATCH) == (split == "test"))
    if not wanted:
        what = f"batch_{_TEST_BATCH}.png" if split == "test" else f"batch of images below {_TEST_BATCH}"
        raise DataError(f"{folder} has no {what}, the {split} rows; it has batches {some(map(str, sorted(batches)))}.")
    images: list[Stored] = []
    found: list[str] = []
    for number in wanted:
        rows = _pixel_rows(batches[number])
        start = number * len(rows)
        if start + len(rows) > len(labels):
            raise DataError(
                f"{label_file} has {len(labels)} labels; {batches[number].name} needs those from {start} to "
                f"{start + len(rows) - 1}. Get the file anew."
            )
        images += [{"bytes": encode(row), "path": None} for row in rows]
        found += [_name(label, names, label_file) for label in labels[start : start + len(rows)]]
    return Labelled(images, found, tuple(names))


def read_binary(files: Sequence[Path], names: Sequence[str], label_bytes: int = 1) -> Labelled:
    """The binary version of CIFAR: for each image its labels, a byte each, then its red, green and blue values.

    The last of the `label_bytes` is the label: CIFAR-100 has the superclass before it.
    """
    images: list[Stored] = []
    found: list[str] = []
    for file in files:
        size = label_bytes + 3 * _SIDE * _SIDE
        content = np.fromfile(require_file(file, "a batch of images"), np.uint8)
        if len(content) % size:
            raise DataError(f"{file} has {len(content)} bytes, no multiple of the {size} of an image. Get it anew.")
        rows = content.reshape(-1, size)
        pixels = rows[:, label_bytes:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
        images += [{"bytes": encode(image), "path": None} for image in pixels]
        found += [_name(int(label), names, file) for label in rows[:, label_bytes - 1]]
    return Labelled(images, found, tuple(names))


def read_matlab(file: Path, names: Sequence[str]) -> Labelled:
    """SVHN's cropped digits, `X` of shape (32, 32, 3, images) and `y`, where the digit 0 has the label 10."""
    require_file(file, "the images")
    try:
        content = loadmat(file, variable_names=["X", "y"])
        pixels, labels = content["X"].transpose(3, 0, 1, 2), content["y"].reshape(-1)
    except (ValueError, KeyError, OSError, NotImplementedError, MatReadError, zlib.error) as error:
        raise DataError(f"{file} is no file of SVHN with the variables X and y: {error}. Get it anew.") from error
    images: list[Stored] = [{"bytes": encode(np.ascontiguousarray(image)), "path": None} for image in pixels]
    return Labelled(images, [_name(int(label) % 10, names, file) for label in labels], tuple(names))


def _class_images(folder: Path) -> list[Path]:
    found = _images(folder.rglob("*"))
    if not found:
        raise DataError(
            f"{folder}, a class by its place, has no images ({', '.join(SUFFIXES)}). Put some into it or remove it."
        )
    return found


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        path for path in paths if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _check_header(path: Path) -> None:
    """Looks at the first bytes only: to decode every image would take long, and each is decoded when it is its turn."""
    try:
        with Image.open(path):
            pass
    except (OSError, SyntaxError, ValueError) as error:
        reason = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"The image {path} cannot be read: {reason}. Replace or remove it.") from error


def _pixel_rows(path: Path) -> np.ndarray:
    """Pixels of shape (images, 32, 32, 3) from a batch with one image a row."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"The image {path} cannot be read: {error}. Get it anew.") from error
    if pixels.shape[1] != _SIDE * _SIDE:
        raise DataError(
            f"{path} is {pixels.shape[1]} pixels wide; an image a row takes {_SIDE * _SIDE} ({_SIDE} x {_SIDE}). Is "
            "this a batch of images?"
        )
    return pixels.reshape(-1, _SIDE, _SIDE, 3)


def _js_array(path: Path) -> list[Any]:
    """The list in `var labels=[6, 9, ...];`."""
    text = require_file(path, "the labels of the images").read_text(encoding="utf-8", errors="replace")
    try:
        return list(json.loads(text[text.index("[") : text.rindex("]") + 1]))
    except ValueError as error:
        raise DataError(
            f"{path} holds no list of labels such as 'var labels=[6, 9];': {error}. Get it anew."
        ) from error


def _name(label: Any, names: Sequence[str], source: Path) -> str:
    if isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    raise DataError(f"{source} has the label {label!r}; labels are the numbers 0 to {len(names) - 1}. Get it anew.")


def _only(folder: Path, pattern: str, purpose: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{folder} has {some(path.name for path in found)}, each of which may be {purpose}. Keep one.")
    return require_file(folder / pattern.replace("*", "cifar10"), purpose)


def some(names: Iterable[str], most: int = 12) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more if listed else "none"
