"""What is measured: the parts of `run.py`, each a function from its sizes to a dictionary that JSON can hold."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerator import CONFIGS, longest_sequences, why_not
from measuring import Progress, memory_rows, times_of
from peers import BLOCKS, CHECKPOINTING, FULL, HEADS, LAYERS, LORA, OFFLOAD, PEERS, TILES
from shapes import Subject, llama_3_2_3b, opt_1_3b, small_llama
from speed import at_equal_memory, profile_of

from meft import estimate

ALL = tuple(PEERS)
MAIN = (FULL, LORA, CHECKPOINTING, LAYERS, BLOCKS, TILES)
TIMED = (CHECKPOINTING, LAYERS, BLOCKS, TILES)
PROFILED = (*TIMED, "meft1")
FEW = (FULL, LORA, CHECKPOINTING, TILES)
"""At the longest sequence, of which a step takes long."""
LONG_CLASSIFIER = (*MAIN, "meft1")
OFFLOADED_FAKE = "LoRA + offload"
"""What `meft.estimate` has in place of `OFFLOAD`: it does not combine checkpointing with offloading."""


@dataclass(frozen=True)
class Sizes:
    """What the parts are run at.

    Attributes:
        wide, deep: The two decoders that the targets are about.
        sequences: Lengths for the decoders.
        depths: Further depths of the deep decoder; `shallow` one of the wide decoder.
        vocabulary: Of the decoder with a head.
        classifier: The sentence classifier; `classifier_sequences` its lengths.
        fake: Configurations run on tensors without values, by name; `fake_sequences` their lengths.
        gpu: Names of the configurations for an accelerator; `gpu_budget` bytes to stay within.
        rounds: Timed steps of each method.
        equal_batch: Sequences that LoRA with checkpointing is given, in whose memory the others take as many as fit.
    """

    wide: Subject
    deep: Subject
    sequences: tuple[int, ...]
    depths: tuple[int, ...]
    shallow: int
    vocabulary: int
    classifier: Subject
    classifier_sequences: tuple[int, ...]
    fake: tuple[str, ...]
    fake_sequences: tuple[int, ...]
    gpu: tuple[str, ...]
    gpu_budget: int
    rounds: int
    equal_batch: int = 4


FULL_SIZES = Sizes(
    wide=Subject("llama", 24, 512, 2048),
    deep=Subject("llama", 48, 256, 2048),
    sequences=(512, 1024, 2048, 4096),
    depths=(12, 24),
    shallow=8,
    vocabulary=32000,
    classifier=Subject("roberta", 24, 1024, 512, dtype="float32"),
    classifier_sequences=(128, 512),
    fake=("OPT-1.3B", "Llama-3.2-3B"),
    fake_sequences=(512, 2048, 8192),
    gpu=("Llama-3.2-3B", "Llama-3.1-8B"),
    gpu_budget=80 * 2**30,
    rounds=5,
)
QUICK_SIZES = Sizes(
    wide=Subject("llama", 3, 64, 64),
    deep=Subject("llama", 4, 128, 64),
    sequences=(32, 64, 96),
    depths=(2, 3),
    shallow=2,
    vocabulary=500,
    classifier=Subject("roberta", 3, 64, 64, dtype="float32"),
    classifier_sequences=(32, 64),
    fake=("small Llama",),
    fake_sequences=(64,),
    gpu=("small Llama",),
    gpu_budget=2**30,
    rounds=2,
)
_FAKE = {
    "OPT-1.3B": lambda longest: opt_1_3b(max(2048, longest)),
    "Llama-3.2-3B": lambda longest: llama_3_2_3b(),
    "small Llama": small_llama,
}


def classifier(sizes: Sizes, progress: Progress) -> dict[str, Any]:
    """(a): a RoBERTa really run."""
    subjects = _classifiers(sizes)
    return {"rows": memory_rows(subjects, PEERS, progress)}


def fake(sizes: Sizes, progress: Progress) -> dict[str, Any]:
    """(b): known shapes, on tensors without values."""
    rows = []
    for name in sizes.fake:
        config = _FAKE[name](max(sizes.fake_sequences))
        for label, peer in PEERS.items():
            method, options = peer.estimate
            for length in sizes.fake_sequences:
                progress(f"{name}, 1 x {length} tokens, fake: {label}")
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
                    found = estimate(
                        config, method=method, seq_len=length, task_type="CAUSAL_LM", device="cpu", **options
                    )
                rows.append(
                    {
                        "model": name,
                        "method": OFFLOADED_FAKE if label == OFFLOAD else label,
                        "sequence": length,
                        "batch": found.batch_size,
                        "dtype": found.dtype,
                        "optimizer": found.optimizer,
                        "activation_peak_bytes": found.activation_peak_bytes,
                        "activation_causes": found.activation_causes,
                        "weights_bytes": found.weights_bytes,
                        "total_bytes": found.total_bytes,
                    }
                )
    return {"rows": rows}


def decoders(sizes: Sizes, progress: Progress) -> dict[str, Any]:
    """(c): decoders really run, over lengths and depths."""
    wide, deep = sizes.wide, sizes.deep
    return {
        "wide": asdict(wide),
        "deep": asdict(deep),
        "shallow": sizes.shallow,
        "rows": memory_rows(_decoders(sizes), PEERS, progress),
    }


def head(sizes: Sizes, progress: Progress) -> dict[str, Any]:
    """(c): the wide decoder with a vocabulary head."""
    subject = replace(sizes.wide, vocabulary=sizes.vocabulary)
    return {"rows": memory_rows([(subject, tuple(HEADS))], HEADS, progress)}


def times(sizes: Sizes, progress: Progress) -> dict[str, Any]:
    """(c): times of both decoders."""
    peers = {name: PEERS[name] for name in TIMED}
    found = [times_of(subject, peers, sizes.rounds, CHECKPOINTING, progress) for subject in (sizes.wide, sizes.deep)]
    return {"rounds": sizes.rounds, "runs": found}


def speed(sizes: Sizes, progress: Progress) -> dict[str, Any]:
    """(c): where the time of both decoders goes, and tokens a second in the same memory."""
    peers = {name: PEERS[name] for name in PROFILED}
    subjects = (sizes.wide, sizes.deep)
    equal = [replace(subject, sequence=subject.sequence // 4, batch=sizes.equal_batch) for subject in subjects]
    return {
        "rounds": sizes.rounds,
        "runs": [profile_of(subject, peers, sizes.rounds, CHECKPOINTING, progress) for subject in subjects],
        "equal": [at_equal_memory(subject, peers, sizes.rounds, CHECKPOINTING, progress) for subject in equal],
    }


def gpu(sizes: Sizes, progress: Progress) -> dict[str, Any]:
    """(d): longest sequences and tokens a second, on an accelerator."""
    reason = why_not(sizes.gpu_budget)
    if reason is not None:
        return {"skipped": reason, "rows": []}
    configs = {name: CONFIGS[name] for name in sizes.gpu}
    return {"budget_bytes": sizes.gpu_budget, "rows": longest_sequences(configs, PEERS, sizes.gpu_budget, progress)}


PARTS = {
    "classifier": classifier,
    "decoders": decoders,
    "head": head,
    "times": times,
    "speed": speed,
    "fake": fake,
    "gpu": gpu,
}


def count(part: str, sizes: Sizes) -> int | None:
    """How many times a part tells its progress; None where it finds out on its way."""
    return {
        "classifier": sum(len(methods) for _, methods in _classifiers(sizes)),
        "decoders": sum(len(methods) for _, methods in _decoders(sizes)),
        "head": len(HEADS),
        "times": 2 * len(TIMED) * sizes.rounds,
        "speed": 2 * len(PROFILED) * (2 * sizes.rounds + 1),
        "fake": len(sizes.fake) * len(PEERS) * len(sizes.fake_sequences),
        "gpu": None,
    }[part]


def _classifiers(sizes: Sizes) -> list[tuple[Subject, Sequence[str]]]:
    *short, long = sizes.classifier_sequences
    lengths = [*((length, ALL) for length in short), (long, LONG_CLASSIFIER)]
    return [(replace(sizes.classifier, sequence=length), methods) for length, methods in lengths]


def _decoders(sizes: Sizes) -> list[tuple[Subject, Sequence[str]]]:
    subjects: list[tuple[Subject, Sequence[str]]] = []
    for shape, depths in ((sizes.wide, (sizes.shallow,)), (sizes.deep, sizes.depths)):
        for length in sizes.sequences:
            methods = ALL if length == shape.sequence else FEW if length > shape.sequence else MAIN
            subjects.append((replace(shape, sequence=length), methods))
        subjects += [(replace(shape, layers=depth), MAIN) for depth in depths]
    return subjects
