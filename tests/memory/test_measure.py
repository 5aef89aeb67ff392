import gc
import subprocess
import sys

import pytest
import torch
from torch import nn

from meft.errors import ConfigError, MeftError
from meft.memory import MemoryReport, measure

FLOAT = 4  # bytes of a float32; the CPU allocator does not round, so every count below is exact


def stack(depth, width):
    layers = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers)


def test_one_tensor_that_is_returned():
    report = measure(lambda: torch.empty(1001, dtype=torch.float16))

    assert report.peak_bytes == 2002
    assert report.retained_bytes == 2002
    assert report.result.shape == (1001,)
    assert report.device == torch.device("cpu")


def test_one_tensor_that_is_dropped():
    def step():
        torch.empty(1000)

    report = measure(step)

    assert (report.peak_bytes, report.retained_bytes, report.result) == (1000 * FLOAT, 0, None)


def test_nothing_allocated():
    report = measure(lambda: 3)

    assert (report.peak_bytes, report.activation_peak_bytes, report.retained_bytes) == (0, 0, 0)
    assert report.result == 3


def test_earlier_tensors_are_freed_before_later_ones_come():
    def step():
        a = torch.empty(1000)
        b = torch.empty(500)  # 1500 live
        del a  # 500
        c = torch.empty(1200)  # 1700: the peak, though 2700 were allocated in all
        del b, c
        return torch.empty(10)

    report = measure(step)

    assert report.peak_bytes == 1700 * FLOAT
    assert report.retained_bytes == 10 * FLOAT


def test_views_cost_nothing():
    report = measure(lambda: torch.empty(64, 64).t().reshape(-1, 8, 64)[:2])

    assert report.retained_bytes == 64 * 64 * FLOAT


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_the_graph_of_a_linear_relu_stack_holds_one_activation_a_layer(depth):
    width, batch = 16, 4
    model, inputs = stack(depth, width), torch.randn(batch, width)

    report = measure(lambda: model(inputs))

    # ReLU keeps its output, which is also what the next Linear keeps; the output of Linear dies once ReLU has run.
    assert report.retained_bytes == depth * batch * width * FLOAT
    assert report.peak_bytes == (depth + 1) * batch * width * FLOAT


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_gradients_are_set_apart_from_activations(depth):
    width, batch = 16, 4
    model, inputs = stack(depth, width), torch.randn(batch, width)

    report = measure(lambda: model(inputs).sum().backward(), model=model)

    weights = depth * (width * width + width) * FLOAT
    activation = batch * width * FLOAT
    scalars = 2 * FLOAT  # the loss and its gradient
    assert report.gradient_bytes == report.retained_bytes == weights
    # The last ReLU's gradient beside every stored activation: the first moment of the backward pass.
    assert report.activation_peak_bytes == (depth + 1) * activation + scalars
    # All gradients exist once the first layer's are made. Of activations the first ReLU's output, its gradient and
    # the loss's gradient are left then, and the loss, which the caller of backward() holds.
    assert report.peak_bytes == max((depth + 1) * activation, weights + activation) + scalars


def test_parameters_may_be_chosen():
    model, inputs = stack(2, 16), torch.randn(4, 16)

    report = measure(lambda: model(inputs).sum().backward(), parameters=model[0].parameters())

    assert report.gradient_bytes == (16 * 16 + 16) * FLOAT
    assert report.retained_bytes == 2 * report.gradient_bytes


def test_gradients_that_existed_before_are_not_counted():
    model, inputs = stack(2, 16), torch.randn(4, 16)
    step = lambda: model(inputs).sum().backward()  # noqa: E731 - the same step twice
    step()

    report = measure(step, model=model)

    assert (report.gradient_bytes, report.retained_bytes) == (0, 0)


def test_a_gradient_shared_by_views_counts_once():
    weights = [nn.Parameter(torch.zeros(8)) for _ in range(2)]

    def step():
        flat = torch.ones(16)
        for weight, gradient in zip(weights, flat.split(8), strict=True):
            weight.grad = gradient

    assert measure(step, parameters=weights).gradient_bytes == 16 * FLOAT


def test_optimizer_state_is_set_apart():
    model, inputs = stack(2, 16), torch.randn(4, 16)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model(inputs).sum().backward()
        optimizer.step()

    report = measure(step, model=model, optimizer=optimizer)

    weights = sum(weight.numel() for weight in model.parameters()) * FLOAT
    counters = len(list(model.parameters())) * FLOAT
    assert report.gradient_bytes == weights
    assert report.optimizer_bytes == 2 * weights + counters
    assert report.retained_bytes == report.gradient_bytes + report.optimizer_bytes


