from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from meft.errors import ConfigError, DataError
from meft_lab.tasks import IMAGE_TASKS, load_images
from meft_lab.tasks.pixels import decode, encode
from support.pictures import make_batches, make_folder, pixels, save

PETS = {"train": {"cat": 3, "dog": 4}, "validation": {"dog": 2, "cat": 1}}


def labels_of(rows: datasets.Dataset) -> list[int]:
    return list(rows["label"])


def images_of(rows: datasets.Dataset) -> list[np.ndarray]:
    return [np.asarray(decode(stored)) for stored in rows["image"]]


# -- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_a_class(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets", PETS)
    data = load_images("imagefolder", folder)
    assert (data.spec.name, data.spec.labels, data.spec.metrics) == ("imagefolder", ("cat", "dog"), ("accuracy",))
    assert (labels_of(data.splits["train"]), labels_of(data.splits["validation"])) == ([0] * 3 + [1] * 4, [0, 1, 1])
    assert data.splits["train"][3] == {
        "image": {"bytes": None, "path": str(folder / "train" / "dog" / "0.png")},
        "label": 1,
        "row": 3,
        "mirror": True,
    }
    assert data.splits["validation"].column_names == ["image", "label"] and data.notes == ()


def test_images_lie_deeper_hidden_files_and_other_files_do_not_count(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets", PETS)
    save(folder / "train" / "cat" / "kittens" / "9.JPG", pixels(7))
    (folder / "train" / "cat" / ".hidden.png").write_text("not an image")
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    (folder / "train" / ".cache").mkdir()
    data = load_images("imagefolder", folder)
    assert data.spec.labels == ("cat", "dog") and labels_of(data.splits["train"]) == [0] * 4 + [1] * 4


@pytest.mark.parametrize("name", ["val", "valid", "dev"])
def test_other_names_of_the_validation_folder(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"train": {"cat": 1, "dog": 1}, name: {"cat": 2, "dog": 1}})
    assert len(load_images("imagefolder", folder).splits["validation"]) == 3
    (folder / "validation").mkdir()
    with pytest.raises(DataError) as caught:
        load_images("imagefolder", folder)
    assert str(caught.value) == f"{folder} has validation and {name}, which both mean validation. Keep one of them."


def test_without_validation_rows_the_test_rows_stand_in_and_it_is_said(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"train": {"cat": 1, "dog": 1}, "test": {"cat": 2, "dog": 1}})
    data = load_images("imagefolder", folder)
    assert labels_of(data.splits["validation"]) == [0, 0, 1]
    assert data.notes == (
        "imagefolder has no validation rows here, so its test rows stand in for them. --validation_share 0.1 holds out "
        "a tenth of the training rows instead.",
    )


def test_the_held_out_rows_are_a_share_of_every_class_and_always_the_same(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"train": {"cat": 10, "dog": 20, "emu": 2}, "test": {"cat": 1}})
    data, again = (load_images("imagefolder", folder, validation_share=0.3) for _ in range(2))
    train, held = data.splits["train"], data.splits["validation"]
    assert np.bincount(labels_of(train)).tolist() == [7, 14, 1] and np.bincount(labels_of(held)).tolist() == [3, 6, 1]
    paths = [[image["path"] for image in rows["image"]] for rows in (train, held)]
    assert not set(paths[0]) & set(paths[1]) and len(set(paths[0] + paths[1])) == 32
    assert [image["path"] for image in again.splits["validation"]["image"]] == paths[1]
    alone = load_images("imagefolder", folder, ("validation",), validation_share=0.3)
    assert [image["path"] for image in alone.splits["validation"]["image"]] == paths[1] and data.notes == ()
    # A row keeps its number, whatever is held out.
    assert len(set(train["row"])) == 22 and max(train["row"]) > 21
    assert labels_of(load_images("imagefolder", folder, ("test",), validation_share=0.3).splits["test"]) == [0]


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (1.0, "validation_share is 1.0; it must lie between 0 and 1, 0.1 say."),
        (0.0, "validation_share is 0.0; it must lie between 0 and 1, 0.1 say."),
        (0.1, "validation_share is 0.1, but {folder} has validation rows. Leave --validation_share out."),
    ],
)
def test_a_share_that_is_not_valid(share: float, message: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, PETS)
    with pytest.raises(ConfigError) as caught:
        load_images("imagefolder", folder, validation_share=share)
    assert str(caught.value) == message.format(folder=folder)


def test_a_share_that_leaves_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"train": {"cat": 1, "dog": 5}})
    with pytest.raises(DataError) as caught:
        load_images("imagefolder", folder, validation_share=0.2)
    assert str(caught.value) == (
        "A class has 1 training rows, of which validation_share 0.2 leaves none to train on. Give a smaller share or "
        "more rows."
    )


