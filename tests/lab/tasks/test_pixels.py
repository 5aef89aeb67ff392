from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from meft.errors import DataError
from meft_lab.tasks.pixels import ImageCollator, decode, encode, move
from support.pictures import pixels, save


def stored(seed: int, side: int = 8) -> dict[str, object]:
    return {"bytes": encode(pixels(seed, side)), "path": None}


def collator(**changes: object) -> ImageCollator:
    return ImageCollator(ViTImageProcessorPil(size={"height": 8, "width": 8}, **changes))


def test_moves_reach_every_place_and_what_moves_in_is_black() -> None:
    image = pixels(1, 16)
    expected = set()
    for down in range(-2, 3):
        for right in range(-2, 3):
            shifted = np.zeros_like(image)
            inside = image[max(0, down) : 16 + min(0, down), max(0, right) : 16 + min(0, right)]
            top, left = max(0, -down), max(0, -right)
            shifted[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
            expected |= {shifted.tobytes(), shifted[:, ::-1].tobytes()}
    generator = np.random.default_rng(0)
    seen = {move(image, generator, mirror=True).tobytes() for _ in range(1000)}
    assert seen == expected and len(seen) == 50


def test_digits_are_not_mirrored() -> None:
    image = np.broadcast_to(np.arange(1, 17, dtype=np.uint8)[None, :, None], (16, 16, 3)).copy()
    generator = np.random.default_rng(0)
    for _ in range(50):
        row = move(image, generator, mirror=False)[8, :, 0]
        assert (np.diff(row[row > 0].astype(int)) == 1).all()


def test_rows_that_are_not_trained_on_are_taken_as_they_are() -> None:
    collate = collator()
    collate.set_epoch(3, 7)
    batch = collate([{"image": stored(1), "label": 1}, {"image": stored(2), "label": 0}])
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64
    expected = torch.tensor(np.stack([pixels(1), pixels(2)])).permute(0, 3, 1, 2) / 255 * 2 - 1
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=1e-6)
    assert collate([{"image": stored(1)}]).keys() == {"pixel_values"}


def test_what_is_random_depends_on_seed_epoch_and_row_alone() -> None:
    def seen(seed: int, epoch: int, rows: list[int], mirror: bool = True) -> torch.Tensor:
        collate = collator()
        collate.set_epoch(seed, epoch)
        torch.manual_seed(torch.seed())
        return collate([{"image": stored(0, 32), "row": row, "mirror": mirror} for row in rows])["pixel_values"]

    first = seen(0, 0, [5, 6, 7])
    assert torch.equal(first, seen(0, 0, [5, 6, 7]))
    assert torch.equal(first[[2, 0]], seen(0, 0, [7, 5]))
    for other in (seen(1, 0, [5, 6, 7]), seen(0, 1, [5, 6, 7]), seen(0, 0, [8, 9, 10])):
        assert not torch.equal(first, other)


def test_worker_processes_see_the_epoch() -> None:
    """They live on from epoch to epoch, with the collator as it was when they were started."""
    collate = collator()
    assert collate._seed_and_epoch.is_shared()


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "1.png", pixels(1, 64))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError) as caught:
        collator()([{"image": {"bytes": None, "path": str(path)}}])
    assert str(caught.value).startswith(f"The image {path} cannot be read: ")
    assert str(caught.value).endswith(". Replace or remove it.") and "no image that" not in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        decode({"bytes": None, "path": str(path)})
    with pytest.raises(DataError) as caught:
        decode({"bytes": b"GIF89a", "path": None})
    assert str(caught.value).startswith("The image in memory cannot be read: ")


def test_images_of_different_sizes_need_a_processor_that_resizes() -> None:
    rows = [{"image": stored(1, 8)}, {"image": stored(2, 12)}]
    assert collator()(rows)["pixel_values"].shape == (2, 3, 8, 8)
    with pytest.raises(DataError) as caught:
        collator(do_resize=False)(rows)
    assert str(caught.value).startswith("Images of 12 x 12, 8 x 8 pixels cannot be put into one batch: ")
    assert str(caught.value).endswith(
        "Give the model an image processor that brings them to one size (do_resize in its preprocessor_config.json)."
    )