def test_the_same_step_gives_the_same_figures():
    model, inputs = stack(4, 32), torch.randn(8, 32)

    def figures():
        model.zero_grad()
        report = measure(lambda: model(inputs).square().mean().backward(), model=model)
        return report.peak_bytes, report.activation_peak_bytes, report.retained_bytes, report.gradient_bytes

    assert len({figures() for _ in range(4)}) == 1


def test_reference_cycles_are_retained_every_time():
    def step():
        cycle = [torch.empty(1000)]
        cycle.append(cycle)
        del cycle
        return [[] for _ in range(20_000)]  # enough new containers to start a collection, were it not held back

    assert [measure(step).retained_bytes for _ in range(3)] == [1000 * FLOAT] * 3
    assert gc.isenabled()


def test_releases_of_older_memory_do_not_lower_the_peak():
    # The profiler knows the size of what an earlier measurement saw allocated, and would report its release.
    older = [measure(lambda: torch.empty(5000)).result]

    def step():
        older.clear()
        torch.empty(1000)

    report = measure(step)

    assert (report.peak_bytes, report.retained_bytes) == (1000 * FLOAT, 0)


def test_exceptions_propagate_and_leave_nothing_behind():
    def step():
        torch.empty(100)
        raise KeyError("from the step")

    with pytest.raises(KeyError, match="from the step"):
        measure(step)

    assert gc.isenabled()
    assert not torch.autograd._profiler_enabled()
    assert measure(lambda: torch.empty(1000)).peak_bytes == 1000 * FLOAT


def test_garbage_collection_stays_off_where_it_was_off():
    gc.disable()
    try:
        measure(lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_profiler_writes_nothing():
    program = (
        "import os, torch; from meft.memory import measure; measure(lambda: torch.empty(9)); "
        "assert 'KINETO_LOG_LEVEL' not in os.environ"
    )

    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)

    # bitsandbytes, which PEFT imports where it is installed, says which of its kernels it lacks.
    said = [line for line in run.stderr.splitlines() if not line.startswith("Failed to load CPU gemm_4bit")]
    assert (run.returncode, run.stdout, said) == (0, "", [])


def test_the_report_prints_without_the_result():
    report = measure(lambda: torch.zeros(4))

    assert isinstance(report, MemoryReport)
    assert "peak_bytes=16" in repr(report)
    assert "result" not in repr(report)


def test_a_step_that_cannot_be_called():
    with pytest.raises(ConfigError) as caught:
        measure(torch.zeros(1))  # type: ignore[arg-type]

    assert str(caught.value) == (
        "measure() needs something it can call to run one training step, and was given a Tensor. "
        "Pass a function without arguments, for example: lambda: model(**batch).loss.backward()"
    )


def test_model_and_parameters_exclude_each_other():
    model = stack(1, 4)

    with pytest.raises(ConfigError) as caught:
        measure(lambda: None, model=model, parameters=model.parameters())

    assert str(caught.value) == (
        "measure() was given both model= and parameters=, and either says whose gradients to set apart. "
        "Pass model= for all of a model's parameters, or parameters= for a choice of them."
    )


def test_devices_that_cannot_be_measured():
    with pytest.raises(ConfigError) as caught:
        measure(lambda: None, device="meta")

    assert str(caught.value) == (
        "measure() cannot measure memory on device 'meta'; it can on 'cpu' and on CUDA devices. "
        "Move the model to one of these."
    )


def test_measurements_do_not_nest():
    with pytest.raises(MeftError) as caught:
        measure(lambda: measure(lambda: torch.empty(10)))

    assert str(caught.value) == (
        "measure() was called while a PyTorch profiler is running in this thread (another measure() counts), and "
        "only one can. Call it outside of the profiled code."
    )
    assert measure(lambda: torch.empty(10)).peak_bytes == 10 * FLOAT


class FakeCuda:
    """The part of torch.cuda that measure() uses, with an allocator whose figures the test sets."""

    def __init__(self, monkeypatch):
        self.allocated = self.highest = 0
        self.calls = []
        for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def synchronize(self, device):
        self.calls.append(("synchronize", device))

    def reset_peak_memory_stats(self, device):
        self.calls.append(("reset", device))
        self.highest = self.allocated

    def memory_allocated(self, device):
        return self.allocated

    def max_memory_allocated(self, device):
        return self.highest


def test_cuda_figures_are_above_what_was_live_before(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    cuda.allocated = cuda.highest = 10_240

    def step():
        cuda.calls.append("step")
        cuda.highest = 15_360
        cuda.allocated = 11_264
        return "result"

    report = measure(step, device="cuda")

    assert report.device == torch.device("cuda", 1)
    assert (report.peak_bytes, report.activation_peak_bytes, report.retained_bytes) == (5120, 5120, 1024)
    assert report.result == "result"
    device = torch.device("cuda", 1)
    measured = [("reset", device), "step", ("synchronize", device), ("reset", device)]
    assert cuda.calls == [("synchronize", device), *measured]