def test_a_class_that_training_lacks(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"train": {"cat": 1, "dog": 1}, "validation": {"cat": 1, "zebra": 1}})
    message = (
        f"The validation rows of {folder} have the class 'zebra', which the training rows lack; they have cat, dog. "
        "Add images of it to them, remove it, or name the classes to take with --labels."
    )
    for splits in (("train", "validation"), ("validation",)):
        with pytest.raises(DataError) as caught:
            load_images("imagefolder", folder, splits)
        assert str(caught.value) == message
    data = load_images("imagefolder", folder, labels=("cat", "dog"))
    assert data.notes == ("1 of 2 validation rows are of other classes than cat, dog and are left out.",)


def test_rows_without_labels(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"train": {"cat": 1, "dog": 1}})
    for split in ("validation", "test"):
        save(folder / split / "1.png", pixels(1))
    with pytest.raises(DataError) as caught:
        load_images("imagefolder", folder)
    assert str(caught.value) == (
        f"The validation rows of {folder} have no labels. Put the images of each class into a folder of its own: "
        f"{folder}/validation/cat/1.png, say."
    )
    rows = load_images("imagefolder", folder, ("test",)).splits["test"]
    assert rows.column_names == ["image"] and len(rows) == 1


def test_an_image_beside_the_folders_of_the_classes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, PETS)
    loose = save(folder / "train" / "1.png", pixels(1))
    with pytest.raises(DataError) as caught:
        load_images("imagefolder", folder)
    assert str(caught.value) == (
        f"{loose} lies beside the folders of the classes (cat, dog), so its class is not known. Move it into one of "
        "them."
    )


def test_folders_that_are_not_there_or_empty(tmp_path: Path) -> None:
    def message(folder: Path | None) -> str:
        with pytest.raises((DataError, ConfigError)) as caught:
            load_images("imagefolder", folder)
        return str(caught.value)

    assert message(None) == "task is 'imagefolder' without --data_dir; give the folder that has train and validation."
    nowhere, empty, no_class = tmp_path / "nowhere", tmp_path / "empty", tmp_path / "no_class"
    assert message(nowhere) == (
        f"data_dir is {str(nowhere)!r}, which does not exist. Give the folder that holds the images."
    )
    (empty / "other").mkdir(parents=True)
    assert message(empty) == (
        f"{empty} has no folder train, validation or test; it contains other. Put the images of each class into a "
        f"folder of its own: {empty}/train/cat/1.png, say."
    )
    (empty / "train").mkdir()
    assert message(empty) == (
        f"{empty} has no validation rows; it has train. Add the folder validation with one folder a class. Or hold out "
        "training rows with --validation_share 0.1."
    )
    (empty / "validation").mkdir()
    assert message(empty) == (
        f"{empty}/train has no images. Put them into it, one folder a class: {empty}/train/cat/1.png, say."
    )
    make_folder(no_class, {**PETS, "train": {"cat": 1}})
    (no_class / "train" / "dog").mkdir()
    assert message(no_class).startswith(f"{no_class}/train/dog, a class by its place, has no images (.bmp, .gif, ")
    (no_class / "train" / "dog").rmdir()
    for image in (no_class / "validation" / "dog").iterdir():
        image.unlink()
    (no_class / "validation" / "dog").rmdir()
    assert message(no_class) == (
        f"{no_class} has cat as its only class; there is nothing to learn. Add images of another."
    )


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, PETS)
    broken = folder / "validation" / "cat" / "9.png"
    broken.write_text("not an image")
    with pytest.raises(DataError) as caught:
        load_images("imagefolder", folder)
    assert str(caught.value) == (
        f"The image {broken} cannot be read: it is no image that Pillow knows. Replace or remove it."
    )
    broken.write_bytes(b"")
    with pytest.raises(DataError, match="it is no image that Pillow knows"):
        load_images("imagefolder", folder)


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_images("mnist", tmp_path)
    assert str(caught.value) == "task is 'mnist'; the image tasks are imagefolder, cifar10, cifar100, svhn."


# -- which classes, in which order -----------------------------------------------------------------------------------


