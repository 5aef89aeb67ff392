"""What passes between a model's loop and its layers besides the hidden state: in both directions, with gradients."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import meft
from meft.backbone.calls import CallArguments
from meft.errors import UnsupportedModelError
from support.peft_helpers import assert_close, taken
from support.stacks import WIDTH, Block, Loop, Stacked, hidden_state

BLACK_BOX = ("meft1", "meft2", "momentum")
IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))


def step(make: Callable[[], nn.Module], inputs: Any, **options: Any) -> dict[str, Tensor]:
    """Gradients of one step of a fresh model that was made reversible."""
    torch.manual_seed(0)
    model = meft.make_reversible(make().train(), **options)
    torch.manual_seed(1)
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    (output if isinstance(output, Tensor) else output.loss).sum().backward()
    return taken(model)


def assert_exact(make: Callable[[], nn.Module], inputs: Any, coupling: str = "momentum", **options: Any) -> None:
    found = [
        step(make, inputs, coupling=coupling, backward=backward, **options) for backward in ("reversible", "cached")
    ]
    assert_close(*found, relative=2e-6)


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes))


def albert(**options: Any) -> AlbertForSequenceClassification:
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    return AlbertForSequenceClassification(AlbertConfig(vocab_size=40, num_hidden_layers=5, **sizes, **options))


def mixtral(**options: Any) -> MixtralForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "router_aux_loss_coef": 1.0}
    config = MixtralConfig(vocab_size=40, num_hidden_layers=3, **sizes, **experts, **options)
    return MixtralForCausalLM(config)


def gemma3n() -> Gemma3nForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    extra = {"head_dim": 8, "vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    shared = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "altup_num_inputs": 2}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 3, "activation_sparsity_pattern": None}
    return Gemma3nForCausalLM(Gemma3nTextConfig(vocab_size=40, **sizes, **extra, **shared, **kinds))


CLASSES = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
WORDS = {"input_ids": IDS, "labels": IDS}


@pytest.mark.parametrize("coupling", BLACK_BOX)
def test_position_biases_pass_from_layer_to_layer(coupling: str) -> None:
    inputs = {"input_ids": IDS, "labels": IDS[:, :5].contiguous()}
    assert_exact(t5, inputs, coupling)
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert step(t5, inputs, coupling=coupling)[name].abs().sum() > 0


@pytest.mark.parametrize("coupling", BLACK_BOX)
def test_a_loss_on_router_logits_reaches_the_routers(coupling: str) -> None:
    with_loss = step(lambda: mixtral(output_router_logits=True), WORDS, coupling=coupling)
    without = step(mixtral, WORDS, coupling=coupling)
    assert_exact(lambda: mixtral(output_router_logits=True), WORDS, coupling)
    assert all(not torch.equal(with_loss[name], without[name]) for name in without if name.endswith("gate.weight"))


def test_keys_and_values_that_later_layers_share_get_gradients() -> None:
    assert_exact(gemma3n, WORDS)


@pytest.mark.parametrize("coupling", BLACK_BOX)
@pytest.mark.parametrize("options", [{}, {"inner_group_num": 2}, {"num_hidden_groups": 2}])
def test_albert_runs_its_layers_many_times(options: dict[str, int], coupling: str) -> None:
    assert_exact(lambda: albert(hidden_dropout_prob=0.1, **options), CLASSES, coupling)


def test_albert_keeps_one_pair_of_streams_for_all_its_calls() -> None:
    peaks = {}
    for layers in (4, 8):
        config = AlbertConfig(
            vocab_size=40, embedding_size=16, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4
        )
        config.intermediate_size = 64
        model = meft.make_reversible(AlbertForSequenceClassification(config).train(), "meft1", lam=1.0)

        def run(model: nn.Module = model) -> None:
            model(**CLASSES).loss.backward()

        run()
        peaks[layers] = meft.measure(run, model=model).activation_peak_bytes
    # Nothing of the size of a hidden state (2 x 7 x 32 float32) is kept by four more calls.
    assert peaks[8] - peaks[4] < 4 * 2 * 7 * 32 * 4


def test_an_interrupted_pass_through_a_repeated_layer_does_no_harm() -> None:
    torch.manual_seed(0)
    model = meft.make_reversible(albert().train())
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    layer(hidden_state(32))
    expected = step(albert, CLASSES)
    torch.manual_seed(1)
    model(**CLASSES).loss.backward()
    assert_close(taken(model), expected, relative=1e-6)


def test_frozen_layers_that_also_run_later_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frozen_layers=1 cannot be had .* runs 1 layers 5 times"):
        meft.make_reversible(albert(), frozen_layers=1)


class Twofold(Block):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states), torch.tanh(hidden_states)


class Named(Block):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return {"hidden": super().forward(hidden_states)}


def tuple_loop(model: Stacked, hidden: Tensor) -> Tensor:
    for layer in model.layers:
        hidden, _ = layer(hidden)
    return hidden


@pytest.mark.parametrize(
    "block, loop, message",
    [
        (Twofold, tuple_loop, r"layers\.0 of Stacked returns a second tensor of the hidden state's shape \(2, 3, 8\)"),
        (Named, None, r"layers\.0 of Stacked returns a dict where a reversible stack needs the hidden state"),
    ],
)
def test_layers_that_do_not_hand_on_one_hidden_state_are_refused(
    block: type[Block], loop: Loop | None, message: str
) -> None:
    model = Stacked([block() for _ in range(2)], *([loop] if loop else []))
    meft.make_reversible(model.train())
    with pytest.raises(UnsupportedModelError, match=message):
        model(hidden_state())


class Sharing(Block):
    """Writes what it computed into a mapping, for later layers; the last one reads it."""

    def forward(self, hidden_states: Tensor, shared: Any = None, **kwargs: Any) -> Any:
        if "key" in shared:
            return hidden_states + shared["key"] * torch.sigmoid(self.mlp(hidden_states))
        shared["key"] = self.mlp(hidden_states)
        return hidden_states + torch.tanh(shared["key"])


@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_what_a_layer_writes_into_a_mapping_comes_from_its_node(mapping: Callable[[], Any]) -> None:
    def loop(model: Stacked, hidden: Tensor) -> Tensor:
        shared = mapping()
        for layer in model.layers:
            hidden = layer(hidden, shared=shared)
        return hidden + shared["key"]

    assert_exact(lambda: Stacked([Sharing() for _ in range(3)], loop), hidden_state())


class Leaning(Block):
    """Uses a weight that is not its own and that nobody hands to it."""

    foreign: list[Tensor]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states) * self.foreign[0]


def test_a_weight_from_elsewhere_would_get_no_gradient() -> None:
    weight = nn.Parameter(torch.ones(WIDTH))

    def make() -> Stacked:
        blocks = [Leaning() for _ in range(2)]
        for block in blocks:
            block.foreign = [weight]
        return Stacked(blocks)

    with pytest.raises(UnsupportedModelError, match=r"A layer of layers uses a tensor of shape \(8,\) .* stacks="):
        step(make, hidden_state())
    weight.requires_grad_(False)
    assert_exact(make, hidden_state())


class Keeping(Block):
    """Uses in its second run what it kept from the first."""

    kept: Any = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.kept is None:
            self.kept = torch.tanh(self.mlp(self.norm(hidden_states)))
        return hidden_states + self.kept


def test_what_a_first_run_kept_would_lead_gradients_astray() -> None:
    with pytest.raises(UnsupportedModelError, match=r"something that an earlier layer or run left behind"):
        step(lambda: Stacked([Keeping()]), hidden_state())


class Normed(Block):
    """Updates running statistics in training."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = self.batch_norm(hidden_states.flatten(0, 1)).view(hidden_states.shape)
        return super().forward(hidden_states) + normed


