"""What `make_reversible` found in a model: which stacks are reversible, and what keeps its activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from meft.errors import ConfigError

from .discovery import check_module
from .layers import ReversibleLayer, shared_by
from .stack import ReversibleStack

_MIB = 2**20


@dataclass(frozen=True)
class StackReport:
    """Which stacks of a model are reversible; `str()` is one line.

    Attributes:
        stacks: number of layers that are rebuilt, by name of their stack.
        parameters: share of the model's parameters that lies in these layers.
        left_out: why the layers of a list run as they are, by its name; known after the first forward pass.
        plain: layers that run as they are because they change the hidden state's shape, by name of the stack.
        whole: why layers run as one stage however many tokens there are, by name of the layer; those of a stack whose
            layers all do are one, by the stack's name. The others run in stages (`tile_size`).
        keeps: outermost modules with parameters that lie in no such stack, and so keep their activations.
        kept_bytes: bytes that are saved for the backward pass outside the stacks, by the module that saves them.
        activations: share of all activations, as they are without meft, that the stacks need not keep; None, and
            `kept_bytes` empty, without a batch.
    """

    stacks: Mapping[str, int]
    parameters: float
    left_out: Mapping[str, str]
    plain: Mapping[str, tuple[int, ...]]
    keeps: tuple[str, ...]
    whole: Mapping[str, str] = field(default_factory=dict)
    kept_bytes: Mapping[str, int] = field(default_factory=dict)
    activations: float | None = None

    def __str__(self) -> str:
        found = ", ".join(f"{name} ({layers} layer{'s' * (layers != 1)})" for name, layers in self.stacks.items())
        shares = "" if self.activations is None else f" and {self.activations:.0%} of the activations"
        parts = [f"reversible: {found or 'nothing'}, {self.parameters:.0%} of the parameters{shares}"]
        if self.plain:
            parts.append("as they are: " + ", ".join(f"{name}.{i}" for name, ids in self.plain.items() for i in ids))
        if self.left_out:
            parts.append(f"no stacks: {', '.join(self.left_out)}")
        sizes: dict[str, int] = {}
        for name, size in self.kept_bytes.items():
            whole = next((kept for kept in self.keeps if f"{name}.".startswith(f"{kept}.")), name) or "the model itself"
            sizes[whole] = sizes.get(whole, 0) + size
        largest = sorted(sizes, key=lambda name: -sizes[name])
        names = [f"{name} ({sizes[name] / _MIB:.2f} MiB)" for name in largest] or list(self.keeps)
        parts.append(f"keeps its activations: {', '.join(names) or 'nothing'}")
        if self.whole:
            parts.append("not in stages: " + ", ".join(f"{name} ({why})" for name, why in self.whole.items()))
        return "; ".join(parts)


def found_in(model: nn.Module) -> StackReport:
    """Says which stacks of a model are reversible, from what is known without running it.

    Raises:
        ConfigError: the model is not reversible.
    """
    reversible_stacks = stacks_of(model)
    taken = {name: stack for name, stack in reversible_stacks.items() if stack.left_out is None}
    rebuilt = {
        name: [layer for index, layer in enumerate(stack.layers) if index not in stack.plain]
        for name, stack in taken.items()
    }
    inside = {p for layers in rebuilt.values() for layer in layers for p in layer.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters())
    return StackReport(
        stacks={name: len(layers) for name, layers in rebuilt.items()},
        parameters=sum(parameter.numel() for parameter in inside) / max(total, 1),
        left_out={name: stack.left_out for name, stack in reversible_stacks.items() if stack.left_out is not None},
        plain={name: tuple(sorted(stack.plain)) for name, stack in taken.items() if stack.plain},
        keeps=tuple(_outside(model, "", inside)),
        whole={name: why for stack in taken.items() for name, why in _whole(*stack)},
    )


def stacks_of(model: nn.Module) -> dict[str, ReversibleStack]:
    """The reversible stacks of a model by name.

    Raises:
        ConfigError: there is none.
    """
    check_module(model, "report")
    stacks = reversible_stacks(model)
    if not stacks:
        raise ConfigError(
            f"{type(model).__name__} is not reversible, so there is nothing to report. Make it so with "
            "meft.make_reversible(model) or peft.get_peft_model(model, meft.MeftConfig(...)) first."
        )
    return stacks


def reversible_stacks(model: nn.Module) -> dict[str, ReversibleStack]:
    """The reversible stacks of a model by name; empty if it has none."""
    return dict(_stacks(model))


def _stacks(model: nn.Module) -> Iterator[tuple[str, ReversibleStack]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            found = shared_by(module)
            if found is not None:
                yield name, found


def _whole(name: str, stack: ReversibleStack) -> Iterator[tuple[str, str]]:
    """The layers of a stack that do not run in stages, and why; one entry if it is the same for all of them."""
    rebuilt = {i: layer for i, layer in enumerate(stack.layers) if i not in stack.plain and not stack.frozen(i)}
    reasons = {i: layer.why_whole() for i, layer in rebuilt.items() if isinstance(layer, ReversibleLayer)}
    found = {i: why for i, why in reasons.items() if why is not None}
    if len(found) == len(rebuilt) and len(set(found.values())) == 1:
        yield name, next(iter(found.values()))
    else:
        yield from ((f"{name}.{i}", why) for i, why in found.items())


def _outside(module: nn.Module, name: str, inside: set[nn.Parameter]) -> Iterator[str]:
    """Names of the outermost modules with parameters, none of which lies in a rebuilt layer."""
    own = set(module.parameters())
    if own and not own & inside:
        yield name
        return
    for child, each in module.named_children():
        if not isinstance(module, ReversibleLayer):
            yield from _outside(each, f"{name}.{child}" if name else child, inside)