def test_some_classes_in_the_order_given(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"train": {"cat": 1, "dog": 2, "emu": 3}, "validation": {"cat": 1, "dog": 1}})
    data = load_images("imagefolder", folder, labels=("emu", "cat"))
    assert data.spec.labels == ("emu", "cat") and labels_of(data.splits["train"]) == [1, 0, 0, 0]
    assert data.notes == (
        "2 of 6 train rows are of other classes than emu, cat and are left out.",
        "1 of 2 validation rows are of other classes than emu, cat and are left out.",
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dig"], "labels has 'dig', which is no class of these images: cat, dog, emu. Did you mean 'dog'?"),
        (["cat", "cat"], "labels is cat, cat; give at least two classes, all different from one another."),
        (["cat"], "labels is cat; give at least two classes, all different from one another."),
    ],
)
def test_classes_that_are_not_valid(labels: list[str], message: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"train": {"cat": 1, "dog": 2, "emu": 3}, "validation": {"cat": 1, "dog": 1}})
    with pytest.raises(ConfigError) as caught:
        load_images("imagefolder", folder, labels=labels)
    assert str(caught.value) == message


def test_classes_without_a_row(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"train": {"cat": 1, "dog": 2, "emu": 3}, "validation": {"cat": 1}})
    with pytest.raises(DataError) as caught:
        load_images("imagefolder", folder, labels=("dog", "emu"))
    assert str(caught.value) == (
        f"{folder} has no validation rows of the classes dog, emu. Choose others with --labels."
    )


def test_a_model_that_has_learnt_another_order_keeps_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, PETS)
    assert load_images("imagefolder", folder, outputs=("Dog", "cat")).spec.labels == ("dog", "cat")
    assert load_images("imagefolder", folder, outputs=("dog", "emu")).spec.labels == ("cat", "dog")
    assert load_images("imagefolder", folder, outputs=("LABEL_0", "LABEL_1")).spec.labels == ("cat", "dog")


def test_a_trained_model_keeps_its_classes_whatever_the_rows_have(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"test": {"bat": 2, "dog": 1}})
    data = load_images("imagefolder", folder, ("test",), trained=("emu", "dog", "cat"))
    assert data.spec.labels == ("emu", "dog", "cat") and labels_of(data.splits["test"]) == [1]
    assert data.notes == ("2 of 3 test rows are of other classes than emu, dog, cat and are left out.",)


# -- archives --------------------------------------------------------------------------------------------------------


def test_cifar10_as_png_batches(tmp_path: Path) -> None:
    folder = make_batches(tmp_path, {0: 4, 3: 9, 50: 0})
    data = load_images("cifar10", folder, ("train", "test"))
    assert data.spec.labels[:2] == ("airplane", "automobile") and len(data.spec.labels) == 10
    assert labels_of(data.splits["train"]) == [4, 5, 6, 9, 0, 1] and labels_of(data.splits["test"]) == [0, 1, 2]
    expected = [pixels(seed, 32) for seed in (0, 1, 2, 300, 301, 302)]
    assert all(np.array_equal(*pair) for pair in zip(images_of(data.splits["train"]), expected, strict=True))
    assert data.notes == ()


def test_png_batches_that_are_not_whole(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(DataError) as caught:
            load_images("cifar10", tmp_path, ("train", "test"))
        return str(caught.value)

    make_batches(tmp_path, {0: 4})
    assert message() == f"{tmp_path} has no batch_50.png, the test rows; it has batches 0."
    labels = tmp_path / "cifar10_labels.js"
    labels.write_text("var labels=[1, 2];")
    assert message() == (f"{labels} has 2 labels; cifar10_batch_0.png needs those from 0 to 2. Get the file anew.")
    labels.write_text("var labels=[1, 2, 10];")
    assert message() == f"{labels} has the label 10; labels are the numbers 0 to 9. Get it anew."
    labels.write_text("nothing")
    assert message().startswith(f"{labels} holds no list of labels such as 'var labels=[6, 9];': ")
    labels.unlink()
    assert message().startswith(f"{labels}, the labels of the images, does not exist; {tmp_path} contains cifar10_ba")
    make_batches(tmp_path, {0: 4})
    save(tmp_path / "cifar10_batch_0.png", pixels(0, 40))
    assert message() == (
        f"{tmp_path}/cifar10_batch_0.png is 40 pixels wide; an image a row takes 1024 (32 x 32). Is this a batch of "
        "images?"
    )


def binary(labels: list[list[int]]) -> bytes:
    """Rows of labels and pixels, which `pixels(row, 32)` draws."""
    return b"".join(bytes(row) + pixels(place, 32).transpose(2, 0, 1).tobytes() for place, row in enumerate(labels))


def test_cifar10_in_its_binary_version(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(binary([[number], [9]]))
    (folder / "test_batch.bin").write_bytes(binary([[7]]))
    for given in (tmp_path, folder):
        data = load_images("cifar10", given, ("train", "test"))
        assert labels_of(data.splits["train"]) == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]
        assert labels_of(data.splits["test"]) == [7]
        assert np.array_equal(images_of(data.splits["train"])[1], pixels(1, 32))
    (folder / "test_batch.bin").write_bytes(binary([[7]])[:-1])
    with pytest.raises(DataError) as caught:
        load_images("cifar10", folder, ("test",))
    assert str(caught.value) == (
        f"{folder}/test_batch.bin has 3072 bytes, no multiple of the 3073 of an image. Get it anew."
    )


def test_cifar100_has_a_superclass_before_the_class(tmp_path: Path) -> None:
    (tmp_path / "fine_label_names.txt").write_text("apple\naquarium_fish\nbaby\n")
    (tmp_path / "train.bin").write_bytes(binary([[2, 0], [0, 2]]))
    (tmp_path / "test.bin").write_bytes(binary([[2, 1]]))
    data = load_images("cifar100", tmp_path, ("train", "test"))
    assert data.spec.labels == ("apple", "aquarium_fish", "baby")
    assert labels_of(data.splits["train"]) == [0, 2] and labels_of(data.splits["test"]) == [1]
    assert np.array_equal(images_of(data.splits["train"])[1], pixels(1, 32))


def test_the_python_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError) as caught:
        load_images("cifar10", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds the Python version of the archive, pickles that can run any code when they are read. Give "
        "the binary version instead, the folder cifar-10-batches-bin."
    )


