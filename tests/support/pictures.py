"""Tiny images in folders and archives, and a tiny vision transformer, in folders of a test's own.

>>> folder = make_folder(tmp_path / "pets", {"train": {"cat": 3, "dog": 3}, "validation": {"cat": 1, "dog": 1}})
>>> found = train(make_vit(tmp_path / "vit"), ["--task=imagefolder", f"--data_dir={folder}"], tmp_path / "run")
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIDE = 8


def pixels(seed: int, side: int = SIDE) -> np.ndarray:
    """Random pixels, (side, side, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def save(path: Path, content: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(content).save(path)
    return path


def make_folder(folder: Path, splits: Mapping[str, Mapping[str, int]]) -> Path:
    """`splits` gives the number of images of each class; those of the first class are dark and of the others bright."""
    seed = 0
    for split, classes in splits.items():
        for place, (name, count) in enumerate(classes.items()):
            for number in range(count):
                seed += 1
                save(folder / split / name / f"{number}.png", pixels(seed) // 2 + (0 if place == 0 else 127))
    return folder


def make_batches(folder: Path, batches: Mapping[int, int], rows: int = 3) -> Path:
    """CIFAR-10 as PNG batches: `batches` gives the first label of each, and the labels count up from there."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = [0] * (rows * (max(batches) + 1))
    for number, first in batches.items():
        content = np.stack([pixels(100 * number + row, 32) for row in range(rows)])
        Image.fromarray(content.reshape(rows, 32 * 32, 3)).save(folder / f"cifar10_batch_{number}.png")
        labels[number * rows : (number + 1) * rows] = [(first + row) % 10 for row in range(rows)]
    (folder / "cifar10_labels.js").write_text(f"var labels={json.dumps(labels)};")
    return folder


def make_vit(folder: Path, *, side: int = SIDE, labels: tuple[str, ...] = (), **changes: object) -> Path:
    """Saves a random model of two layers with its image processor; with a head where there are labels."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    config = ViTConfig(
        image_size=side,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.1,
        **(names if labels else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = ViTForImageClassification(config)
    (model if labels else model.vit).save_pretrained(folder)
    ViTImageProcessorPil(**{"size": {"height": side, "width": side}, **changes}).save_pretrained(folder)
    return folder
