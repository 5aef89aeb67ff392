"""Images: a small vision transformer, pretrained on five classes of CIFAR-10 and fine-tuned on the other five.

    python benchmarks/images.py pretrain --data_dir CIFAR10 --output_dir vit     # about 12 minutes of one core
    python benchmarks/images.py finetune --data_dir CIFAR10 --model_dir vit --output_dir runs    # about 20 minutes
    python benchmarks/images.py finetune ... --seeds 0 --num_train_epochs 1      # any argument of `meft sweep`

`pretrain` trains a vision transformer from nothing on the classes airplane, automobile, bird, cat and deer, with
random moves and mirroring, and saves its body, without the head, as an ordinary model folder. No image of the other
five classes is looked at.

`finetune` runs the recipe images.yaml, `meft sweep` on dog, frog, horse, ship and truck: every method, the learning
rate chosen by the accuracy on training rows held out, three seeds. It then scores every run on the test images, which
neither training nor that choice has seen, by `meft evaluate`. Stopped, the same command goes on.

CIFAR10 is a folder with CIFAR-10 as PNG batches. Writes images.json, .md and .svg to benchmarks/results.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images_tables import as_markdown, figure_of, spread
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from meft.methods.registry import count_parameters
from meft.storage.figures import save_figure
from meft.storage.files import read_json, write_json, write_text
from meft.storage.results import hardware, now, versions
from meft.training.evaluation import evaluate, parse_evaluation
from meft_lab.cli.sweep import sweep_command, typed_values
from meft_lab.sweep import Run, Sweep, load_recipe, table_of
from meft_lab.tasks import load_images
from meft_lab.tasks.pixels import ImageCollator

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PRETRAINED, FINE_TUNED = CLASSES[:5], CLASSES[5:]
SIDE = 32
PRETRAINING = "pretraining.json"
TEST = "test.json"
HERE = Path(__file__).parent
RECIPE, RESULTS = HERE / "images.yaml", HERE / "results"


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    arguments.run(arguments)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    pretraining = parts.add_parser(
        "pretrain", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    pretraining.set_defaults(run=pretrain)
    pretraining.add_argument("--data_dir", type=Path, required=True, help="CIFAR-10 as PNG batches")
    pretraining.add_argument("--output_dir", type=Path, required=True, help="where the model goes")
    pretraining.add_argument("--layers", type=int, default=6, help="transformer layers")
    pretraining.add_argument("--width", type=int, default=192, help="size of a hidden state")
    pretraining.add_argument("--patch", type=int, default=8, help="pixels along the side of a patch")
    pretraining.add_argument("--epochs", type=int, default=85, help="passes over the training images")
    pretraining.add_argument("--batch", type=int, default=64, help="images of a batch")
    pretraining.add_argument("--learning_rate", type=float, default=1e-3, help="at its highest")
    pretraining.add_argument("--seed", type=int, default=0, help="of everything random")
    pretraining.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    tuning = parts.add_parser("finetune", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    tuning.set_defaults(run=finetune)
    tuning.add_argument("--data_dir", type=Path, required=True, help="CIFAR-10 as PNG batches")
    tuning.add_argument("--model_dir", type=Path, required=True, help="what pretrain saved")
    tuning.add_argument("--output_dir", type=Path, required=True, help="where the runs go")
    tuning.add_argument("--results_dir", type=Path, default=RESULTS, help="where the tables go")
    tuning.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    arguments, typed = parser.parse_known_args(words)
    arguments.typed = typed
    if arguments.typed and arguments.run is pretrain:
        parser.error(f"unknown argument {arguments.typed[0]}")
    return arguments


# -- pretraining -----------------------------------------------------------------------------------------------------


def pretrain(arguments: argparse.Namespace) -> None:
    """Trains, scores on the test images of the same classes, and saves the body, its processor and what was found."""
    begun = time.perf_counter()
    torch.manual_seed(arguments.seed)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    collator = ImageCollator(processor)
    rows = load_images("cifar10", arguments.data_dir, ("train", "test"), labels=PRETRAINED).splits
    train, test = list(rows["train"]), list(rows["test"])
    model = build_model(arguments)
    losses = fit(model, train, collator, arguments)
    accuracy = score(model, test, collator)
    model.vit.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    found = {
        "classes": PRETRAINED,
        "images": {"train": len(train), "test": len(test)},
        "accuracy": accuracy,
        "chance": 1 / len(PRETRAINED),
        "loss_by_epoch": losses,
        "parameters": count_parameters(model)[1],
        "patches": (SIDE // arguments.patch) ** 2,
        "settings": {name: value for name, value in vars(arguments).items() if isinstance(value, (int, float))},
        "seconds": time.perf_counter() - begun,
        "command": shlex.join(["python", *sys.argv]),
        "date": now(),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(arguments.output_dir / PRETRAINING, found)
    print(f"{accuracy:.1%} of {len(test)} test images right; chance is {1 / len(PRETRAINED):.0%}.")


def build_model(arguments: argparse.Namespace) -> ViTForImageClassification:
    """A vision transformer with random weights."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=arguments.patch,
            hidden_size=arguments.width,
            num_hidden_layers=arguments.layers,
            num_attention_heads=max(1, arguments.width // 64),
            intermediate_size=4 * arguments.width,
            hidden_dropout_prob=0.1,
            id2label=dict(enumerate(PRETRAINED)),
            label2id={name: index for index, name in enumerate(PRETRAINED)},
        )
    )


