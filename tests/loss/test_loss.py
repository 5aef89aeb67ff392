"""The loss head: losses in tiles equal those of whole logits, which are there for whoever asks for them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import meft
from meft.errors import DataError, DoubleBackwardError, MaterializedLogitsWarning, ModifiedTensorError
from meft.loss import FusedLinear, LazyLogits, attach, detach
from meft.loss.tiled import rows_per_tile, tiled_cross_entropy
from meft.memory import measure
from meft.memory.measurement.timeline import record_cpu

# Tests of what reads whole logits, not of what is said then.
WHOLE = "ignore:Logits of shape:meft.errors.MaterializedLogitsWarning"
VOCABULARY, WIDTH, LENGTH = 97, 16, 40
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
OPT = {
    "hidden_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 32,
}
GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAUSAL: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHARED),
    "llama, tied": lambda: LlamaConfig(**SHARED, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**GPT2, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=2),
    "opt": lambda: OPTConfig(**OPT, vocab_size=VOCABULARY, max_position_embeddings=64, dropout=0.0),
    "gemma2, soft-capped": lambda: Gemma2Config(
        **SHARED, head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0
    ),
    "granite, scaled": lambda: GraniteConfig(**SHARED, logits_scaling=3.0),
    "cohere, scaled": lambda: CohereConfig(**SHARED, logit_scale=0.3),
    "gpt_neox": lambda: GPTNeoXConfig(**SHARED),
    "bert, with a bias": lambda: BertConfig(**SHARED, **NO_DROPOUT, is_decoder=True),
}


def built(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Same arguments, same weights; in training mode."""
    config = CAUSAL[family]()
    config.update(changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train()


def tokens(rows: int = 3, length: int = LENGTH, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def labels() -> Tensor:
    chosen = tokens()
    chosen[0, :9] = -100
    return chosen


Loss = Callable[[nn.Module], Tensor]


def own_loss(model: nn.Module, **options: Any) -> Tensor:
    return model(input_ids=tokens(), **{"labels": labels()} | options).loss


def taken(model: nn.Module, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every gradient."""
    model.zero_grad()
    found = loss(model)
    found.backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(model: nn.Module, loss: Loss, relative: float = 1e-6) -> None:
    """The head in tiles against the plain one; gradients relative to the norm of all of them."""
    plain, expected = taken(model, loss)
    assert attach(model)
    fused, found = taken(model, loss)
    detach(model)
    assert fused.dtype == plain.dtype
    torch.testing.assert_close(fused, plain, rtol=relative, atol=0.0)
    assert found.keys() == expected.keys()
    scale = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= relative * scale, name


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("family", CAUSAL)
def test_losses_and_gradients_equal_those_of_the_plain_head(family: str, trained: bool) -> None:
    model = built(family)
    model.get_output_embeddings().requires_grad_(trained)
    compare(model, own_loss)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.filterwarnings(WHOLE)
def test_logits_wait_until_they_are_asked_for_and_are_those_of_the_plain_head(family: str) -> None:
    model = built(family)
    plain = model(input_ids=tokens(), labels=labels()).logits
    attach(model)
    output = model(input_ids=tokens(), labels=labels())
    assert isinstance(output.logits, LazyLogits) and output.logits.pending
    output.loss.backward()
    assert output.logits.pending
    assert torch.equal(output.logits, plain)
    assert not output.logits.pending


OPTIONS: dict[str, dict[str, Any]] = {
    "num_items_in_batch, a tensor": {"num_items_in_batch": torch.tensor(211)},
    "num_items_in_batch, a number": {"num_items_in_batch": 211},
    "shift_labels": {"shift_labels": tokens(3, LENGTH).flip(0)},
    "logits_to_keep": {"logits_to_keep": LENGTH // 2, "labels": tokens(3, LENGTH // 2)},
    "another ignored label": {"ignore_index": 5, "labels": tokens()},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2, soft-capped"])
def test_what_the_loss_is_told_counts(family: str, options: str) -> None:
    compare(built(family), lambda model: own_loss(model, **OPTIONS[options]))


def calls_of_torch(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is given to PyTorch's own function."""
    calls: list[Any] = []
    function = F.linear_cross_entropy
    monkeypatch.setattr(F, "linear_cross_entropy", lambda *a, **k: calls.append((a, k)) or function(*a, **k))
    return calls


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="PyTorch has no such function")
@pytest.mark.parametrize(
    ("family", "dtype", "trained", "called"),
    [
        ("llama", torch.float32, False, True),
        ("bert, with a bias", torch.float32, False, True),
        ("llama", torch.float64, False, False),
        ("llama", torch.float32, True, False),
        ("llama", torch.bfloat16, False, False),
        ("granite, scaled", torch.float32, False, False),
    ],
)
def test_pytorchs_own_function_is_used_where_it_loses_nothing(
    family: str, dtype: torch.dtype, trained: bool, called: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of_torch(monkeypatch)
    model = built(family, dtype)
    model.get_output_embeddings().weight.requires_grad_(trained)
    attach(model)
    own_loss(model).backward()
    assert len(calls) == called


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2, soft-capped", "bert, with a bias"])
def test_without_pytorchs_own_function(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    model = built(family)
    model.get_output_embeddings().requires_grad_(False)
    compare(model, own_loss)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_ignored_labels(dtype: torch.dtype, trained: bool) -> None:
    model = built(dtype=dtype)
    model.lm_head.requires_grad_(trained)
    attach(model)
    for options, lost in (({}, True), ({"num_items_in_batch": 7}, False)):
        loss, gradients = taken(model, lambda m, o=options: own_loss(m, labels=torch.full_like(tokens(), -100), **o))
        assert bool(loss.isnan()) is lost
        assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("kind", [BertForMaskedLM, T5ForConditionalGeneration, BartForConditionalGeneration])
def test_other_losses_on_a_vocabulary(kind: type[PreTrainedModel]) -> None:
    t5 = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
    t5.decoder_start_token_id = 0
    bart = BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, dropout=0.0)
    model = kind({BertForMaskedLM: BertConfig(**SHARED, **NO_DROPOUT), T5ForConditionalGeneration: t5}.get(kind, bart))
    compare(model.train(), own_loss)
    attach(model)
    # BART adds a vector to its logits.
    assert model(input_ids=tokens(), labels=labels()).logits.pending


def operands(dtype: torch.dtype, positions: int = 256, width: int = 32, vocabulary: int = 501) -> list[Tensor]:
    made = torch.randn(positions, width), 0.2 * torch.randn(vocabulary, width), 0.1 * torch.randn(vocabulary)
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def plain_head(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, **options: Any) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_plain_head(dtype: torch.dtype, reduction: str) -> None:
    given, target = operands(dtype), torch.randint(501, (256,))
    target[::5] = -100
    errors: dict[str, list[float]] = {}
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    reference = plain_head(*exact, target, reduction=reduction)
    expected = torch.autograd.grad(reference, exact)
    for name, head in (("plain", plain_head), ("tiled", tiled_cross_entropy)):
        loss = head(*given, target, reduction=reduction)
        assert loss.dtype == torch.float32
        found = torch.autograd.grad(loss, given)
        assert [g.dtype for g in found] == [dtype] * 3
        errors[name] = [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]
        errors[name].append(abs(float(loss.detach().double() / reference.detach()) - 1))
    for tiled, plain in zip(errors["tiled"][:3], errors["plain"][:3], strict=True):
        assert tiled <= 1.05 * plain
    assert errors["tiled"][3] <= errors["plain"][3] + 1e-6


def test_float64_stays_float64() -> None:
    model = built("gemma2, soft-capped", torch.float64)
    compare(model, own_loss)
    compare(model, lambda m: unshifted(m(input_ids=tokens()).logits), relative=1e-13)
    attach(model)
    assert model(input_ids=tokens(), labels=labels()).logits.pending
    given, target = operands(torch.float64), torch.randint(501, (256,))
    torch.testing.assert_close(tiled_cross_entropy(*given, target), plain_head(*given, target), rtol=1e-14, atol=0.0)


def test_a_factor_is_not_rounded_to_half_precision() -> None:
    given, target = operands(torch.bfloat16), torch.randint(501, (256,))
    factor = 1.0058  # rounds to 1.0078 in bfloat16
    whole, part = (torch.autograd.grad(f * tiled_cross_entropy(*given, target), given[0])[0] for f in (1.0, factor))
    assert float(part.double().norm() / whole.double().norm()) == pytest.approx(factor, abs=1e-3)


@pytest.mark.filterwarnings(WHOLE)
def test_autocast_computes_as_the_plain_head_does() -> None:
    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=tokens(), labels=labels())
        assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
        return output.loss

    compare(built(), loss, relative=1e-2)
    model = built()
    attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        fused = model(input_ids=tokens(), labels=labels())
        half = F.cross_entropy(model(input_ids=tokens()).logits.view(-1, VOCABULARY), tokens().view(-1))
    detach(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(input_ids=tokens(), labels=labels())
        whole = F.cross_entropy(model(input_ids=tokens()).logits.view(-1, VOCABULARY), tokens().view(-1))
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-6, atol=0.0)
    assert torch.equal(fused.logits, plain.logits)
    assert half.dtype == whole.dtype
    torch.testing.assert_close(half, whole, rtol=1e-6, atol=0.0)


def test_autocast_leaves_float64_alone() -> None:
    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(inputs_embeds=embedded, labels=labels())
        assert output.logits.dtype == plain.dtype == torch.float64
        return output.loss

    model = built(dtype=torch.float64, attn_implementation="eager")
    embedded = model.get_input_embeddings()(tokens()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(inputs_embeds=embedded).logits
    compare(model, loss)


@pytest.mark.filterwarnings(WHOLE)
def test_autocast_around_the_loss_alone_leaves_logits_as_they_were() -> None:
    def loss(model: nn.Module) -> Tensor:
        logits = model(input_ids=tokens()).logits
        with torch.autocast("cpu", torch.bfloat16):
            return unshifted(logits)

    compare(built(), loss)
    model = built()
    model.lm_head.requires_grad_(False)
    compare(model, loss)
    plain = model(input_ids=tokens()).logits
    attach(model)
    for read in (lambda logits: logits[0], lambda logits: logits.detach()[0]):
        logits = model(input_ids=tokens()).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(read(logits), plain[0])


def test_rows_per_tile() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert rows_per_tile(8192, 4096, 32000, cpu) == 1024  # 1048 would be as large as the hidden state: 8 tiles
    assert rows_per_tile(2048, 512, 32000, cpu) == 64
    assert rows_per_tile(2048, 512, 32000, cuda) == 256
    assert rows_per_tile(65, 512, 32000, cpu) == 33
    assert (rows_per_tile(10, 512, 32000, cpu), rows_per_tile(1, 8, 9, cpu)) == (10, 1)


@pytest.mark.parametrize(("dtype", "bytes_a_logit"), [(torch.float32, 4), (torch.bfloat16, 2 + 4)])
def test_a_logit_more_costs_its_bytes_in_one_tile_only(dtype: torch.dtype, bytes_a_logit: int) -> None:
    peaks = []
    for vocabulary in (3000, 4000):
        hidden, target = operands(dtype)[0], torch.randint(3000, (256,))
        head = FusedLinear(hidden.shape[1], vocabulary, bias=False, dtype=dtype).requires_grad_(False)

        def step(hidden: Tensor = hidden, target: Tensor = target, head: nn.Module = head) -> None:
            F.cross_entropy(head(hidden).float(), target).backward()

        step()
        hidden.grad = None
        report = measure(step)
        peaks.append(report.peak_bytes)
        assert report.retained_bytes == hidden.numel() * hidden.itemsize
    assert peaks[1] - peaks[0] == 64 * 1000 * bytes_a_logit


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2, soft-capped", "granite, scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_block_of_memory_holds_whole_logits(family: str, dtype: torch.dtype) -> None:
    # Soft-capping adds a few buffers of a tile, not of all positions.
    vocabulary, positions = 2000, 512
    model = built(family, dtype, vocab_size=vocabulary, max_position_embeddings=positions + 2, n_positions=positions)
    ids = tokens(1, positions, vocabulary)

    def largest() -> int:
        model.zero_grad()
        _, timeline = record_cpu(lambda: model(input_ids=ids, labels=ids).loss.backward())
        return max(block.size for block in timeline.blocks)

    assert largest() >= 4 * positions * vocabulary
    attach(model)
    attention = 2 * positions * positions * 4  # a mask or scores of two heads, the next largest
    assert largest() <= max(attention, 4 * 64 * vocabulary) < 4 * positions * vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_after_the_step(dtype: torch.dtype) -> None:
    model = built("gemma2, soft-capped", dtype)
    attach(model)

    def step() -> None:
        own_loss(model).backward()

    step()
    model.zero_grad()
    report = measure(step, model=model)
    assert report.retained_bytes == report.gradient_bytes > 0


def unshifted(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, VOCABULARY), tokens().view(-1))


def in_place(logits: Tensor) -> Tensor:
    logits[:, :, 7] = -3.0
    assert logits.div_(2.0) is logits
    return unshifted(logits)


def in_place_on_a_view(logits: Tensor) -> Tensor:
    view, copied = logits[:, :-1], logits[:, 1:].float().contiguous() * 0.5
    view.mul_(2.0)
    view[0] = 0.0
    shifted = F.cross_entropy(view.reshape(-1, VOCABULARY), tokens()[:, 1:].reshape(-1))
    return unshifted(logits) + shifted + F.cross_entropy(copied.view(-1, VOCABULARY), tokens()[:, 1:].reshape(-1))


def hooked(logits: Tensor) -> Tensor:
    logits.register_hook(lambda gradient: 3.0 * gradient)
    return unshifted(logits)


def hooked_part(logits: Tensor) -> Tensor:
    scaled = logits / 2
    loss = unshifted(scaled)
    scaled.register_hook(lambda gradient: 3.0 * gradient)
    return loss


def without_gradient(logits: Tensor) -> Tensor:
    with torch.no_grad():
        copied, view = logits.clone(), logits.view(-1, VOCABULARY)
    lost = unshifted(copied) + unshifted(logits.data) + unshifted(logits.detach())
    assert not lost.requires_grad
    return lost + F.cross_entropy(view, tokens().view(-1)) + logits.float().square().mean()


class Reversed(torch.autograd.Function):
    """A function with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -2.0 * gradient


# What users and trainers do with logits: (function, whether the logits still wait afterwards).
USES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "cross-entropy": (unshifted, True),
    "cross-entropy, a sum of floats": (
        lambda z: F.cross_entropy(z.double().flatten(0, 1), tokens().flatten(), reduction="sum"),
        True,
    ),
    "cross-entropy of a shifted copy": (
        lambda z: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, VOCABULARY), tokens()[:, 1:].reshape(-1)),
        True,
    ),
    "cross-entropy of capped, scaled rows": (
        lambda z: nn.CrossEntropyLoss()(((z[:2] / 3).tanh() * 3).view(-1, VOCABULARY), tokens(2).view(-1)),
        True,
    ),
    "cross-entropy of bounded rows": (lambda z: unshifted(z.tanh()), True),
    "values of scaled slices": (lambda z: ((z[:, 2:] / 3)[:, 1:].double() + 1).square().mean(), False),
    "one vocabulary for all positions": (lambda z: F.cross_entropy(z.view(3, -1), tokens()[:, 0]), False),
    "a function with a gradient of its own": (lambda z: unshifted(Reversed.apply(z)), False),
    "label smoothing": (lambda z: F.cross_entropy(z.flatten(0, 1), tokens().flatten(), label_smoothing=0.1), True),
    "class weights": (
        lambda z: F.cross_entropy(z.flatten(0, 1), tokens().flatten(), weight=torch.arange(1.0, VOCABULARY + 1)),
        True,
    ),
    "losses of tokens": (
        lambda z: F.cross_entropy(z.flatten(0, 1), tokens().flatten(), reduction="none").square().mean(),
        True,
    ),
    "probabilities as labels": (
        lambda z: F.cross_entropy(z.flatten(0, 1), torch.full((3 * LENGTH, VOCABULARY), 1 / VOCABULARY)),
        False,
    ),
    "cross-entropy in half precision": (lambda z: unshifted(z.bfloat16()).float(), False),
    "part of the vocabulary": (lambda z: F.cross_entropy(z[..., :50].flatten(0, 1), tokens().flatten() % 50), False),
    "classes along another dimension": (
        lambda z: F.cross_entropy(z.transpose(1, 2), tokens()),
        False,
    ),
    "log-probabilities": (lambda z: -z.log_softmax(-1).gather(-1, tokens()[..., None]).mean(), True),
    "two losses": (lambda z: unshifted(z) + z.logsumexp(-1).square().mean(), True),
    "label smoothing of weighed classes": (
        lambda z: F.cross_entropy(
            z.flatten(0, 1),
            labels().flatten(),
            weight=torch.arange(1.0, VOCABULARY + 1),
            label_smoothing=0.1,
            ignore_index=-100,
        ),
        True,
    ),
    "a sum of weighed classes": (
        lambda z: F.cross_entropy(
            z.flatten(0, 1), labels().flatten(), weight=torch.arange(1.0, VOCABULARY + 1), reduction="sum"
        ),
        True,
    ),
    "losses of log-probabilities": (lambda z: F.nll_loss(z.log_softmax(-1).flatten(0, 1), labels().flatten()), True),
    "label smoothing by hand": (
        lambda z: -0.9 * z.log_softmax(-1).gather(-1, tokens()[..., None]).mean() - 0.1 * z.log_softmax(-1).mean(),
        True,
    ),
    "entropy": (lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(), True),
    "entropy of parts": (
        lambda z: torch.cat(
            [-(c.exp() * c).sum(-1) for c in (p.log_softmax(-1) for p in z.reshape(-1, VOCABULARY).split(32))]
        ).mean(),
        True,
    ),
    "log-probabilities of rows": (
        lambda z: (
            torch.gather(z[:, :-1] / 0.7, dim=-1, index=tokens()[:, 1:, None])[..., 0]
            - torch.stack([torch.logsumexp(row, dim=-1) for row in z[:, :-1] / 0.7])
        ).mean(),
        True,
    ),
    "chosen positions": (lambda z: z[tokens() > 50].logsumexp(-1).mean() + z[1, 3:9].amax(-1).sum(), True),
    "accuracy beside the loss": (lambda z: unshifted(z) + (z.argmax(-1) == tokens()).float().mean(), True),
    "the largest": (lambda z: z.topk(5).values.square().mean() + z.max(-1).values.sum() + z.mean() - z.sum(), True),
    "a vector and a number added": (
        lambda z: unshifted((z + torch.linspace(-1, 1, VOCABULARY)) / torch.tensor(0.7)),
        True,
    ),
    "a trained temperature": (lambda z: unshifted(z / torch.tensor(0.7, requires_grad=True)), False),
    "one token of each": (lambda z: z[..., 7].square().mean(), False),
    "a product with itself": (lambda z: (z * z).mean() + (z - z.detach()).abs().sum() + (2 - z).tanh().sum(), False),
    "in place": (in_place, False),
    "in place on a view": (in_place_on_a_view, False),
    "a hook": (hooked, False),
    "a hook on part of them": (hooked_part, False),
    "without a gradient": (without_gradient, False),
}


@pytest.mark.parametrize("use", USES)
def test_any_use_of_logits_gives_what_plain_logits_give(use: str) -> None:
    function, waits = USES[use]
    model = built()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        compare(model, lambda m: function(m(input_ids=tokens()).logits))
    assert [warning.category for warning in seen] == [] if waits else [MaterializedLogitsWarning]


def gradient_of_logits(model: nn.Module, *more: Tensor) -> tuple[Tensor, ...]:
    output = model(input_ids=tokens(), labels=labels())
    return torch.autograd.grad(output.loss, [output.logits, *more])


@pytest.mark.filterwarnings(WHOLE)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2, soft-capped", "granite, scaled"])
def test_losses_are_differentiated_by_their_logits(family: str, together: bool) -> None:
    model = built(family)
    more = [model.get_output_embeddings().weight] if together else []
    expected = gradient_of_logits(model, *more)
    attach(model)
    for found, plain in zip(gradient_of_logits(model, *more), expected, strict=True):
        assert float((found - plain).norm()) <= 1e-6 * float(plain.norm())


@pytest.mark.filterwarnings(WHOLE)
@pytest.mark.parametrize("family", ["llama", "gemma2, soft-capped"])
def test_hooks_after_the_loss_and_kept_gradients(family: str) -> None:
    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        output = model(input_ids=tokens(), labels=labels())
        output.logits.register_hook(lambda gradient: 3.0 * gradient)
        output.logits.retain_grad()
        output.loss.backward()
        return output.logits.grad, model.get_input_embeddings().weight.grad.clone()

    model = built(family)
    expected = run()
    attach(model)
    for found, plain in zip(run(), expected, strict=True):
        assert float((found - plain).norm()) <= 1e-6 * float(plain.norm())


def test_what_makes_logits_whole_says_so_once() -> None:
    model = built()
    attach(model)
    text = r"Logits of shape \(3, 40, 97\) were made whole, 46,560 bytes.*fused_loss=False"
    with pytest.warns(MaterializedLogitsWarning, match=text):
        model(input_ids=tokens()).logits.exp().cumsum(-1)
    model(input_ids=tokens()).logits.exp().cumsum(-1)


def edited(model: nn.Module) -> None:
    model.lm_head.weight.data.mul_(-1.0)


def rows_swapped(model: nn.Module) -> None:
    model.lm_head.weight.data[[0, 1]] = model.lm_head.weight.data[[1, 0]].clone()


def stepped(model: nn.Module) -> None:
    torch.optim.AdamW(model.parameters(), 1e-3, fused=True).step()


def one_bit(model: nn.Module) -> None:
    model.lm_head.weight.data.view(torch.int32)[5, 7] ^= 1


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("change", [edited, rows_swapped, stepped, one_bit, loaded])
def test_logits_of_other_weights_are_never_read(change: Callable[[nn.Module], None]) -> None:
    model = built()
    attach(model)
    first, second = (model(input_ids=tokens(), labels=labels()) for _ in range(2))
    first.loss.backward()
    change(model)
    for read in (lambda z: z.cos(), lambda z: z.logsumexp(-1), unshifted):
        with pytest.raises(ModifiedTensorError, match=r"shape \(3, 40, 97\).*was modified in place"):
            read(second.logits)


@pytest.mark.parametrize("detached", [lambda z: z.detach(), lambda z: z.data, lambda z: z.data.view(-1, VOCABULARY)])
@pytest.mark.filterwarnings(WHOLE)
def test_detached_logits_are_leaves_of_their_own(detached: Callable[[Tensor], Tensor]) -> None:
    def gradient() -> Tensor:
        leaf = detached(model(input_ids=tokens()).logits).requires_grad_()
        unshifted(leaf).backward()
        return leaf.grad

    model = built()
    plain = gradient()
    attach(model)
    assert torch.equal(gradient(), plain)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings(WHOLE)
def test_logits_can_be_read_copied_and_saved() -> None:
    model = built()
    plain = model(input_ids=tokens()).logits.detach()

    def lazy() -> Tensor:
        return model(input_ids=tokens(), labels=labels()).logits

    attach(model)
    file = io.BytesIO()
    torch.save(lazy(), file)
    file.seek(0)
    copies = [torch.load(file), pickle.loads(pickle.dumps(lazy())), copy.deepcopy(lazy())]
    copies += [torch.tensor(lazy().tolist()), torch.from_numpy(lazy().data.numpy())]
    for found in copies:
        assert type(found) is Tensor and torch.equal(found.detach(), plain)
    assert copies[0].requires_grad
    with pytest.raises(RuntimeError, match=r"Can't call numpy\(\) on Tensor that requires grad"):
        lazy().numpy()
    assert repr(lazy().data) == repr(plain)
    logits = lazy()
    assert (logits.shape, logits.dtype, logits.device, logits.stride()) == (
        plain.shape,
        plain.dtype,
        plain.device,
        plain.stride(),
    )
    assert logits.requires_grad and not logits.is_leaf and logits.pending


@pytest.mark.filterwarnings(WHOLE)
def test_logits_after_the_optimizers_step() -> None:
    model = built()
    plain = model(input_ids=tokens()).logits.detach()
    attach(model)
    output = model(input_ids=tokens(), labels=labels())
    kept = output.logits.detach()
    output.logits = model(input_ids=tokens(), labels=labels()).logits
    output.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.equal(kept, plain)
    with pytest.raises(ModifiedTensorError, match=r"shape \(3, 40, 97\).*was modified in place.*fused_loss=False"):
        output.logits.sum()
    freed = model(input_ids=tokens(), labels=labels()).logits
    model.get_output_embeddings().weight.untyped_storage().resize_(0)
    with pytest.raises(ModifiedTensorError, match=r"shape \(3, 40, 97\).*had been freed.*fused_loss=False"):
        freed.sum()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_pass_is_possible_and_gradients_of_gradients_are_refused(
    dtype: torch.dtype, trained: bool
) -> None:
    model = built(dtype=dtype)
    model.lm_head.requires_grad_(trained)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    attach(model)
    loss = own_loss(model)
    first, second = (torch.autograd.grad(loss, weights, retain_graph=True) for _ in range(2))
    assert all(one.any() and torch.equal(one, two) for one, two in zip(first, second, strict=True))
    with pytest.raises(DoubleBackwardError, match=r"create_graph=True.*the loss head.*fused_loss=False"):
        torch.autograd.grad(loss, weights, create_graph=True)


@pytest.mark.filterwarnings(WHOLE)
def test_gradients_of_gradients_through_whole_logits() -> None:
    def loss(model: nn.Module) -> Tensor:
        first = model(input_ids=tokens()).logits.square().mean()
        return torch.autograd.grad(first, model.lm_head.weight, create_graph=True)[0].square().sum()

    compare(built(attn_implementation="eager"), loss)


@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
def test_labels_outside_of_the_vocabulary_are_refused(wrong: int) -> None:
    model = built()
    attach(model)
    with pytest.raises(DataError, match=rf"117 of 120 labels are outside.*first is {wrong}.*0 to 96, or -100"):
        own_loss(model, labels=torch.full_like(tokens(), wrong))


def test_attaching_and_detaching() -> None:
    model = built()
    names, head = list(model.state_dict()), model.lm_head
    attributes = set(vars(head))
    changes = attach(model)
    assert changes == [(head, "__class__", nn.Linear)] and type(head) is FusedLinear
    assert attach(model) == []
    assert list(model.state_dict()) == names and model.lm_head is head
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.lm_head) is FusedLinear
        assert torch.equal(own_loss(copied), own_loss(model))
        detach(copied)
        assert type(copied.lm_head) is nn.Linear
    for target, attribute, before in changes:
        setattr(target, attribute, before)
    assert type(head) is nn.Linear and set(vars(head)) == attributes
    detach(model)
    assert type(head) is nn.Linear


class OtherLinear(nn.Linear):
    """As quantised layers are."""


def test_heads_that_stay_as_they_are() -> None:
    assert attach(BertForSequenceClassification(BertConfig(**SHARED))) == []
    assert attach(nn.Linear(2, 3)) == []
    model = built()
    model.lm_head = OtherLinear(WIDTH, VOCABULARY)
    assert attach(model) == []
    adapted = get_peft_model(built(), LoraConfig(target_modules=["lm_head", "q_proj"]))
    assert attach(adapted) == []


@pytest.mark.parametrize("first", ["attach", "PEFT"])
@pytest.mark.parametrize("how", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}, {}])
def test_heads_under_peft(first: str, how: dict[str, Any]) -> None:
    def loss_and_gradients(fused: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = built()
        if fused and first == "attach":
            attach(model)
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"]} | how))
        if fused and first == "PEFT":
            attach(model)
        found = taken(model, own_loss)
        lazy = isinstance(model(input_ids=tokens()).logits, LazyLogits)
        assert lazy is (fused and "target_modules" not in how)
        detach(model)
        assert not any(isinstance(module, FusedLinear) for module in model.modules())
        return found

    (plain, expected), (fused, found) = (loss_and_gradients(fused) for fused in (False, True))
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


# What makes a head return ordinary logits.
OTHERS: dict[str, Callable[[nn.Module], Any]] = {
    "evaluation": lambda model: model.eval(),
    "nothing to train": lambda model: model.requires_grad_(False),
    "a hook after": lambda model: model.lm_head.register_forward_hook(lambda module, inputs, output: None),
    "a hook before": lambda model: model.lm_head.register_forward_pre_hook(lambda module, inputs: None),
    "a hook on gradients": lambda model: model.lm_head.register_full_backward_hook(lambda module, *gradients: None),
    "offloaded": lambda model: setattr(model.lm_head, "_hf_hook", object()),
    "a replica": lambda model: setattr(model.lm_head, "_is_replica", True),
}


@pytest.mark.parametrize("other", OTHERS)
def test_when_logits_are_ordinary(other: str) -> None:
    model = built()
    attach(model)
    assert isinstance(model(input_ids=tokens()).logits, LazyLogits)
    OTHERS[other](model)
    assert not isinstance(model(input_ids=tokens(), labels=labels()).logits, LazyLogits)


def test_logits_are_ordinary_without_a_gradient_and_of_other_tensors() -> None:
    hidden, target = torch.randn(5, WIDTH, requires_grad=True), torch.randint(VOCABULARY, (5,))
    head = FusedLinear(WIDTH, VOCABULARY)
    assert isinstance(head(hidden), LazyLogits)
    with torch.no_grad():
        assert type(head(hidden)) is Tensor
    assert type(head(TwoTensor(hidden.detach(), hidden.detach()))) is TwoTensor
    found = torch.func.grad(lambda inputs: F.cross_entropy(head(inputs), target))(hidden.detach())
    (expected,) = torch.autograd.grad(plain_head(hidden, head.weight, head.bias, target), hidden)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings(WHOLE)
def test_a_bias_gets_its_gradient_from_whole_logits() -> None:
    compare(built("bert, with a bias"), lambda model: model(input_ids=tokens()).logits.square().mean())


def test_a_compiled_model_keeps_the_plain_head() -> None:
    def loss(model: nn.Module) -> Tensor:
        output = torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens(), labels=labels())
        assert type(output.logits) is Tensor
        return output.loss

    compare(built(), loss)


# The compiler reads .grad of every input and silences the warning for plain tensors only.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_loss() -> None:
    loss = torch.compile(unshifted, backend="eager")
    compare(built(), lambda model: loss(model(input_ids=tokens()).logits))


def test_a_reversible_model_with_saved_tensors_elsewhere() -> None:
    model = meft.make_reversible(built(use_cache=False), fused_loss=False)
    compare(model, own_loss)
    with torch.autograd.graph.save_on_cpu():
        compare(built(), own_loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_model(reentrant: bool) -> None:
    def loss(model: nn.Module) -> Tensor:
        def run(embedded: Tensor) -> Tensor:
            return model(inputs_embeds=embedded, labels=labels()).loss

        embedded = model.get_input_embeddings()(tokens())
        return torch.utils.checkpoint.checkpoint(run, embedded, use_reentrant=reentrant)

    compare(built(), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_show_the_memory_of_one_tile(dtype: torch.dtype) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    vocabulary, positions = 5000, 1024
    peaks = []
    for fused in (False, True):
        with FakeTensorMode():
            torch.set_default_dtype(dtype)
            try:
                config = LlamaConfig(**SHARED | {"vocab_size": vocabulary, "max_position_embeddings": positions})
                model = AutoModelForCausalLM.from_config(config).train()
            finally:
                torch.set_default_dtype(torch.float32)
            if fused:
                attach(model)
            ids, tracker = torch.zeros(1, positions, dtype=torch.long), MemTracker()
            tracker.track_external(model)
            with tracker:
                model(input_ids=ids, labels=ids).loss.backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
        peaks.append(peak["Total"])
    plain, fused_peak = peaks
    logits = positions * vocabulary * 4
    assert plain > 2 * logits
    assert fused_peak < logits / 2


class Shapes(TorchDispatchMode):
    """Notes the shapes of all results, and their devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.seen |= {tuple(tensor.shape) for tensor in tensors}
        self.devices |= {tensor.device.type for tensor in tensors}
        return result


def test_fake_tensors_show_every_tile() -> None:
    with FakeTensorMode(), Shapes() as shapes:
        hidden, weight = torch.zeros(256, 8, requires_grad=True), torch.zeros(501, 8)
        tiled_cross_entropy(hidden, weight, None, torch.zeros(256, dtype=torch.long)).backward()
    assert (64, 501) in shapes.seen and (256, 501) not in shapes.seen


def test_observers_see_nothing_that_is_not_computed() -> None:
    model = built()
    attach(model)
    with Shapes() as shapes:
        unshifted(model(input_ids=tokens()).logits.float() * 2.0)
    assert shapes.devices == {"cpu"}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified:UserWarning")
def test_data_parallel_training(options: dict[str, Any], process_group: None) -> None:
    plain, expected = taken(built(), own_loss)
    model = built()
    attach(model)
    parallel = DistributedDataParallel(model, **options)
    for _ in range(2):
        parallel.zero_grad()
        output = parallel(input_ids=tokens(), labels=labels())
        output.loss.backward()
    assert output.logits.pending
    torch.testing.assert_close(output.loss.detach(), plain, rtol=1e-6, atol=0.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, VOCABULARY, (20,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(20) < index, -100)}


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}])
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_trainer_sees_no_difference(options: dict[str, Any], tmp_path: Path) -> None:
    def run(fused: bool) -> list[float]:
        model = built()
        if fused:
            attach(model)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            **options,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Rows(),
            eval_dataset=Rows(),
            compute_metrics=lambda seen: {"sum": float(seen.predictions.sum())},
        )
        trainer.train()
        found = trainer.evaluate()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 3
        return [*losses, found["eval_loss"], found["eval_sum"]]

    assert run(True) == pytest.approx(run(False), rel=2e-2 if "bf16" in options else 1e-5)


