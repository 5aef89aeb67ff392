"""What is checked of one family under one coupling, on its tiny model.

A training step runs and moves every adapter; the backward pass rebuilds every stream bit for bit; gradients are those
of stored activations; generation with a key-value cache gives what generation without one gives; a saved model, loaded
back, computes the same. A model that the library refuses, with a reason and before its first training step, is refused;
anything else that goes wrong is a failure.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from meft.backbone.conversion import Stack, find_stacks, layer_drop_unsaid, make_reversible
from meft.backbone.layers import shared_by
from meft.errors import ConfigError, UnsupportedModelError
from meft.verification import verify

from .heads import GENERATING
from .inputs import FIRST_WORD
from .shrink import FIRST_SPECIAL
from .subject import FULL, WAYS, PlainModelError, Subject, loss_on, outputs_on, seeded

__all__ = ["FAILED", "FULL", "REFUSED", "WAYS", "WORKS", "PlainModelError", "Subject", "Verdict", "check", "check_head"]

WORKS, REFUSED, FAILED = "works", "refused", "failed"

_NEW_WORDS = 4
# The same numbers reach a layer with a cache and without, or from memory that is aligned in another way; they are then
# summed in another order, and rounded to the grid of the streams.
_SAME: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}


@dataclass(frozen=True)
class Verdict:
    """What came of one check.

    Attributes:
        state: "works", "refused" or "failed".
        detail: the reason of a refusal, what failed, or what else there is to say.
    """

    state: str
    detail: str = ""


class _FailedCheckError(Exception):
    """Something is not as it must be; of its own kind so that it cannot be taken for a refusal."""


def check(subject: Subject, way: str) -> Verdict:
    """Checks everything of one head under one of `WAYS`.

    Raises:
        PlainModelError: the plain model cannot take a training step.
    """
    return _verdict(subject, way, _EVERYTHING)


def check_head(subject: Subject, way: str) -> Verdict:
    """Checks a training step, its reconstruction and its gradients only; raises as `check` does."""
    return _verdict(subject, way, _TRAINING)


def _verdict(subject: Subject, way: str, checks: Mapping[str, Callable[[Subject, str, nn.Module], str]]) -> Verdict:
    with seeded():
        try:
            model = subject.converted(way)
        except (UnsupportedModelError, ConfigError) as error:
            return Verdict(REFUSED, str(error))
        assert subject.reached is not None  # or the plain model cannot be trained
        try:
            loss_on(model, subject.batch)
        except (UnsupportedModelError, ConfigError) as error:
            return Verdict(REFUSED, str(error))
        except Exception as error:
            return Verdict(FAILED, f"first forward pass: {_described(error)}")
        notes = []
        for title, one in checks.items():
            try:
                notes.append(one(subject, way, model))
            except Exception as error:
                return Verdict(FAILED, f"{title}: {_described(error)}")
    return Verdict(WORKS, " ".join(note for note in notes if note))


def _step(subject: Subject, way: str, model: nn.Module) -> str:
    """The loss is finite, and the weights of every adapter that it reaches move."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    loss = loss_on(model, subject.batch)
    loss.backward()
    torch.optim.SGD(trained.values(), lr=0.01).step()
    if not torch.isfinite(loss):
        raise _FailedCheckError(f"the loss is {loss.item()}")
    still = [name for name, parameter in trained.items() if torch.equal(parameter, before[name])]
    adapters = [name for name in still if _must_move(name, model, subject)]
    if adapters:
        raise _FailedCheckError(f"{len(adapters)} trained parameters did not move: {', '.join(adapters[:3])}")
    model.zero_grad(set_to_none=True)
    return ""


def _must_move(name: str, model: nn.Module, subject: Subject) -> bool:
    """Weights of adapters in layers that the loss reaches.

    A pretrained model has parameters that no loss reaches, and a bias that is added to every token does not change
    which token answers a question. Of the highest layer that is reached, one stream may be read alone.
    """
    if "meft_" not in name or not name.endswith(".weight"):
        return False
    for stack in find_stacks(model, subject.family.stacks):
        reached = subject.reached_in(stack)
        for index in reached:
            if name.startswith(f"{stack.name}.{index}."):
                return index != max(reached) or not any(f".meft_{f.lower()}_" in name for f in _unread(stack))
    return False


def _unread(stack: Stack) -> set[str]:
    shared = shared_by(stack.layers)
    return set() if shared is None or shared.plan.coupling is None else shared.plan.coupling.unread()


