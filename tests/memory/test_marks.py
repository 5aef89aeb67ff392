"""What a step says it is doing."""

from __future__ import annotations

import torch
from transformers import AlbertConfig, AlbertModel

import meft
from meft.memory.measurement.marks import FORWARD, REVERSIBLE, marks_go_to, watched


def test_a_layer_that_runs_many_times_is_marked_by_the_call() -> None:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=20,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    model = meft.make_reversible(AlbertModel(config), cached_layers=1).train()
    marks: list[str] = []
    with marks_go_to(marks.append), watched(model):
        model(torch.zeros(1, 4, dtype=torch.long)).last_hidden_state.sum().backward()
    passes = [mark for mark in marks if mark.startswith(f"{FORWARD} 0")]
    assert passes == [f"{FORWARD} 0.0 {REVERSIBLE}"] * 3 + [f"{FORWARD} 0.0"]