def test_reversible_models_take_their_losses_in_tiles_and_give_the_head_back() -> None:
    model = built()
    head = model.get_output_embeddings()
    assert type(meft.make_reversible(model).get_output_embeddings()) is FusedLinear
    meft.restore(model)
    assert model.get_output_embeddings() is head and type(head) is nn.Linear
    assert type(meft.make_reversible(model, fused_loss=False).get_output_embeddings()) is nn.Linear
    meft.restore(model)
    adapted = get_peft_model(model, meft.MeftConfig(modules_to_save=["lm_head"]))
    assert type(adapted.get_output_embeddings().modules_to_save["default"]) is FusedLinear
    assert not any(type(module) is FusedLinear for module in adapted.unload().modules())
    plain = get_peft_model(built(), meft.MeftConfig(fused_loss=False))
    assert type(plain.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "outputs", [("log_probs",), ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")]
)
@pytest.mark.parametrize("family", ["llama, tied", "gemma2, soft-capped", "granite, scaled", "cohere, scaled"])
def test_what_trl_takes_of_tokens(family: str, outputs: tuple[str, ...], dtype: torch.dtype) -> None:
    utils = pytest.importorskip("trl.trainer.utils")

    def loss(model: nn.Module) -> Tensor:
        found = model(input_ids=tokens(), labels=labels(), fused_lm_head=True)
        kept.append(found)
        return found.log_probs.square().mean() + (0.0 if found.entropy is None else found.entropy.square().mean())

    kept: list[Any] = []
    model = built(family, dtype)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=outputs)
    precise = dtype == torch.float32
    compare(model, loss, relative=1e-6 if precise else 2e-2)
    plain, fused = kept
    assert plain.keys() == fused.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-5)


def test_trls_head_takes_a_tile_of_memory_and_gives_others_theirs() -> None:
    """A token more in the vocabulary costs 64 rows of a few buffers; entropies that are not trained none backward."""
    utils = pytest.importorskip("trl.trainer.utils")
    peaks: dict[str, list[int]] = {"plain": [], "tiles": []}
    for vocabulary in (3000, 4000):
        model = built(vocab_size=vocabulary, max_position_embeddings=258)
        model.lm_head.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(False)
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        ids = tokens(1, 257, 3000)

        def step(model: nn.Module = model, ids: Tensor = ids) -> None:
            model.zero_grad()
            (-model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.mean()).backward()

        for name in peaks:
            if name == "tiles":
                attach(model)
            step()
            model.zero_grad()
            peaks[name].append(measure(step, model=model).peak_bytes)
    (plain, more), (tiled, tiled_more) = peaks["plain"], peaks["tiles"]
    assert tiled_more - tiled <= 64 * 1000 * 4 * 3
    assert more - plain >= 256 * 1000 * 4
