from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meft.engine import switches
from meft.engine.arithmetic import AutomaticGrid
from meft.engine.couplings import make_coupling
from meft.engine.engine import LayerCall, Tape, finish, run_layer
from meft.engine.replay import Snapshot
from meft.engine.switches import compared_since, read_compared, read_switches
from meft.errors import ReconstructionError, UnsupportedModelError

CPU = torch.device("cpu")

# What a user's program may change between the passes, as it does so.
CHANGES: dict[str, Any] = {
    "order of attention backends": lambda: torch._C._set_sdp_priority_order([0, 1, 2, 3, 4]),
    "flash attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "attention's reduced precision": lambda: torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True),
    "float32 precision": lambda: torch.set_float32_matmul_precision("medium"),
    "TF32 of convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "TF32 of products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "bfloat16 in oneDNN": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "float16 sums": lambda: setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    "bfloat16 sums": lambda: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "float16 accumulation": lambda: setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
    "cuDNN benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "cuDNN determinism": lambda: setattr(torch.backends.cudnn, "deterministic", True),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "oneDNN": lambda: torch._C._set_mkldnn_enabled(False),
}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = read_switches()
    yield
    switches._put(before)
    assert read_switches() == before


@pytest.mark.parametrize("what", CHANGES)
def test_a_second_call_finds_every_switch_as_it_was(what: str) -> None:
    before = read_switches()
    snapshot = Snapshot.take(CPU)
    CHANGES[what]()
    changed = read_switches()
    assert changed != before, "the change is not among the switches"
    with snapshot.replayed():
        assert read_switches() == before
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    assert read_switches() == changed


def test_switches_that_a_processor_lacks_are_there_and_set_by_all_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _, _ in switches._SWITCHES]
    assert {"_get_blas_preferred_backend", "_get_linalg_preferred_backend", "cuda rnn"} <= {*names}
    held: list[Any] = [(True, False)]
    monkeypatch.setattr(switches, "_C", SimpleNamespace(read=lambda: held[0], write=lambda *v: held.__setitem__(0, v)))
    monkeypatch.setattr(switches, "_SWITCHES", tuple(switches._pair("read", "write")))
    snapshot = Snapshot.take(CPU)
    held[0] = (False, False)
    with snapshot.replayed():
        assert held == [(True, False)]
    assert held == [(False, False)] and list(switches._pair("missing", "write")) == []


def test_switches_are_put_back_when_a_call_fails() -> None:
    snapshot = Snapshot.take(CPU)
    torch.backends.cudnn.benchmark = True
    with pytest.raises(KeyError), snapshot.replayed():
        raise KeyError
    assert torch.backends.cudnn.benchmark


class Scaled(nn.Module):
    """As modules of Transformer Engine keep their scales, which are updated between the passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.fp8_meta: dict[str, Any] = {"recipe": None, "scaling_fwd": SimpleNamespace(scale=torch.ones(1))}

    def forward(self, hidden: Tensor, outside: Any) -> Tensor:
        return hidden + self.linear(hidden) * self.fp8_meta["scaling_fwd"].scale


def output_of(block: Scaled) -> Tensor:
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tape = Tape(make_coupling("momentum"), AutomaticGrid(), hidden)
    run_layer(tape, LayerCall({"F": block}, tuple(block.parameters()), modules=tuple(block.modules())), reversible=True)
    return finish(tape)


def test_scales_that_changed_are_named() -> None:
    block = Scaled()
    output_of(block).sum().backward()
    output = output_of(block)
    block.fp8_meta["scaling_fwd"].scale.mul_(2)
    with pytest.raises(ReconstructionError, match="than in the forward pass: the FP8 scales of its modules changed in"):
        output.sum().backward()


def test_tunable_operators_that_changed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = [True]
    monkeypatch.setattr(torch._C, "_cuda_tunableop_is_enabled", lambda: True, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_tunableop_tuning_is_enabled", lambda: tuning[0], raising=False)
    before = read_compared(())
    assert compared_since(before, ()) == ""
    tuning[0] = False
    assert compared_since(before, ()) == "tunable operators (torch.cuda.tunable)"


# --- Synchronisations -------------------------------------------------------------------------------------------------

# How Python looks at a number that a device has computed.
LOOKS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero")
STATE = torch.get_rng_state().shape


@contextmanager
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Notes how often a number is looked at; generators' states lie on the processor in any case."""
    found: list[str] = []
    inside = [0]
    with monkeypatch.context() as patch:
        for name in LOOKS:
            original = getattr(Tensor, name)

            def look(tensor: Tensor, *args: Any, name: str = name, original: Any = original, **keywords: Any) -> Any:
                if tensor.shape != STATE and not inside[0]:
                    found.append(name)
                inside[0] += 1
                try:
                    return original(tensor, *args, **keywords)
                finally:
                    inside[0] -= 1

            patch.setattr(Tensor, name, look)
        for name in ("equal", "allclose", "is_nonzero"):
            original = getattr(torch, name)

            def compare(one: Tensor, *rest: Any, name: str = name, original: Any = original) -> Any:
                if one.shape != STATE:
                    found.append(name)
                return original(one, *rest)

            patch.setattr(torch, name, compare)
        yield found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, outside: Any) -> Tensor:
        return hidden + nn.functional.dropout(self.linear(hidden), 0.1, self.training)


@pytest.mark.parametrize("name", ["meft1", "meft2", "meft3", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [None, 4])
def test_a_step_waits_for_the_device_once_and_its_forward_pass_never(
    name: str, dtype: torch.dtype, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [Block().to(dtype) for _ in range(8)]
    hidden = torch.randn(2, 9, 8, dtype=dtype).requires_grad_()
    sign = {"sign": "random"} if name == "momentum" else {}
    with looks(monkeypatch) as found:
        tape = Tape(make_coupling(name, **sign), AutomaticGrid(), hidden)
        for index in range(4):
            functions = dict(zip(("F", "G"), blocks[2 * index : 2 * index + 2], strict=True))
            parameters = tuple(p for block in functions.values() for p in block.parameters())
            sizes = {} if size is None else {"F": size, "G": size}
            layer = LayerCall(functions, parameters, modules=tuple(functions.values()), tile_sizes=sizes)
            run_layer(tape, layer, reversible=True)
        output = finish(tape)
        assert found == []
        with torch.no_grad():
            evaluated = Tape(make_coupling(name), AutomaticGrid(), hidden.detach(), training=False)
            run_layer(evaluated, layer, reversible=True)
            finish(evaluated)
        assert found == []
        output.sum().backward()
    assert found == ["tolist"]
    assert hidden.grad is not None


def test_the_recording_of_a_cuda_graph_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedModelError, match="CUDA graph is being recorded"):
        Tape(make_coupling("momentum"), AutomaticGrid(), torch.randn(2, 3, 4))
    with torch.no_grad():
        Tape(make_coupling("momentum"), AutomaticGrid(), torch.randn(2, 3, 4), training=False)