def fit(
    model: nn.Module, rows: list[dict[str, Any]], collator: ImageCollator, arguments: argparse.Namespace
) -> list[float]:
    """Trains and returns the mean loss of every epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.05)
    steps = arguments.epochs * (len(rows) // arguments.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_and_cosine(step, steps))
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    generator = np.random.default_rng(arguments.seed)
    means = []
    model.train()
    with tqdm(total=steps, desc="pretraining", unit="step", mininterval=5) as bar:
        for epoch in range(arguments.epochs):
            collator.set_epoch(arguments.seed, epoch)
            losses = []
            for batch in batches(rows, collator, arguments.batch, generator.permutation(len(rows))):
                loss = loss_of(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                losses.append(loss.item())
                bar.update()
            means.append(float(np.mean(losses)))
            bar.set_postfix(epoch=epoch + 1, loss=f"{means[-1]:.3f}")
    return means


def warmup_and_cosine(step: int, steps: int) -> float:
    """The learning rate as a share of the highest: up for a twentieth of the steps, then down along a cosine."""
    warmup = max(1, steps // 20)
    return step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def batches(rows: list[dict[str, Any]], collator: ImageCollator, size: int, order: Any) -> Any:
    """Whole batches in the given order; what is left over is left out."""
    for start in range(0, len(rows) - size + 1, size):
        yield collator([rows[index] for index in order[start : start + size]])


def score(model: nn.Module, rows: list[dict[str, Any]], collator: ImageCollator) -> float:
    """The share of images whose class is predicted right."""
    model.eval()
    batch: dict[str, Tensor] = collator(rows)
    with torch.no_grad():
        predicted = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
    return (predicted == batch["labels"]).float().mean().item()


# -- fine-tuning -----------------------------------------------------------------------------------------------------


def finetune(arguments: argparse.Namespace) -> None:
    """Runs the recipe, scores its runs on the test images, and writes the tables and the figure."""
    given = ["--model_name_or_path", str(arguments.model_dir), "--data_dir", str(arguments.data_dir), *arguments.typed]
    command = shlex.join(["python", *sys.argv])
    if sweep_command(str(RECIPE), given, output_dir=str(arguments.output_dir), command=command):
        sys.exit(1)
    recipe = load_recipe(str(RECIPE), typed_values(given))
    outcome = Sweep(recipe, arguments.output_dir).outcome()
    table = table_of(recipe, outcome)
    tested = {run.title: test_accuracy(run) for run in tqdm(outcome.final, desc="test images", unit="run")}
    for row in table["rows"]:
        runs = [run for run in outcome.final if run.point["method"] == row["name"]]
        row["validation"] = row.pop("mean")
        row["test"] = spread({run.seed: tested[run.title] for run in runs})
        row["learning_rate"] = runs[0].point["learning_rate"]
    found = {
        "pretraining": read_json(arguments.model_dir / PRETRAINING),
        "finetuning": {
            "classes": FINE_TUNED,
            "chance": 1 / len(FINE_TUNED),
            "arguments": {**recipe.arguments, **recipe.typed},
            "images": next(iter(outcome.finished.values()))[1]["rows"] | {"test": test_images(outcome.final[0])},
            **{name: table[name] for name in ("rows", "chosen", "runs", "seeds")},
            "command": command,
            "date": now(),
            "hardware": hardware(),
            "versions": versions(),
        },
    }
    arguments.results_dir.mkdir(parents=True, exist_ok=True)
    write_json(arguments.results_dir / "images.json", found)
    write_text(arguments.results_dir / "images.md", as_markdown(found))
    save_figure(figure_of(found["finetuning"]), arguments.results_dir / "images.svg")
    print(as_markdown(found))


def test_accuracy(run: Run) -> float:
    """The share of test images that the finished run gets right; kept beside the run."""
    file = run.folder / TEST
    if not file.is_file():
        words = [f"--model_name_or_path={run.folder}", "--split=test", f"--results_file={file}", "--use_cpu=true"]
        evaluate(*parse_evaluation([*words, "--disable_tqdm=true", "--report_to=none"]), say=lambda _: None)
    return float(read_json(file)["metrics"]["accuracy"])


def test_images(run: Run) -> int:
    """How many test images there are."""
    return len(load_images("cifar10", run.arguments["data_dir"], ("test",), labels=FINE_TUNED).splits["test"])


if __name__ == "__main__":
    main()
