"""Compiled layers: one program in both directions, without a graph break, in no more memory."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaModel, Trainer, TrainingArguments

import meft
from meft import measure
from meft.backbone.layers import ReversibleLayer
from meft.engine.engine import observed_by
from meft.engine.tape import Tape
from meft.errors import ConfigError, ReconstructionError, UnsupportedModelError
from support import models
from support.peft_helpers import TASK_OF, assert_close, assert_equal, batch_of, llama, loss_of, taken

# What torch's own compiler imports, looks at, and says of a reader of compiled gradients.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

# Traces, splits and reorders a graph as inductor does, and needs no compiler of C++.
QUICK = "aot_eager"
BACKENDS = [
    pytest.param(QUICK),
    pytest.param("inductor", marks=[pytest.mark.slow] if shutil.which("g++") else pytest.mark.xfail(reason="no g++")),
]
LAYERS = 2


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small(dropout: float = 0.1) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    return llama(**sizes, attention_dropout=dropout, use_cache=False).train()


def ids(length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(3, models.VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def reversible(model: nn.Module, **options: Any) -> Any:
    return meft.make_reversible(model, **{"backward": "reversible", **options})


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, LlamaModel)).layers


def step(model: nn.Module, *lengths: int, called: Any = None) -> dict[str, Tensor]:
    """Gradients of as many forward passes, all alive when the first backward pass begins."""
    torch.manual_seed(1)
    called = model if called is None else called
    losses = [called(input_ids=ids(length), labels=ids(length)).loss for length in lengths or (7,)]
    for loss in losses:
        loss.backward()
    return {name.replace("_orig_mod.", ""): gradient for name, gradient in taken(model).items()}


class Rebuilt:
    """The largest difference of rebuilt streams from those of the forward pass."""

    def __init__(self) -> None:
        self.streams: dict[tuple[int, int], list[Tensor]] = {}
        self.worst, self.seen = 0.0, 0

    def passed(self, tape: Tape, depth: int, streams: tuple[Tensor, Tensor]) -> None:
        self.streams[id(tape), depth] = [stream.clone() for stream in streams]

    def rebuilt(self, tape: Tape, depth: int, streams: tuple[Tensor, Tensor]) -> None:
        self.seen += 1
        for found, wanted in zip(streams, self.streams[id(tape), depth], strict=True):
            self.worst = max(self.worst, float((found.double() - wanted.double()).abs().max()))


def after(model: Any, backend: str, **options: Any) -> Any:
    reversible(model, **options)
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    return model


def before(model: Any, backend: str, **options: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    return reversible(model, **options)


def wrapped_before(model: Any, backend: str, **options: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend=backend)
    return reversible(model, **options)


def wrapped_after(model: Any, backend: str, **options: Any) -> Any:
    reversible(model, **options)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend=backend)
    return model


def in_regions(model: Any, backend: str, **options: Any) -> Any:
    return compile_regions(reversible(model, **options), backend=backend)


def whole_model(model: Any, backend: str, **options: Any) -> Any:
    return torch.compile(reversible(model, **options), backend=backend)


IN_PLACE = [after, before, wrapped_before]
AROUND = [wrapped_after, in_regions, whole_model]


@pytest.mark.parametrize("form", IN_PLACE)
def test_compiled_layers_are_rebuilt_bit_for_bit_by_one_program(form: Callable[..., Any]) -> None:
    observer = Rebuilt()
    model = form(small(), QUICK)
    with observed_by(observer):
        found = step(model)
    assert observer.worst == 0 and observer.seen == LAYERS
    # One program for all layers, in both directions, and dropout in it: drawn again with the same numbers.
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    # Sums over where the streams meet have another order in ordinary autograd.
    assert_close(found, step(form(small(), QUICK, backward="cached")), relative=1e-6)
    assert_close(found, step(reversible(small())), relative=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", AROUND)
@pytest.mark.parametrize("backend", [QUICK])
def test_what_is_compiled_around_layers_compiles_them(form: Callable[..., Any], backend: str) -> None:
    model = small(dropout=0.0)
    called = form(model, backend)
    observer = Rebuilt()
    with observed_by(observer):
        found = step(model, called=called)
    assert observer.worst == 0 and observer.seen == LAYERS
    compiler = layers_of(model)[0]
    reversible_stack = getattr(compiler, "_orig_mod", compiler)._placement.reversible_stack
    # Compiled with the options of what is around, and every break is one that a layer asks for.
    assert [compiler.options["backend"].compiler_name for compiler in reversible_stack.compilers] == [backend]
    breaks = [reason for reason in counters["graph_break"] if "torch.compiler.disable" not in reason]
    assert breaks == [], breaks
    assert_close(found, step(reversible(small(dropout=0.0))), relative=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("granularity", "programs"), [("layer", 1), ("block", 2)])
def test_lora_in_bfloat16_with_dropout_by_layers_and_blocks(backend: str, granularity: str, programs: int) -> None:
    config = LoraConfig(r=4, lora_dropout=0.1, init_lora_weights=False, target_modules="all-linear")
    torch.manual_seed(3)
    model = get_peft_model(small().bfloat16(), config, autocast_adapter_dtype=False).train()
    reversible(model, granularity=granularity)
    for layer in layers_of(model):
        layer.compile(backend=backend, fullgraph=True)
    observer = Rebuilt()
    with observed_by(observer):
        assert len(step(model)) == LAYERS * 7 * 2
    assert observer.worst == 0 and observer.seen == LAYERS
    assert counters["stats"]["unique_graphs"] == programs and not counters["graph_break"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_passes_of_other_lengths_that_live_at_once_keep_their_programs(backend: str) -> None:
    observer = Rebuilt()
    model = after(small(), backend)
    with observed_by(observer):
        found = step(model, 7, 5, 9, 7)
        # One program for the first length, one for all others.
        assert counters["stats"]["unique_graphs"] == 2
        step(model, 6, 7)
    assert counters["stats"]["unique_graphs"] == 2
    assert observer.worst == 0 and observer.seen == 6 * LAYERS
    assert_close(found, step(after(small(), backend, backward="cached"), 7, 5, 9, 7), relative=1e-6)


@pytest.mark.parametrize(("dynamic", "programs"), [(True, 1), (False, 2)])
def test_a_choice_of_dynamic_shapes_is_kept(dynamic: bool, programs: int) -> None:
    model = reversible(small())
    for layer in model.model.layers:
        layer.compile(backend=QUICK, dynamic=dynamic)
    step(model, 7, 5)
    assert counters["stats"]["unique_graphs"] == programs


def test_modules_inside_a_layer_that_are_compiled_anew_between_the_passes_are_refused() -> None:
    model = reversible(small())
    for layer in model.model.layers:
        layer.mlp.compile(backend=QUICK)  # its own choice of dynamic shapes
    step(model, 7)
    with pytest.raises(
        ReconstructionError, match=r"Layer 1 of model.layers ran other compiled programs .*dynamic=True"
    ):
        step(model, 7, 5, 9)


def test_generators_are_left_as_they_are() -> None:
    model = after(small(), QUICK)
    loss = model(input_ids=ids(), labels=ids()).loss
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_generation_and_recorded_outputs_run_uncompiled() -> None:
    model = after(small(), QUICK)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids())
        model.generate(ids(), max_new_tokens=2, do_sample=False, pad_token_id=models.PAD)
    model.train()
    output = model(input_ids=ids(), output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    assert not counters["stats"]


def test_recorded_outputs_are_off_while_compiled_layers_run_only() -> None:
    model = after(small(), QUICK)
    step(model)
    assert len(model.eval()(input_ids=ids(), output_hidden_states=True).hidden_states) == LAYERS + 1


@pytest.mark.parametrize("form", [before, wrapped_before])
def test_restore_gives_back_compiled_layers(form: Callable[..., Any]) -> None:
    model = small()
    given: list[nn.Module] = []
    for index, layer in enumerate(model.model.layers):
        if form is before:
            layer.compile(backend=QUICK)
        else:
            model.model.layers[index] = torch.compile(layer, backend=QUICK)
        given.append(model.model.layers[index])
    meft.restore(reversible(model))
    assert all(a is b for a, b in zip(model.model.layers, given, strict=True))


def test_restore_sees_through_what_was_wrapped_afterwards() -> None:
    model = small()
    plain = list(model.model.layers)
    meft.restore(wrapped_after(model, QUICK))
    assert all(a is b for a, b in zip(model.model.layers, plain, strict=True))


def test_copies_of_compiled_models_train() -> None:
    model = after(small(dropout=0.0), QUICK)
    expected = step(model)
    assert_equal(step(copy.deepcopy(model)), expected)


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}])
def test_cuda_graphs_are_refused(options: dict[str, Any]) -> None:
    model = reversible(small())
    with pytest.raises(ConfigError, match=r'compiles with CUDA graphs.*"max-autotune-no-cudagraphs"'):
        model.model.layers[0].compile(**options)
    with pytest.raises(ConfigError, match=r"compile\(\) was given 'inductor' by position.*layer.compile\(backend="):
        model.model.layers[0].compile("inductor")


def test_layers_with_adapters_are_not_compiled() -> None:
    model = get_peft_model(models.build("bert", layers=1), meft.MeftConfig())
    layer = model.base_model.model.bert.encoder.layer[0]
    with pytest.raises(UnsupportedModelError, match=r"BertLayer with MEFT adapters.*torch.compile\(model\)"):
        layer.compile(backend=QUICK)
    batch = batch_of("bert")
    plain = model(**batch).loss
    compiled = torch.compile(model, backend="eager")(**batch).loss
    assert torch.equal(plain, compiled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("granularity", "tile_size", "backend"),
    [("layer", None, QUICK), ("block", None, QUICK), pytest.param("block", 32, "inductor", marks=BACKENDS[1].marks)],
)
def test_compiled_layers_take_no_more_memory(granularity: str, tile_size: int | None, backend: str) -> None:
    peaks = []
    for compiled in (False, True):
        config = LoraConfig(r=4, target_modules="all-linear")
        sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
        model = get_peft_model(llama(**sizes, use_cache=False).train(), config)
        reversible(model, granularity=granularity, tile_size=tile_size)
        for layer in layers_of(model) if compiled else ():
            layer.compile(backend=backend)
        peaks.append(peak_of(model, {"input_ids": ids(128), "labels": ids(128)}))
    assert peaks[1] <= peaks[0], peaks


def peak_of(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """The peak of activations of a second step, for which everything is compiled."""
    for _ in range(2):
        report = measure(lambda: model(**batch).loss.backward(), model=model)
        model.zero_grad(set_to_none=True)
    return report.activation_peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "bart", "opt"])
def test_layers_of_other_families_compile_without_a_break(family: str) -> None:
    model, batch = models.build(family, TASK_OF[family], layers=2, dropout=0.1).train(), batch_of(family)
    reversible(model)
    wrapped = [module for module in model.modules() if isinstance(module, ReversibleLayer)]
    for layer in wrapped:
        layer.compile(backend=QUICK, fullgraph=True)
    observer = Rebuilt()
    with observed_by(observer):
        torch.manual_seed(1)
        loss_of(model(**batch)).backward()
    assert observer.worst == 0 and observer.seen == len(wrapped)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_the_trainer_s_own_flag(tmp_path: Path) -> None:
    model = small(dropout=0.0)
    reversible(model)
    rows = [{"input_ids": ids()[0], "labels": ids()[0]}] * 2
    arguments = TrainingArguments(
        tmp_path,
        torch_compile=True,
        torch_compile_backend=QUICK,
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    assert Trainer(model, arguments, train_dataset=rows).train().training_loss > 0
    (compiler,) = layers_of(model)[0]._placement.reversible_stack.compilers
    assert compiler.options["backend"].compiler_name == QUICK and compiler._programs