def test_svhn(tmp_path: Path) -> None:
    for split, labels in (("train", [10, 3]), ("test", [1])):
        content = np.stack([pixels(place, 32) for place in range(len(labels))], axis=-1)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": content, "y": np.array(labels)[:, None]})
    data = load_images("svhn", tmp_path, ("train", "test"))
    assert data.spec.labels == tuple("0123456789")
    assert labels_of(data.splits["train"]) == [0, 3] and labels_of(data.splits["test"]) == [1]
    assert np.array_equal(images_of(data.splits["train"])[1], pixels(1, 32))
    assert data.splits["train"]["mirror"][0] is False  # a mirrored digit is no digit
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB no more")
    with pytest.raises(
        DataError, match="is no file of SVHN with the variables X and y: Mat file appears to be truncated"
    ):
        load_images("svhn", tmp_path, ("test",))


def test_other_tasks_take_folders_too(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"train": {"1": 2, "2": 1}, "test": {"1": 1, "2": 1}})
    data = load_images("svhn", folder, ("train", "test"))
    assert data.spec.labels == ("1", "2") and data.splits["train"]["mirror"][0] is False


# -- the hub ---------------------------------------------------------------------------------------------------------


def on_the_hub(split: str) -> datasets.Dataset:
    """Three rows of CIFAR-10 as the hub has them."""
    labels = [9, 0, 1] if split == "train" else [2, 2, 0]
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(IMAGE_TASKS["cifar10"].labels))}
    columns = {"img": [{"bytes": encode(pixels(row, 32)), "path": None} for row in range(3)], "label": labels}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*names: Any, split: str, cache_dir: str | None) -> datasets.Dataset:
        asked.append((*names, split, cache_dir))
        return on_the_hub(split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_images("cifar10", None, cache_dir="cache", labels=("truck", "airplane", "bird"))
    assert asked == [("uoft-cs/cifar10", None, "train", "cache"), ("uoft-cs/cifar10", None, "test", "cache")]
    assert labels_of(data.splits["train"]) == [0, 1] and labels_of(data.splits["validation"]) == [2, 2, 1]
    assert np.array_equal(images_of(data.splits["train"])[1], pixels(1, 32))
    with pytest.raises(DataError) as caught:
        load_images("svhn", None)
    assert str(caught.value) == "ufldl-stanford/svhn has no column 'image'; its columns are img, label."


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        load_images("cifar100", None)
    assert str(caught.value) == (
        "uoft-cs/cifar100 (train) could not be had from the hub: no route Without a network give local files with "
        "--data_dir."
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_image_becomes_three_colours(mode: str, tmp_path: Path) -> None:
    image = Image.new(mode, (5, 3), 0)
    image.save(tmp_path / ("1.tif" if mode in ("CMYK", "I;16") else "1.png"))
    decoded = decode({"bytes": None, "path": str(next(tmp_path.iterdir()))})
    assert (decoded.mode, decoded.size) == ("RGB", (5, 3))


def test_a_photograph_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (5, 3)).save(tmp_path / "1.jpg", exif=exif)
    assert decode({"bytes": None, "path": str(tmp_path / "1.jpg")}).size == (3, 5)