def _rebuilds(subject: Subject, way: str, model: nn.Module) -> str:
    """Every stream of every layer that the loss reaches comes back bit for bit; gradients agree up to rounding."""
    report, stacks = verify(model, subject.batch), find_stacks(model, subject.family.stacks)
    if not report.bitwise:
        raise _FailedCheckError(f"streams were not rebuilt bit for bit: {report.worst_reconstruction:.1e}")
    calls = [
        [index for index in stack.order if index in subject.reached_in(stack) - _as_they_are(stack)] for stack in stacks
    ]
    expected = {stack.name: len(indices) for stack, indices in zip(stacks, calls, strict=True) if indices}
    rebuilt = {name: len(errors) for name, errors in report.reconstruction_error.items() if "(pass" not in name}
    if sorted(rebuilt.values()) != sorted(expected.values()):
        raise _FailedCheckError(f"layers rebuilt are {rebuilt}, not {expected}")
    if not report.passed():
        # Sums in another order, magnified by a network that is badly conditioned, or something else?
        report = verify(copy.deepcopy(model).double(), _doubled(subject.batch))
    if not report.passed():
        worst = max(report.gradient_errors, key=lambda name: report.gradient_errors[name])
        size = f"{report.gradient_error:.1e} ({worst})"
        raise _FailedCheckError(f"gradients differ from those of stored activations by {size}")
    return ""


def _as_they_are(stack: Stack) -> set[int]:
    """Indices of the layers that run uncoupled: those that change the shape, and all of a list that is no stack."""
    shared = shared_by(stack.layers)
    assert shared is not None
    return set(range(len(stack.layers))) if shared.left_out else shared.plain


def _doubled(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def _generates(subject: Subject, way: str, model: nn.Module) -> str:
    """Greedy generation gives the same words and logits with a cache as without."""
    if subject.head not in GENERATING:
        return ""
    try:
        difference = _between_caches(model, subject)
    except UnsupportedModelError as error:  # RWKV: the plain model's own states widen the hidden state
        difference = _described(error)
        model.train()
    if not difference:
        return ""
    if _between_caches(copy.deepcopy(subject.base), subject):
        return "The plain model, too, generates other words with a cache than without."
    raise _FailedCheckError(difference)


def _between_caches(model: nn.Module, subject: Subject) -> str:
    """How generation with a key-value cache differs from that without one."""
    model.eval()
    options: dict[str, Any] = {"max_new_tokens": _NEW_WORDS, "min_new_tokens": _NEW_WORDS, "do_sample": False}
    # A random model may choose the word that stands for an image; the lowest three are forced at times.
    options["suppress_tokens"] = list(range(FIRST_SPECIAL, FIRST_WORD))
    prompt = {name: value for name, value in subject.batch.items() if name != "labels"}
    cached, plain = (
        model.generate(**prompt, **options, output_logits=True, return_dict_in_generate=True, use_cache=use_cache)  # type: ignore[operator]
        for use_cache in (True, False)
    )
    model.train()
    for step, (one, other) in enumerate(zip(cached.logits, plain.logits, strict=True)):
        if not torch.allclose(one, other, **_SAME):
            return f"logits of word {step} differ by {(one - other).abs().max():.1e} with a cache"
    return "" if torch.equal(cached.sequences, plain.sequences) else "other words with a cache than without"


def _saves(subject: Subject, way: str, model: nn.Module) -> str:
    """All weights come back bit for bit, and compute the same."""
    loaded, note = _loaded(subject, way, model), ""
    other = _others(model, loaded)
    if other and not other & {name for name, _ in model.named_parameters()} and way != FULL:
        # Running means and the like: an adapter holds what is trained, and they are not.
        loaded.load_state_dict({name: model.state_dict()[name] for name in other}, strict=False)
        note = "The plain model changes its buffers in training, and PEFT does not save them."
    elif other and way == FULL and other == _others(*_plain_round_trip(subject)):
        return "The plain model, too, comes back with other weights."
    elif other:
        raise _FailedCheckError(f"{len(other)} weights are others after loading: {', '.join(sorted(other)[:3])}")
    found, expected = outputs_on(loaded, subject.batch), outputs_on(model, subject.batch)
    different = [name for name, values in expected.items() if not torch.allclose(found[name], values, **_SAME)]
    if different or not expected:
        raise _FailedCheckError(f"other outputs after loading: {', '.join(different) or 'none at all'}")
    return note


@layer_drop_unsaid()
def _loaded(subject: Subject, way: str, model: Any) -> Any:
    """The model, saved and loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if way == FULL:
            return make_reversible(type(subject.base).from_pretrained(folder), **subject.options)
        return PeftModel.from_pretrained(copy.deepcopy(subject.base), folder)


def _plain_round_trip(subject: Subject) -> tuple[nn.Module, nn.Module]:
    """The plain model, and what comes of it by saving and loading."""
    with tempfile.TemporaryDirectory() as folder:
        subject.base.save_pretrained(folder)
        return subject.base, type(subject.base).from_pretrained(folder)


def _others(one: nn.Module, other: nn.Module) -> set[str]:
    """Names of weights that are not the same in both."""
    first, second = one.state_dict(), other.state_dict()
    return {name for name in first.keys() | second.keys() if not _equal(first.get(name), second.get(name))}


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, _FailedCheckError) else f"{type(error).__name__}: {error}"


_TRAINING = {"training step": _step, "reconstruction and gradients": _rebuilds}
_EVERYTHING = {**_TRAINING, "generation": _generates, "saving and loading": _saves}