def test_running_statistics_are_updated_once() -> None:
    torch.manual_seed(0)
    model = meft.make_reversible(Stacked([Normed() for _ in range(3)]).train())
    model(hidden_state()).sum().backward()
    buffers = dict(model.named_buffers())
    assert {int(value) for name, value in buffers.items() if name.endswith("batches_tracked")} == {1}
    torch.manual_seed(0)
    cached = meft.make_reversible(Stacked([Normed() for _ in range(3)]).train(), backward="cached")
    cached(hidden_state()).sum().backward()
    for name, value in cached.named_buffers():
        assert torch.equal(value, buffers[name])


class Remembering(Block):
    def forward(self, hidden_states: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        assert past_key_values is None and not use_cache
        return super().forward(hidden_states)


class Cache:
    def get_seq_length(self) -> int:
        return 0


def test_a_cache_given_by_position_is_taken_out_too() -> None:
    def loop(model: Stacked, hidden: Tensor) -> Tensor:
        for layer in model.layers:
            hidden = layer(hidden, Cache(), True)
        return hidden

    assert_exact(lambda: Stacked([Remembering() for _ in range(2)], loop), hidden_state())


def test_the_hidden_state_may_be_given_by_name() -> None:
    def loop(model: Stacked, hidden: Tensor) -> Tensor:
        for layer in model.layers:
            hidden = layer(hidden_states=hidden)
        return hidden

    assert_exact(lambda: Stacked([Block() for _ in range(2)], loop), hidden_state())


def test_a_call_without_a_hidden_state_is_refused() -> None:
    def loop(model: Stacked, hidden: Tensor) -> Tensor:
        return model.layers[0]([hidden])

    model = meft.make_reversible(Stacked([Block()], loop).train())
    with pytest.raises(UnsupportedModelError, match=r"layers\.0 of Stacked, a Block, is called with a list as"):
        model(hidden_state())


def half(model: Stacked, hidden: Tensor) -> Tensor:
    for layer in model.layers[:2]:
        hidden = layer(hidden)
    return hidden


def backwards(model: Stacked, hidden: Tensor) -> Tensor:
    for layer in reversed(model.layers):
        hidden = layer(hidden)
    return hidden


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "loop, message",
    [
        (half, r"Stacked ran 2 of the 3 layers of layers, .* and returned\. .*gives its hidden state after the last"),
        (backwards, r"Stacked called layers\.2 after no layer.*runs every layer once, in order"),
    ],
)
def test_loops_that_do_more_or_less_are_refused(loop: Loop, message: str, training: bool) -> None:
    model = meft.make_reversible(Stacked([Block() for _ in range(3)], loop).train(training))
    with pytest.raises(UnsupportedModelError, match=message):
        model(hidden_state())


def test_the_hook_that_watches_the_loop_is_taken_off_again() -> None:
    model = meft.make_reversible(Stacked([Block() for _ in range(3)], half))
    meft.restore(model)
    assert not model._forward_hooks
    model(hidden_state())


@pytest.mark.parametrize("given", [[1, 2], ([1, 2],)])
def test_what_a_block_changes_in_its_arguments_is_whole_for_the_next_run(given: Any) -> None:
    seen: list[Any] = []

    def block(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        (changed,) = [leaf for leaf in (args[0], *args[0]) if isinstance(leaf, list)]
        seen.append(list(changed))
        changed.clear()
        return hidden

    function = CallArguments((given,), {}, "a layer").function("F", block)
    for _ in range(2):
        function(torch.zeros(2), ())
    assert seen == [[1, 2], [1, 2]]
