"""Residues on the host: the same bits, no byte a layer on the device, and each copy there before it is asked for."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import meft
from meft.engine.host import HostStore
from meft.errors import ConfigError

WAYS = (
    {"coupling": "meft1"},
    {"coupling": "meft2", "anchor_every": 2},
    {"coupling": "meft3"},
    {"coupling": "momentum", "tile_size": 16},
)


def model(layers: int, dropout: float = 0.1, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, vocab_size=64)
    plain = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).bfloat16()
    tuned = get_peft_model(plain, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return meft.make_reversible(tuned.train(), **options)


def gradients(trained: torch.nn.Module, tokens: int = 48) -> dict[str, torch.Tensor]:
    ids = torch.arange(2 * tokens).reshape(2, tokens) % 64
    torch.manual_seed(1)
    trained(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}


def measured(layers: int, residues: str) -> meft.MemoryReport:
    trained = model(layers, dropout=0.0, residues=residues, gamma=0.25)
    return meft.measure(lambda: gradients(trained, 256) and None, model=trained)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["coupling"])
def test_gradients_are_those_of_residues_on_the_device_bit_for_bit(way: dict[str, Any]) -> None:
    device = gradients(model(5, **way))
    host = gradients(model(5, residues="host", **way))
    assert device and device.keys() == host.keys()
    assert all(torch.equal(device[name], host[name]) for name in device)


def test_a_further_layer_adds_nothing_to_the_device_and_its_residues_to_the_host() -> None:
    few, more, device = measured(6, "host"), measured(7, "host"), measured(7, "device")
    # But for its checksum, its magnitude and whether it differed: one number each.
    assert more.activation_peak_bytes - few.activation_peak_bytes == 8 + 4 + 1
    assert more.activation_peak_bytes < device.activation_peak_bytes
    # One residue a layer: two bits an element at gamma 1/4.
    assert more.host_peak_bytes - few.host_peak_bytes == 2 * 256 * 32 * 2 // 8
    assert more.host_peak_bytes == 7 * 2 * 256 * 32 * 2 // 8
    assert device.host_peak_bytes == 0
    # The residues of the layer that is undone, and of the next, are on the device.
    assert more.activation_causes["residues"] <= 2 * 2 * 256 * 32 * 2 // 8


def test_estimate_says_what_lies_on_the_host() -> None:
    config = model(6).get_base_model().config
    asked: dict[str, Any] = dict(method="lora+momentum", batch_size=2, seq_len=256, gamma=0.25, device="cpu")
    report = meft.estimate(config, residues="host", **asked)
    assert report.host_peak_bytes == measured(6, "host").host_peak_bytes
    assert meft.estimate(config, **asked).host_peak_bytes == 0


def test_a_checkpoint_around_the_stack_finds_its_residues() -> None:
    def run(residues: str) -> torch.Tensor:
        trained = model(3, residues=residues)
        hidden = torch.linspace(-1, 1, 2 * 16 * 32, dtype=torch.bfloat16).reshape(2, 16, 32).requires_grad_()
        inner = trained.get_base_model().model
        output = torch.utils.checkpoint.checkpoint(
            lambda given: inner(inputs_embeds=given).last_hidden_state, hidden, use_reentrant=False
        )
        output.float().square().sum().backward()
        assert hidden.grad is not None
        return hidden.grad

    assert torch.equal(run("host"), run("device"))


def test_copies_are_under_way_before_they_are_asked_for_and_run_beside_the_computation() -> None:
    store, events = HostStore(torch.device("cpu")), []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    class Module:
        now = Stream("main")

        def current_stream(self, device: torch.device) -> Stream:
            return self.now

        @contextmanager
        def stream(self, other: Stream):
            before, self.now = self.now, other
            yield
            self.now = before

    class Watched(HostStore):
        _pinned = False

        def _fetched(self, parcel: Any) -> tuple[torch.Tensor, ...]:
            events.append(f"fetch {parcel.level}")
            return super()._fetched(parcel)

    store = Watched(torch.device("cpu"))
    kept = {level: store.put(level, [torch.full((8,), level, dtype=torch.uint8)]) for level in (1, 2, 3)}
    store._module, store._stream = Module(), Stream("copies")
    for level in (3, 2, 1):
        events.append(f"take {level}")
        # Record_stream knows real streams alone.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "record_stream", lambda self, stream: events.append(f"kept for {stream.name}"))
            (found,) = store.take(level, kept[level])
        assert found.tolist() == [level] * 8
        assert found.untyped_storage().data_ptr() != kept[level][0].untyped_storage().data_ptr()
    waits = ["main waits for copies", "kept for main"]
    assert events == ["take 3", "fetch 3", *waits, "fetch 2", "take 2", *waits, "fetch 1", "take 1", *waits]


def test_what_is_no_place_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"residues='disk'.*'device'.*'host'"):
        model(2, residues="disk")
