"""The reversible engine: one autograd node a layer, and the tape that carries the streams.

The rules, which the code below keeps in this order.

1. A layer is a list of coupling steps (`couplings.Step`). Each adds to one stream a function of the other. The
   functions are the pretrained layer's blocks; the engine calls them as black boxes.
2. The forward pass of a node computes the new streams and drops everything else: it saves only what the arithmetic
   needs to undo a division (`residue`, nothing in float arithmetic). The streams themselves are not saved by nodes.
   They travel on a `tape.Tape`, one for each forward pass through a stack, which holds the newest two and no others.
3. The backward pass takes a layer's outputs from the tape, and undoes its steps last to first. For each: run the
   function once more on the stream it read, subtract its value to get the stream before, and differentiate the same
   run. The layer's inputs go back on the tape for the layer below. So each function runs twice in all, once in each
   direction, and at most one layer's activations exist at any time.
4. Exactness: the recomputation must be the identical program. Forward runs under `enable_grad` too and drops its
   graph, since kernels may differ between grad modes; random numbers, autocast, attention kernels and training flags
   are recorded for each call (`replay.Snapshot`) and the surrounding state is left untouched.
5. Every tensor that gets a gradient is an input of the node, and its gradient is returned: the two streams, the
   parameters that require gradients, and outside tensors that do (encoder states in cross-attention). Gradients come
   from `torch.autograd.grad`; nothing calls `.backward()` or writes `.grad`, so hooks of DDP and FSDP see ordinary
   gradients.
6. Streams may be integers, which autograd cannot differentiate, so gradients travel along *handles*: float tensors of
   the hidden state's shape that autograd sees in place of the streams. The newest stream's handle is its value, the
   visible hidden state that the model passes to its next layer; the other's is a placeholder of one element.
7. `cached` layers run the same steps on the same numbers, but under ordinary autograd: the reference for (3), and
   what runs when no reversible node is wanted (evaluation, `no_grad`).
8. A block may compute more than the hidden state: position biases that the next layers use, router logits or
   attention weights that the loss uses. Those that carry gradients are further outputs of the node, and the gradients
   that come back for them are differentiated in the same run.
9. What cannot be right raises: a second backward pass, gradients of gradients, weights or inputs modified between the
   passes, tensors that would get no gradient, streams that overflow, and streams that do not meet again where both
   began.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .couplings import Step, Streams
from .errors import DoubleBackwardError, ModifiedTensorError, UnsupportedModelError
from .replay import Snapshot, private_graph, requiring_grad
from .tape import Handles, Tape, observed_by, version_of

__all__ = ["Function", "Layer", "Tape", "finish", "observed_by", "readout", "run_layer"]

Function = Callable[[Tensor, Sequence[Tensor]], "Tensor | tuple[Tensor, ...]"]
"""A block of a layer: (stream as hidden state, outside tensors) -> hidden state, or a tuple that begins with it."""


@dataclass(frozen=True)
class Layer:
    """One call of one layer, as the engine sees it.

    Attributes:
        functions: the blocks "F" and "G" by name; a missing one stands for zero.
        parameters: leaves that require gradients, in no particular order.
        outside: tensors other than the hidden state that require gradients; given to the functions as their second
            argument, so that a recomputation can put detached ones in their place.
        modules: every module the functions run, for their training flags and buffers.
        vet: look whether the functions use tensors that require gradients and are none of the above.
    """

    functions: Mapping[str, Function]
    parameters: tuple[Tensor, ...] = ()
    outside: tuple[Tensor, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    vet: bool = False


def run_layer(tape: Tape, layer: Layer, *, reversible: bool) -> tuple[Tensor, ...]:
    """Passes the streams through one layer.

    Args:
        tape: the running forward pass.
        layer: the blocks and the tensors that get gradients.
        reversible: rebuild activations in the backward pass; otherwise ordinary autograd keeps them.

    Returns:
        The newest stream as a hidden state, for the model to pass on; then the functions' further outputs, in the order
        of the coupling's steps.
    """
    handles = tape.live_handles()
    tape.visible = None
    if tape.observer is not None and tape.streams is not None:
        tape.observer.passed(tape, tape.forward_depth, tape.streams)
    inputs = (*layer.outside, *layer.parameters)
    if not reversible or not torch.is_grad_enabled():
        outputs = _run_cached(tape, layer, handles)
    elif any(tensor.requires_grad for tensor in (*handles, *inputs)):
        outputs = _ReversibleLayer.apply(tape, layer, *handles, *inputs)
    else:
        with torch.no_grad():
            outputs = _run_cached(tape, layer, handles)
    tape.handles = (outputs[0], outputs[1])
    tape.forward_depth += 1
    visible = tape.live_handles()[tape.coupling.newest]
    tape.show(visible)
    return visible, *outputs[2:]


def readout(tape: Tape, *, inner: bool = False) -> Tensor:
    """Applies the output rule to the streams as they are now.

    Args:
        tape: the running forward pass.
        inner: the hidden state is taken from below the top, and a loss may depend on it alone. The streams are kept as
            long as it lives, for the backward pass to start from if nothing comes from above.
    """
    handles = tape.live_handles()
    inner = inner and tape.kept is not None and tape.forward_depth == tape.depth and torch.is_grad_enabled()
    if tape.coupling.output == (0, 1) and not inner:
        return handles[tape.coupling.newest]
    return _Readout.apply(tape, inner, *handles)


def finish(tape: Tape) -> Tensor:
    """Ends a forward pass: applies the output rule and lets go of everything the backward pass does not need.

    Returns:
        The hidden state that leaves the stack.

    Raises:
        StreamOverflowError: a hidden state was too large or not finite.
    """
    output = readout(tape)
    tape.abandon()
    tape.check_magnitudes()
    return output


class _ReversibleLayer(torch.autograd.Function):
    """One layer: forward runs its steps and drops their graphs, backward undoes them and differentiates."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, layer: Layer, *inputs: Tensor) -> tuple[Tensor, ...]:
        streams = tape.streams
        assert streams is not None
        anchor = streams if tape.anchored(tape.forward_depth) else ()
        ctx.outside = tuple(tensor.detach().requires_grad_() for tensor in layer.outside)
        ctx.snapshots, ctx.residue_of, ctx.further = [], [], []
        residues: list[Tensor] = []
        further: list[Tensor] = []
        for step in tape.coupling.steps:
            value, rest, snapshot = _evaluate(tape, layer, step, streams, ctx.outside)
            streams, coupled = step.forward(tape.arithmetic, streams, value)
            ctx.snapshots.append(snapshot)
            ctx.further.append(slice(len(further), len(further) + len(rest)))
            further += rest
            ctx.residue_of.append(None if coupled.residue is None else len(residues))
            if coupled.residue is not None:
                residues.append(coupled.residue)
            if coupled.magnitude is not None:
                tape.watch(coupled.magnitude)
        ctx.save_for_backward(*anchor, *residues)
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.depth = tape, layer, tape.forward_depth + 1
        ctx.versions = [version_of(tensor) for tensor in (*layer.outside, *layer.parameters)]
        tape.streams = tape.kept = tape.coupling.switched(streams)
        tape.depth = ctx.depth
        return *_handles(tape), *further

    @staticmethod
    def backward(
        ctx: Any, gradient1: Tensor | None, gradient2: Tensor | None, *further: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _check_backward(ctx)
        tape, layer = ctx.tape, ctx.layer
        anchored = tape.anchored(ctx.depth - 1)
        anchor, residues = ctx.saved_tensors[: 2 * anchored], ctx.saved_tensors[2 * anchored :]
        streams = tape.coupling.switched(tape.take_outputs(ctx.depth))
        gradients = list(tape.coupling.switched((gradient1, gradient2)))
        rest: list[Tensor | None] = [None] * (len(layer.outside) + len(layer.parameters))
        leaves = (*ctx.outside, *layer.parameters)
        # The lowest trainable layer's input gets no gradient, and no layer below needs its streams.
        below = any(ctx.needs_input_grad[2:4])
        with requiring_grad(layer.parameters):
            for index in reversed(range(len(tape.coupling.steps))):
                step, slot = tape.coupling.steps[index], ctx.residue_of[index]
                source, values = _reevaluate(tape, layer, step, streams, ctx.outside, ctx.snapshots[index])
                residue = None if slot is None else residues[slot]
                streams = step.inverse(tape.arithmetic, streams, values[0].detach() if values else None, residue)
                wanted = source if below or index > 0 else None
                _differentiate(step, wanted, values, further[ctx.further[index]], gradients, leaves, rest)
        last = not below or ctx.depth == 1
        tape.leave_inputs(ctx.depth - 1, streams, anchor if anchored else None, last=last)
        return None, None, *gradients, *rest


def _evaluate(
    tape: Tape, layer: Layer, step: Step, streams: Streams, outside: Sequence[Tensor]
) -> tuple[Tensor | None, tuple[Tensor, ...], Snapshot | None]:
    """Runs a step's function as the backward pass will; returns its values alone and what the rerun must find."""
    if step.function not in layer.functions:
        return None, (), None
    snapshot = Snapshot.take(tape.device, layer.modules)
    with torch.enable_grad(), private_graph():
        source = tape.arithmetic.decode(streams[step.source], tape.dtype).detach().requires_grad_()
        values = _call(layer, step, source, outside)
        if layer.vet:
            _check_leaves(tape, values, (source, *outside, *layer.parameters))
        value, *rest = (value.detach() for value in values)
    return value, tuple(rest), snapshot.settled()


def _reevaluate(
    tape: Tape, layer: Layer, step: Step, streams: Streams, outside: Sequence[Tensor], snapshot: Snapshot | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs a step's function again; returns the leaf it read and its values with a graph (none without a function)."""
    source = tape.arithmetic.decode(streams[step.source], tape.dtype).detach().requires_grad_()
    if snapshot is None:
        return source, ()
    with torch.enable_grad(), private_graph(), snapshot.replayed():
        values = _call(layer, step, source, outside)
        if layer.vet:
            # Something that the first run left behind would give the right values, and gradients that go astray.
            _check_leaves(tape, values, (source, *outside, *layer.parameters))
        return source, values


def _call(layer: Layer, step: Step, source: Tensor, outside: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # Aliases: hooks that tools put on the arguments of modules do not work on leaves within `torch.autograd.grad`.
    return _values(
        layer.functions[step.function](source.view_as(source), [tensor.view_as(tensor) for tensor in outside])
    )


def _values(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


def _differentiate(
    step: Step,
    source: Tensor | None,
    values: tuple[Tensor, ...],
    further: Sequence[Tensor | None],
    gradients: list[Tensor | None],
    leaves: Sequence[Tensor],
    rest: list[Tensor | None],
) -> None:
    """Moves the gradients of the streams (`gradients`, in place) below a step and adds those of `leaves` to `rest`.

    `source` is the leaf that the step's function read, or None if nobody wants its gradient; `further` are the
    gradients of the function's further outputs.
    """
    above = gradients[step.target]
    if above is not None:
        scaled = above if step.factor == 1 else above * step.factor
        gradients[step.target] = scaled
        # In the order in which ordinary autograd sums them, so that the bits agree as well.
        if step.difference:
            gradients[step.source] = _added(gradients[step.source], -scaled)
    known = [(value, above) for value, above in zip(values, (above, *further), strict=False) if above is not None]
    wanted = leaves if source is None else (*leaves, source)
    if not known or not wanted:
        return
    reached = [value for value, _ in known]
    found = torch.autograd.grad(reached, wanted, [above.to(value.dtype) for value, above in known], allow_unused=True)
    for index in range(len(leaves)):
        rest[index] = _added(rest[index], found[index])
    if source is not None:
        gradients[step.source] = _added(gradients[step.source], found[-1])


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total + gradient.to(total.dtype)


def _run_cached(tape: Tape, layer: Layer, handles: Handles) -> tuple[Tensor, ...]:
    """Runs a layer's steps under ordinary autograd, on the same numbers as the reversible node."""
    streams = tape.streams
    assert streams is not None
    routes, further = list(handles), []
    for step in tape.coupling.steps:
        function = layer.functions.get(step.function)
        value = None
        if function is not None:
            source = _Attach.apply(tape.arithmetic.decode(streams[step.source], tape.dtype), routes[step.source])
            value, *rest = _values(function(source, layer.outside))
            further += rest
        detached = None if value is None else value.detach()
        streams, coupled = step.forward(tape.arithmetic, streams, detached)
        if coupled.magnitude is not None:
            tape.watch(coupled.magnitude)
        routes[step.target] = _Route.apply(step, routes[step.target], routes[step.source], value)
    tape.streams = tape.coupling.switched(streams)
    routes = list(tape.coupling.switched(tuple(routes)))
    newest = tape.coupling.newest
    routes[newest] = _Attach.apply(tape.hidden(newest), routes[newest])
    return routes[0], routes[1], *further


def _handles(tape: Tape) -> Handles:
    newest = tape.coupling.newest
    # A fresh alias: autograd marks a node's outputs, and the tape must not hold on to the graph.
    visible = tape.hidden(newest).view(tape.shape)
    placeholder = _placeholder(visible)
    return (visible, placeholder) if newest == 0 else (placeholder, visible)


def _placeholder(like: Tensor) -> Tensor:
    return like.new_zeros(()).expand(like.shape)


class _Attach(torch.autograd.Function):
    """Gives a stream's value the gradient route of its handle."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, handle: Tensor) -> Tensor:
        return value.view(value.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _Route(torch.autograd.Function):
    """The gradient of one coupling step, straight through its rounding."""

    @staticmethod
    def forward(ctx: Any, step: Step, target: Tensor, source: Tensor, value: Tensor | None) -> Tensor:
        ctx.step, ctx.value_dtype = step, None if value is None else value.dtype
        return _placeholder(target)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor | None, Tensor | None]:
        scaled = gradient if ctx.step.factor == 1 else gradient * ctx.step.factor
        to_source = -scaled if ctx.step.difference else None
        return None, scaled, to_source, None if ctx.value_dtype is None else gradient.to(ctx.value_dtype)


class _Readout(torch.autograd.Function):
    """The output rule: a weighted sum of the two streams."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, inner: bool, handle1: Tensor, handle2: Tensor) -> Tensor:
        ctx.weights, ctx.tape, ctx.depth = tape.coupling.weights(), tape if inner else None, tape.forward_depth
        if inner:
            assert tape.streams is not None
            ctx.save_for_backward(*tape.streams)
        return tape.coupling.read(tape.hidden(0), tape.hidden(1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        if ctx.tape is not None:
            ctx.tape.descend(ctx.depth, ctx.saved_tensors)
        w1, w2 = ctx.weights
        return None, None, w1 * gradient if w1 else None, w2 * gradient if w2 else None


def _check_leaves(tape: Tape, values: tuple[Tensor, ...], known: tuple[Tensor, ...]) -> None:
    """Looks for tensors in a function's graph that require gradients and would get none."""
    names = {id(tensor) for tensor in known}
    pending = [value.grad_fn for value in values if value.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in names:
            raise UnsupportedModelError(
                f"A layer of {tape.name} uses a tensor of shape {tuple(variable.shape)} that requires "
                "gradients but is neither one of its parameters nor among its arguments (another module's weight, or "
                "something that an earlier layer or run left behind), so a reversible layer could not pass its "
                "gradient on. Freeze that tensor (requires_grad_(False)), leave this stack out with stacks=[...], or "
                'use backward="cached".'
            )
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)


def _check_backward(ctx: Any) -> None:
    if torch.is_grad_enabled():
        raise DoubleBackwardError(
            f"create_graph=True asks for gradients of gradients through layer {ctx.depth - 1} of {ctx.tape.name}, "
            "which a reversible layer does not keep the graph for. Call backward() without create_graph, or use "
            'backward="cached", which can be differentiated twice.'
        )
    present = {id(parameter) for module in ctx.layer.modules for parameter in module._parameters.values()}
    if present and any(id(parameter) not in present for parameter in ctx.layer.parameters):
        raise ModifiedTensorError(
            f"The weights that layer {ctx.depth - 1} of {ctx.tape.name} had in the forward pass are no longer its own, "
            "so its activations cannot be rebuilt (torch.func.functional_call swaps weights for one call). Keep the "
            'weights in place until backward() is done, or use backward="cached".'
        )
    tensors = (*ctx.layer.outside, *ctx.layer.parameters)
    changed = [tuple(t.shape) for t, v in zip(tensors, ctx.versions, strict=True) if version_of(t) != v]
    if changed:
        raise ModifiedTensorError(
            f"{len(changed)} of the weights or inputs of layer {ctx.depth - 1} of {ctx.tape.name} were modified in "
            f"place between the forward and the backward pass (the first has shape {changed[0]}), so its activations "
            "cannot be rebuilt. Call backward() before optimizer.step(), load_state_dict() or other in-place changes."
        )
