"""From stored images to the pixels that a model takes, one batch at a time.

Rows keep an image as it was stored, a compressed file, and only the batch at hand is ever decoded: CIFAR-10 as
floats of 224 x 224 would take 30 GB. What is random about a training image is drawn from the seed, the epoch and the
row's number alone. So it does not depend on how many processes or workers share the rows, and a run that goes on from
a checkpoint sees the very images that it would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import BaseImageProcessor

from meft.errors import DataError
from meft.training.data.base import LABEL

IMAGE, ROW, MIRROR = "image", "row", "mirror"
Stored = Mapping[str, Any]  # "bytes", "path" or both, as `datasets.Image(decode=False)` gives it


def move(pixels: np.ndarray, generator: np.random.Generator, *, mirror: bool) -> np.ndarray:
    """Moves a training image by up to an eighth of its sides, and mirrors it half of the time.

    What moves in is black. For images of 32 x 32 this is the padding by 4 and random crop that is usual for CIFAR
    (He et al. 2016, section 4.2).

    Args:
        pixels: Of shape (height, width, channels), in uint8.
        generator: Draws.
        mirror: Whether a mirrored image is of the same class: a digit is not.

    Returns:
        Pixels of the same shape.
    """
    height, width = pixels.shape[:2]
    down, right = height // 8, width // 8
    padded = np.pad(pixels, ((down, down), (right, right), (0, 0)))
    top, left = generator.integers(2 * down + 1), generator.integers(2 * right + 1)
    moved = padded[top : top + height, left : left + width]
    return np.ascontiguousarray(moved[:, ::-1] if mirror and generator.random() < 0.5 else moved)


class ImageCollator:
    """Makes a batch of rows: `pixel_values` of shape (rows, channels, height, width) and `labels`.

    Rows that have a number (`row`) are to train on: they are moved, and mirrored where their column `mirror` says so.

    Args:
        processor: Resizes, rescales and normalises as the model was pretrained.
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor
        # Shared, because worker processes that outlive an epoch have copies of everything else.
        self._seed_and_epoch = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Draws anew: the same row looks different in every epoch and under every seed."""
        self._seed_and_epoch.copy_(torch.tensor([seed, epoch]))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Decodes, moves, and processes.

        Raises:
            DataError: An image cannot be read, or the processor leaves images in different sizes.
        """
        images = [self._image(row) for row in rows]
        try:
            batch = {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
        except (ValueError, RuntimeError) as error:
            sizes = sorted({f"{image.width} x {image.height}" for image in images})
            raise DataError(
                f"Images of {', '.join(sizes)} pixels cannot be put into one batch: {error} Give the model an image "
                "processor that brings them to one size (do_resize in its preprocessor_config.json)."
            ) from error
        if LABEL in rows[0]:
            batch["labels"] = torch.tensor([row[LABEL] for row in rows])
        return batch

    def _image(self, row: Mapping[str, Any]) -> Image.Image:
        image = decode(row[IMAGE])
        if ROW not in row:
            return image
        generator = np.random.default_rng([*self._seed_and_epoch.tolist(), row[ROW]])
        return Image.fromarray(move(np.asarray(image), generator, mirror=row.get(MIRROR, False)))


def decode(stored: Stored) -> Image.Image:
    """Decodes an image: three colours, upright.

    Raises:
        DataError: It is missing, damaged, or no image.
    """
    source = stored["path"] if stored.get("bytes") is None else BytesIO(stored["bytes"])
    try:
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(
            f"The image {stored.get('path') or 'in memory'} cannot be read: {reason}. Replace or remove it."
        ) from error


def encode(pixels: np.ndarray) -> bytes:
    """Stores pixels, (height, width, 3) in uint8, without loss."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
