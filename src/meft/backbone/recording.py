"""The hooks with which Transformers records outputs (`output_hidden_states`), on layers that wrappers hide from it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing
from transformers.utils.output_capturing import maybe_install_capturing_hooks

_MODULE = output_capturing.__name__
# Transformers 5.6 spells it right; the versions before and after do not.
_install = (
    getattr(output_capturing, "install_output_capuring_hook", None)
    or vars(output_capturing)["install_output_capturing_hook"]
)
_OPTIONS = ("key", "index", "capture_initial_hidden_state")


class Recorder:
    """One of these hooks, made so that models that have it can be pickled: Transformers' own are local functions.

    Args:
        options: the arguments, after the module, of Transformers' function that installs such a hook.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        holder = nn.Module()
        _install(holder, **options)
        (self._hook,) = holder._forward_hooks.values()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._hook(module, args, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.options,)


def records(hook: Any) -> bool:
    """Tells whether a forward hook is one with which Transformers records outputs."""
    return type(hook) is Recorder or getattr(hook, "__module__", "") == _MODULE


def install_recording(model: nn.Module) -> None:
    """Lets Transformers put its output-recording hooks on the layers while it can still find them."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        nested = [child for child in module.modules() if isinstance(child, PreTrainedModel)]
        # Installing on a model installs on the models inside it as well, without looking whether they have them.
        if not any(getattr(child, "_output_capturing_hooks_installed", False) for child in nested):
            maybe_install_capturing_hooks(module)
    for module in model.modules():
        for identity, hook in module._forward_hooks.items():
            if getattr(hook, "__module__", "") == _MODULE:
                module._forward_hooks[identity] = _picklable(hook)


def _picklable(hook: Any) -> Any:
    """The same hook as a `Recorder`; the hook itself in a version of Transformers that makes it otherwise."""
    closed = zip(hook.__code__.co_freevars, (cell.cell_contents for cell in hook.__closure__ or ()), strict=True)
    options = {name: value for name, value in closed if name in _OPTIONS}
    return Recorder(options) if {"key", "index"} <= options.keys() else hook
