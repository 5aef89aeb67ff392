from __future__ import annotations

import torch
from torch import nn

from meft.engine.replay import Snapshot, requiring_grad

CPU = torch.device("cpu")


def test_random_numbers_repeat_and_the_surrounding_state_stays() -> None:
    snapshot = Snapshot.take(CPU)
    drawn = torch.rand(3)
    torch.rand(5)
    before = torch.get_rng_state()
    with snapshot.replayed():
        assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_surrounding_state_stays_when_the_call_fails() -> None:
    snapshot, before = Snapshot.take(CPU), torch.get_rng_state()
    try:
        with torch.autocast("cpu", torch.bfloat16), snapshot.replayed():
            torch.rand(3)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_generator_states_are_dropped_where_nothing_was_drawn() -> None:
    quiet = Snapshot.take(CPU)
    torch.ones(3).sum()
    assert quiet.settled().rng is None
    noisy = Snapshot.take(CPU)
    torch.rand(1)
    assert noisy.settled().rng is not None


def test_autocast_is_put_back_as_it_was() -> None:
    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        inside = Snapshot.take(CPU)
    outside = Snapshot.take(CPU)
    with inside.replayed():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert not torch.is_autocast_cache_enabled()
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16), outside.replayed():
        assert not torch.is_autocast_enabled("cpu")


def test_training_flags_are_replayed_one_by_one() -> None:
    modules = nn.ModuleList([nn.Dropout(), nn.Dropout()])
    modules[1].eval()
    snapshot = Snapshot.take(CPU, modules)
    modules.eval()
    with snapshot.replayed():
        assert [module.training for module in modules] == [True, False]
    assert [module.training for module in modules] == [False, False]


def test_attention_kernels_are_replayed() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        snapshot = Snapshot.take(CPU)
    assert torch.backends.cuda.flash_sdp_enabled()
    with snapshot.replayed():
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_requiring_grad_is_for_the_moment() -> None:
    on, off = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)
    with requiring_grad([on, off]):
        assert on.requires_grad and off.requires_grad
    assert on.requires_grad and not off.requires_grad
