"""The reversible engine: one autograd node a coupling step, and the tape that carries the streams.

The rules, which the code below keeps in this order.

1. A layer is a list of coupling steps (`couplings.Step`). Each adds to one stream a function of the other. The
   functions are the pretrained layer's blocks; the engine calls them as black boxes.
2. The forward pass of a node computes the new stream and drops everything else: it saves only what the arithmetic
   needs to undo a division (`residue`, nothing in float arithmetic), on the device or on the host (`host.HostStore`).
   The streams themselves are not saved by nodes. They travel on a `tape.Tape`, one for each forward pass through a
   stack, which holds the newest two and no others.
3. The backward pass takes a step's outputs from the tape and undoes the step: run the function once more on the stream
   it read, subtract its value to get the stream before, and differentiate the same run. The step's inputs go back on
   the tape for the step below. So each function runs twice in all, once in each direction, and at most one block's
   activations exist at any time.
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
9. A function that acts on each token alone can be run tile by tile: rebuilt, inverted and differentiated in a single
   pass over the tokens, with one tile's activations at a time. Streams that only the tape holds are rebuilt in place.
   A function that does not may be given as a chain of stages (`stages.Chain`), token-wise or whole: what stands before
   attention, attention, what stands after. Forward keeps the boundary between two stages and no more; backward rebuilds
   the boundaries, whole stages with their graph, then undoes the step in the tiles of the last stage and goes down the
   chain, running token-wise stages once more. What lives at its peak is the streams, the boundaries, their gradients
   and the graph of the whole stages. A black box is a chain of one whole stage.
10. A hidden state that something between two layers changed takes the newest stream's place. That stream is kept until
    the backward pass comes down to it: one a place.
11. An activation that leaves a step's function on the side (a hook, an intervention) hangs on to the graph of the
    forward run, and with it the streams below the step, so that a backward pass can begin there.
12. A step keeps a checksum of the stream that it changes. What is rebuilt is compared with it on the device; all of a
    backward pass is looked at once, in its last node, with the magnitudes of the streams: one synchronisation.
13. What cannot be right raises: a second backward pass, gradients of gradients, weights or inputs modified between the
    passes, tensors that would get no gradient, streams that overflow, and streams that do not meet again where both
    began.

Positions count the calls of layers in a forward pass from 0, and an index is the place of a layer in its list; they
differ where layers run more than once. A level counts coupling steps: the streams of level n lie above n of them.
Depth is the number of calls of a whole stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .arithmetic import norm
from .checks import (
    changes_of,
    check_backward,
    check_leaves,
    check_programs,
    explained,
    programs_of,
    versions_of,
)
from .couplings import Step, Streams
from .replay import RngState, Snapshot, private_graph, requiring_grad, without_hooks
from .routes import Attach, Readout, Route, SideAttach, Splice, placeholder
from .stages import Boundary, Chain, Gathered, Run, Stage, cut, run_stage
from .tape import Handles, Tape, observed_by, tell_residues, version_of
from .tiles import joined, tile_of, tiles, tokens

__all__ = ["Function", "LayerCall", "Tape", "finish", "observed_by", "readout", "run_layer", "splice"]

Function = Callable[[Tensor, Sequence[Tensor]], "Tensor | tuple[Tensor, ...]"]
"""A block of a layer: (stream as hidden state, outside tensors) -> hidden state, or a tuple that begins with it."""


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer, as the engine sees it.

    Attributes:
        functions: the blocks "F" and "G" by name, as black boxes or chains of stages; a missing one stands for zero.
        parameters: leaves that require gradients, in no particular order.
        outside: tensors other than the hidden state that require gradients; given to the functions as their second
            argument, so that a recomputation can put detached ones in their place.
        modules: every module the functions run, for their training flags and buffers.
        inputs: every tensor among the arguments, for the message if a recomputation finds another value there.
        tile_sizes: for functions that act on each token alone, how many tokens to give them at once.
        vet: look whether the functions use tensors that require gradients and are none of the above.
        compiled: whether parts of the functions are compiled, and must be the same programs in both passes.
    """

    functions: Mapping[str, Function | Chain]
    parameters: tuple[Tensor, ...] = ()
    outside: tuple[Tensor, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    inputs: tuple[Tensor, ...] = ()
    tile_sizes: Mapping[str, int] = field(default_factory=dict)
    vet: bool = False
    compiled: bool = False

    def tiles(self, step: Step, shape: torch.Size) -> list[slice]:
        """The tiles of tokens in which a step is taken; one, if its function needs them all."""
        return tiles(shape, self.tile_sizes.get(step.function))


def run_layer(tape: Tape, layer: LayerCall, *, reversible: bool) -> tuple[Tensor, ...]:
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
        tape.observer.passed(tape, tape.position, tape.streams)
    inputs = (*layer.outside, *layer.parameters)
    before = tape.streams, tape.kept, tape.level
    try:
        if not reversible or tape.by_token or not torch.is_grad_enabled():
            outputs = _run_cached(tape, layer, handles)
        elif any(tensor.requires_grad for tensor in (*handles, *inputs)):
            outputs = _run_reversible(tape, layer, handles, inputs)
        else:
            # Nothing that is known of trains here; once, and when hooks come or go, it is seen whether something does.
            with torch.set_grad_enabled(layer.vet):
                outputs = _run_cached(tape, layer, handles)
            check_leaves(tape, outputs, ())
    except BaseException:
        # A step before the one that failed was taken; the layer may be run in another way instead.
        tape.streams, tape.kept, tape.level = before
        raise
    tape.handles = (outputs[0], outputs[1])
    tape.position += 1
    visible = tape.live_handles()[tape.coupling.newest]
    tape.show(visible)
    return visible, *outputs[2:]


def splice(tape: Tape, hidden: Tensor) -> None:
    """Lets a hidden state that something outside the layers made of the newest stream take that stream's place.

    Gradients go through what made it, under ordinary autograd; the older stream stays as it is.

    Args:
        tape: the running forward pass, between two layers.
        hidden: of the shape and dtype of the tape's.
    """
    assert tape.streams is not None
    newest = tape.coupling.newest
    handles, streams = list(tape.live_handles()), list(tape.streams)
    # Above the last reversible layer, or without one, nothing is rebuilt that lies below.
    rebuilt = tape.kept is not None and tape.kept is tape.streams
    if rebuilt and torch.is_grad_enabled() and handles[1 - newest].requires_grad:
        handles[1 - newest] = Splice.apply(tape, streams[newest], handles[1 - newest])
    streams[newest], handles[newest] = tape.arithmetic.encode(hidden.detach()), hidden
    if tape.arithmetic.exact and hidden.numel():
        tape.watch(norm(hidden, math.inf, by_token=tape.by_token))
    tape.streams, tape.handles = (streams[0], streams[1]), (handles[0], handles[1])
    if rebuilt:
        tape.kept = tape.streams
    tape.show(hidden)


def readout(tape: Tape, *, inner: bool = False) -> Tensor:
    """Applies the output rule to the streams as they are now.

    Args:
        tape: the running forward pass.
        inner: the hidden state is taken from below the top, and a loss may depend on it alone. The streams are kept as
            long as it lives, for the backward pass to start from if nothing comes from above.
    """
    handles = tape.live_handles()
    inner = (
        inner and tape.kept is not None and tape.level == tape.level_of(tape.position, 0) and torch.is_grad_enabled()
    )
    if tape.coupling.output == (0, 1) and not inner:
        return handles[tape.coupling.newest]
    return Readout.apply(tape, inner, *handles)


def finish(tape: Tape) -> Tensor:
    """Ends a forward pass: applies the output rule and lets go of everything the backward pass does not need.

    Returns:
        The hidden state that leaves the stack.

    Raises:
        StreamOverflowError: a hidden state was too large or not finite.
    """
    output = readout(tape)
    tape.abandon()
    return tape.checked(output)


def _run_reversible(tape: Tape, layer: LayerCall, handles: Handles, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Runs a layer's steps as one node each; returns the handles, then the functions' further outputs."""
    further: list[Tensor] = []
    for index in range(len(tape.coupling.steps)):
        handle1, handle2, *rest = _ReversibleStep.apply(tape, layer, index, *handles, *inputs)
        handles = handle1, handle2
        further += rest
    return *handles, *further


class _ReversibleStep(torch.autograd.Function):
    """One coupling step: forward takes it and drops its graph, backward undoes and differentiates it."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, layer: LayerCall, index: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        streams = tape.streams
        assert streams is not None
        below = tape.level_of(tape.position, index)
        anchor = streams if tape.anchored(below) else ()
        ctx.outside = tuple(tensor.detach().requires_grad_() for tensor in layer.outside)
        ctx.step, ctx.last = tape.coupling.steps[index], index == len(tape.coupling.steps) - 1
        # Kept, one byte a sample: a second draw would need the generator's state, 5 kB on a CPU.
        ctx.signs = ctx.step.signs(tape.shape, tape.device)
        residues: list[Tensor] = []
        further: list[Tensor] = []
        side = _Side(tape, below, streams, inputs[ctx.step.source])
        before = streams[ctx.step.target]
        sums: list[Tensor] = []
        ctx.all_versions = versions_of(layer)
        ctx.chain = layer.functions.get(ctx.step.function)
        if isinstance(ctx.chain, Chain):
            streams, ctx.snapshot = _take_chain(
                tape, layer, ctx.chain, ctx.step, streams, ctx.signs, side, residues, sums
            )
        else:
            streams, ctx.snapshot = _take_step(tape, layer, ctx.step, streams, ctx.signs, side, residues, further, sums)
        ctx.checksum = tape.checksum(before, sums)
        if tape.host is None:
            tell_residues(residues)
        else:
            residues = list(tape.host.put(below + 1, residues))
        ctx.save_for_backward(*anchor, *residues)
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.level = tape, layer, below + 1
        ctx.versions = [version_of(tensor) for tensor in (*layer.outside, *layer.parameters)]
        tape.streams = tape.kept = tape.coupling.switched(streams) if ctx.last else streams
        tape.level = ctx.level
        return *_handles(tape, visible=ctx.last), *further

    @staticmethod
    def backward(
        ctx: Any, gradient1: Tensor | None, gradient2: Tensor | None, *further: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        check_backward(ctx)
        tape, layer = ctx.tape, ctx.layer
        anchored = tape.anchored(ctx.level - 1)
        # Asked for once: checkpointing around the stack gives them a single time.
        saved = ctx.saved_tensors
        anchor, residues = saved[: 2 * anchored], saved[2 * anchored :]
        if tape.host is not None:
            residues = tape.host.take(ctx.level, residues)
            tell_residues(residues)
        streams, gradients = tape.take_outputs(ctx.level), (gradient1, gradient2)
        if ctx.last:
            streams, gradients = tape.coupling.switched(streams), tape.coupling.switched(gradients)
        rest: list[Tensor | None] = [None] * (len(layer.outside) + len(layer.parameters))
        # The lowest trainable step's input gets no gradient, and no step below needs its streams.
        below = any(ctx.needs_input_grad[3:5])
        pending = _Pending(list(gradients), (*ctx.outside, *layer.parameters), rest, further, below, ctx.signs)
        sums: list[Tensor] = []
        with requiring_grad(layer.parameters), without_hooks(layer.parameters):
            undo = partial(_undo_chain, chain=ctx.chain) if isinstance(ctx.chain, Chain) else _undo_step
            streams = undo(tape, layer, ctx.step, streams, pending, ctx.outside, ctx.snapshot, residues, sums)
        # The stages of a chain ran one after the other, in the state that the first one found.
        snapshot = ctx.snapshot[0] if isinstance(ctx.chain, Chain) else ctx.snapshot
        cause = partial(changes_of, layer, ctx.all_versions, snapshot)
        tape.compare(ctx.level, ctx.checksum, streams[ctx.step.target], cause, sums)
        last = not below or ctx.level == 1
        tape.leave_inputs(ctx.level - 1, streams, anchor if anchored else None, last=last)
        # A hook is not called for a weight that a loss does not reach; the node reaches all, so it is given zeros.
        for index, parameter in enumerate(layer.parameters, len(layer.outside)):
            if rest[index] is None and parameter._backward_hooks:
                rest[index] = torch.zeros_like(parameter)
        return None, None, None, *pending.streams, *rest


@dataclass(frozen=True)
class _Side:
    """Where the forward run of a step hangs on to the graph, for activations that are caught in it.

    Attributes:
        tape: the running forward pass.
        level: the number of steps below.
        streams: those below the step.
        handle: that of the stream that the step's function reads.
    """

    tape: Tape
    level: int
    streams: Streams
    handle: Tensor

    def attach(self, hidden: Tensor, part: slice) -> Tensor:
        """Gives a tile of what the function reads the route of the handle."""
        return SideAttach.apply(self.tape, self.level, self.streams, hidden, tile_of(self.handle, part))


@dataclass
class _Pending:
    """The gradients of one node on their way down.

    Attributes:
        streams: of the two streams; replaced when the step is undone.
        leaves: the tensors besides that get gradients.
        rest: theirs, summed up so far.
        further: those that came for the further outputs of a step's function.
        below: whether the streams below the step want them.
        signs: those of the step, or None.
    """

    streams: list[Tensor | None]
    leaves: Sequence[Tensor]
    rest: list[Tensor | None]
    further: Sequence[Tensor | None]
    below: bool
    signs: Tensor | None = None


def _take_step(
    tape: Tape,
    layer: LayerCall,
    step: Step,
    streams: Streams,
    signs: Tensor | None,
    side: _Side,
    residues: list[Tensor],
    further: list[Tensor],
    sums: list[Tensor],
) -> tuple[Streams, Snapshot | None]:
    """Runs a step's function as the backward pass will, and couples the streams with its value alone.

    Adds to `residues` and `further` what the step leaves, and to `sums` the checksums of tiles of the stream before it
    that kernels have found; returns the new streams and what a rerun must find.
    """
    snapshot = Snapshot.take(tape.device, layer.modules) if step.function in layer.functions else None
    parts = layer.tiles(step, tape.shape)
    pieces = []
    programs: tuple[type, ...] = ()
    for part in parts:
        tile = (tile_of(streams[0], part), tile_of(streams[1], part))
        value = None
        if snapshot is not None:
            with torch.enable_grad(), private_graph():
                source = side.attach if side.handle.requires_grad else None
                _, values = _run(tape, layer, step, tile, layer.outside, source, part)
            programs += programs_of(values) if layer.compiled else ()
            value, *rest = (value.detach() for value in values)
            further += rest
            del values
        tile, coupled = step.forward(tape.arithmetic, tile, value, _signs_of(signs, tape.shape, part))
        pieces.append(tile[step.target])
        residues += [] if coupled.residue is None else [coupled.residue]
        sums += [] if coupled.checksum is None else [coupled.checksum]
        if coupled.magnitude is not None:
            tape.watch(coupled.magnitude)
    streams = step.with_target(streams, joined(pieces, tape.shape))
    return streams, None if snapshot is None else snapshot.settled(programs)


def _undo_step(
    tape: Tape,
    layer: LayerCall,
    step: Step,
    streams: Streams,
    pending: _Pending,
    outside: Sequence[Tensor],
    snapshot: Snapshot | None,
    residues: Sequence[Tensor],
    sums: list[Tensor],
) -> Streams:
    """Runs a step's function once more, subtracts its value to get the streams before, and differentiates the run.

    Adds to `sums` the checksums of tiles of what was rebuilt, where kernels have found them.
    """
    parts = layer.tiles(step, tape.shape)
    gradients = _Tiled(step, pending, tape.shape, len(parts))
    pieces: list[Tensor] = []
    drawn: list[RngState] | None = [] if len(parts) > 1 else None
    programs: tuple[type, ...] = ()
    for index, part in enumerate(parts):
        tile = (tile_of(streams[0], part), tile_of(streams[1], part))
        source: Tensor | None = None
        values: tuple[Tensor, ...] = ()
        if snapshot is not None:
            disturbed = tape.note_disturbance if index == len(parts) - 1 else None
            with torch.enable_grad(), private_graph(), snapshot.replayed(drawn, disturbed):
                source, values = _run(tape, layer, step, tile, outside)
            programs += programs_of(values) if layer.compiled else ()
        # Edges of the graph instead of its outputs: what the function returned is not needed once it is subtracted.
        edges = [(get_gradient_edge(value), value.dtype) if value.requires_grad else None for value in values]
        value = values[0].detach() if values else None
        del values
        signs = _signs_of(pending.signs, tape.shape, part)
        residue = residues[index] if residues else None
        tile = step.inverse(tape.arithmetic, tile, value, residue, signs, in_place=tape.in_place, checksums=sums)
        del value
        if not tape.in_place:
            pieces.append(tile[step.target])
        gradients.add(part, source, edges)
    if snapshot is not None:
        check_programs(tape, snapshot.programs, programs)
    gradients.finish()
    if tape.in_place:
        return streams
    return step.with_target(streams, joined(pieces, tape.shape))


def _take_chain(
    tape: Tape,
    layer: LayerCall,
    chain: Chain,
    step: Step,
    streams: Streams,
    signs: Tensor | None,
    side: _Side,
    residues: list[Tensor],
    sums: list[Tensor],
) -> tuple[Streams, list[Snapshot]]:
    """`_take_step` for a chain: stage after stage, keeping the present boundary; a snapshot for each stage."""
    boundary: Boundary = ()
    snapshots = []
    hanging = side if side.handle.requires_grad else None
    for index, stage in enumerate(chain.stages):
        snapshot = Snapshot.take(tape.device, layer.modules)
        parts = chain.tiles(index, tape.shape)
        gathered = Gathered(tape.shape, len(parts))
        programs: tuple[type, ...] = ()
        for part in parts:
            run = _run_stage(tape, layer, stage, streams[step.source], boundary, layer.outside, part, hanging)
            programs += programs_of(run.values) if layer.compiled else ()
            values = tuple(value.detach() for value in run.values)
            del run
            if index == chain.last:
                tile = (tile_of(streams[0], part), tile_of(streams[1], part))
                tile, coupled = step.forward(tape.arithmetic, tile, values[0], _signs_of(signs, tape.shape, part))
                values = (tile[step.target],)
                residues += [] if coupled.residue is None else [coupled.residue]
                sums += [] if coupled.checksum is None else [coupled.checksum]
                if coupled.magnitude is not None:
                    tape.watch(coupled.magnitude)
            gathered.put(part, values)
        snapshots.append(snapshot.settled(programs))
        boundary = gathered.values()
    return step.with_target(streams, boundary[0]), snapshots


def _undo_chain(
    tape: Tape,
    layer: LayerCall,
    step: Step,
    streams: Streams,
    pending: _Pending,
    outside: Sequence[Tensor],
    snapshots: Sequence[Snapshot],
    residues: Sequence[Tensor],
    sums: list[Tensor],
    *,
    chain: Chain,
) -> Streams:
    """`_undo_step` for a chain: its boundaries anew, then its stages from the last one down."""
    shape, source = tape.shape, streams[step.source]
    boundaries: list[Boundary] = [()]
    kept: dict[int, tuple[Run, list[tuple[GradientEdge, torch.dtype] | None]]] = {}

    def runs(index: int, *, backwards: bool) -> Iterator[tuple[slice, Run]]:
        stage, snapshot, parts = chain.stages[index], snapshots[index], chain.tiles(index, shape)
        drawn: list[RngState] | None = [] if len(parts) > 1 else None
        programs: tuple[type, ...] = ()
        # Ordinary autograd comes to the last tile first. Random numbers are drawn from the first one on.
        for part in reversed(parts) if backwards and snapshot.rng is None else parts:
            disturbed = tape.note_disturbance if part is parts[-1] else None
            with snapshot.replayed(drawn, disturbed):
                run = _run_stage(tape, layer, stage, source, boundaries[index], outside, part)
            programs += programs_of(run.values) if layer.compiled else ()
            yield part, run
            del run
        check_programs(tape, tuple(sorted(snapshot.programs, key=id)), tuple(sorted(programs, key=id)))

    for index in range(chain.last):
        gathered = Gathered(shape, len(chain.tiles(index, shape)))
        for part, run in runs(index, backwards=False):
            gathered.put(part, [value.detach() for value in run.values])
            if not chain.stages[index].tokenwise:
                kept[index] = run, run.edges()
            del run
        if index in kept:
            # Its graph has what it needs.
            boundaries[index] = ()
        boundaries.append(gathered.values())

    parts = chain.tiles(chain.last, shape)
    read, pieces, below = _Sum(shape), Gathered(shape, len(parts)), Gathered(shape, len(parts))
    numbered = dict(zip((part.start for part in parts), residues, strict=False))
    for part, run in runs(chain.last, backwards=True):
        value, edges = run.values[0].detach(), run.edges()
        tile = (tile_of(streams[0], part), tile_of(streams[1], part))
        signs = _signs_of(pending.signs, shape, part)
        residue = numbered.get(part.start)
        tile = step.inverse(tape.arithmetic, tile, value, residue, signs, in_place=tape.in_place, checksums=sums)
        del value
        if not tape.in_place:
            pieces.put(part, (tile[step.target],))
        above = pending.streams[step.target]
        above = None if above is None else step.to_value(tile_of(above, part))
        below.put(part, _differentiate(pending, run, edges, (above,), part, read))
        del run
    boundaries.pop()
    for index in reversed(range(chain.last)):
        above_, below = below.found, Gathered(shape, len(chain.tiles(index, shape)))
        if index in kept:
            run, edges = kept.pop(index)
            below.put(slice(0, shape[:-1].numel()), _differentiate(pending, run, edges, above_, None, read))
            del run, edges
        else:
            for part, run in runs(index, backwards=True):
                tiles_above = [None if tensor is None else tile_of(tensor, part) for tensor in above_]
                below.put(part, _differentiate(pending, run, run.edges(), tiles_above, part, read))
                del run
        del above_
        boundaries.pop()
    gradients = _Tiled(step, pending, shape, 1)
    gradients.found = [] if read.total is None else [read.total]
    gradients.finish()
    if tape.in_place:
        return streams
    return step.with_target(streams, pieces.values()[0])


def _run_stage(
    tape: Tape,
    layer: LayerCall,
    stage: Stage,
    stream: Tensor,
    boundary: Boundary,
    outside: Sequence[Tensor],
    part: slice,
    side: _Side | None = None,
) -> Run:
    """Runs a stage on a tile, as both passes do; with `side`, in the forward pass of a stream that has gradients."""
    with torch.enable_grad(), private_graph():
        hidden = tape.arithmetic.decode(tile_of(stream, part), tape.dtype).detach() if stage.reads else None
        handle, attach = (None, None) if side is None else (side.handle, side.attach)
        run = run_stage(stage, hidden, cut(boundary, part), outside, part, attach, handle)
        if layer.vet:
            check_leaves(tape, run.values, (*run.ends, *outside, *layer.parameters))
    return run


class _Sum:
    """What the stream that a chain reads gets from its stages, tile by tile."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.total: Tensor | None = None

    def whole(self, part: slice | None) -> bool:
        return part is None or part.stop - part.start == self.shape[:-1].numel()

    def add(self, part: slice | None, piece: Tensor) -> None:
        if part is None or self.whole(part):
            self.total = piece
            return
        if self.total is None:
            self.total = piece.new_zeros(self.shape)
        tokens(self.total)[part] += tokens(piece)


def _differentiate(
    pending: _Pending,
    run: Run,
    edges: Sequence[tuple[GradientEdge, torch.dtype] | None],
    gradients: Sequence[Tensor | None],
    part: slice | None,
    read: _Sum,
) -> Sequence[Tensor | None]:
    """Differentiates one run of a stage; returns the gradients of its boundary."""
    known = [
        (edge[0], g.to(edge[1]))
        for edge, g in zip(edges, gradients, strict=False)
        if edge is not None and g is not None
    ]
    own = (run.source,) if run.source is not None and pending.below else ()
    wanted = (*pending.leaves, *run.leaves, *own)
    if not known or not wanted:
        return [None] * len(run.leaves)
    if own and run.entry is not None and read.total is not None and read.whole(part):
        # The sum goes on where the stage above left it, as in one graph: norms may read the stream more than once.
        known.append((run.entry, read.total))
    with explained():
        found = torch.autograd.grad([edge for edge, _ in known], wanted, [g for _, g in known], allow_unused=True)
    count = len(pending.leaves)
    for index in range(count):
        pending.rest[index] = _added(pending.rest[index], found[index])
    if own and found[-1] is not None:
        read.add(part, found[-1])
    return found[count : count + len(run.leaves)]


def _signs_of(signs: Tensor | None, shape: torch.Size, part: slice) -> Tensor | None:
    """The signs of a tile's tokens, from those of the samples."""
    return None if signs is None else tile_of(signs.expand(*shape[:-1], 1), part)


def _run(
    tape: Tape,
    layer: LayerCall,
    step: Step,
    streams: Streams,
    outside: Sequence[Tensor],
    attach: Callable[[Tensor, slice], Tensor] | None = None,
    part: slice = slice(None),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs a step's function; returns the leaf that stands for what it read, and its values with a graph.

    With `attach` what it reads hangs on to the graph below instead, and the leaf means nothing.
    """
    hidden = tape.arithmetic.decode(streams[step.source], tape.dtype).detach()
    # The leaf holds no memory, so that the hidden state lives no longer than the function needs it.
    leaf = placeholder(hidden).requires_grad_()
    source = Attach.apply(hidden, leaf) if attach is None else attach(hidden, part)
    del hidden
    values = _call(layer, step, source, outside)
    if layer.vet:
        # The second run as well: what the first left behind would give the right values, and gradients that go astray.
        check_leaves(tape, values, (leaf, source, *outside, *layer.parameters))
    return leaf, values


def _call(layer: LayerCall, step: Step, source: Tensor, outside: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # Aliases: hooks that tools put on the arguments of modules do not work on leaves within `torch.autograd.grad`.
    function = layer.functions[step.function]
    assert not isinstance(function, Chain)
    return _values(function(source, [tensor.view_as(tensor) for tensor in outside]))


def _values(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


class _Tiled:
    """Moves the gradients of a node below its step: `add` for every tile, then `finish`.

    Sums are taken in the order in which ordinary autograd takes them, so that the bits agree as well, and only when the
    activations are gone.
    """

    def __init__(self, step: Step, pending: _Pending, shape: torch.Size, parts: int) -> None:
        self.step, self.pending, self.shape, self.whole = step, pending, shape, parts == 1
        self.found: list[Tensor] = []

    def add(self, part: slice, source: Tensor | None, edges: Sequence[tuple[GradientEdge, torch.dtype] | None]) -> None:
        """Differentiates one run: `source` is the leaf it read, or None if there was no function."""
        pending = self.pending
        above = pending.streams[self.step.target]
        if above is not None and not self.whole:
            above = tile_of(above, part)
        if above is not None:
            above = self.step.to_value(above)
        pairs = zip(edges, (above, *pending.further), strict=False)
        known = [(edge[0], g.to(edge[1])) for edge, g in pairs if edge is not None and g is not None]
        wanted = (*pending.leaves, source) if pending.below and source is not None else tuple(pending.leaves)
        if not known or not wanted:
            return
        with explained():
            found = torch.autograd.grad([edge for edge, _ in known], wanted, [g for _, g in known], allow_unused=True)
        for index in range(len(pending.leaves)):
            pending.rest[index] = _added(pending.rest[index], found[index])
        if len(wanted) > len(pending.leaves) and found[-1] is not None:
            self.found.append(found[-1])

    def finish(self) -> None:
        """Scales the gradient of the stream that was changed, and adds up that of the stream that was read."""
        streams, step = self.pending.streams, self.step
        above = streams[step.target]
        if above is not None:
            scaled = step.scaled(above, self.pending.signs)
            streams[step.target] = scaled
            streams[step.source] = _added(streams[step.source], step.to_source(scaled))
        if self.found:
            streams[step.source] = _added(streams[step.source], joined(self.found, self.shape))


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total + gradient.to(total.dtype)


def _run_cached(tape: Tape, layer: LayerCall, handles: Handles) -> tuple[Tensor, ...]:
    """Runs a layer's steps under ordinary autograd, on the same numbers as the reversible node."""
    streams = tape.streams
    assert streams is not None
    routes, further = list(handles), []
    for step in tape.coupling.steps:
        function = layer.functions.get(step.function)
        signs = step.signs(tape.shape, tape.device)
        value = None
        if function is not None:
            source = Attach.apply(tape.value(streams[step.source]), routes[step.source])
            if isinstance(function, Chain):
                value = function.cached(source, layer.outside, tape.shape)
            else:
                parts = layer.tiles(step, tape.shape)
                values = [_values(function(tile_of(source, part), layer.outside)) for part in parts]
                further += [tensor for _, *rest in values for tensor in rest]
                value = joined([tile for tile, *_ in values], tape.shape)
        detached = None if value is None else value.detach()
        streams, coupled = step.forward(tape.arithmetic, streams, detached, signs)
        if coupled.magnitude is not None:
            tape.watch(coupled.magnitude)
        routes[step.target] = Route.apply(step, signs, routes[step.target], routes[step.source], value)
    tape.streams = tape.coupling.switched(streams)
    routes = list(tape.coupling.switched(tuple(routes)))
    newest = tape.coupling.newest
    routes[newest] = Attach.apply(tape.hidden(newest), routes[newest])
    return routes[0], routes[1], *further


def _handles(tape: Tape, *, visible: bool) -> Handles:
    """Fresh handles of the tape's streams; with `visible`, the newest stream's is its value."""
    assert tape.streams is not None
    newest = tape.coupling.newest
    shown = tape.hidden(newest) if visible else tape.streams[0].new_empty((), dtype=tape.dtype)
    if shown is tape.streams[newest]:
        # A fresh alias: autograd marks a node's outputs, and the tape must not hold on to the graph.
        shown = shown.view(tape.shape)
    first, second = (placeholder(shown, tape.shape) for _ in range(2))
    if not visible:
        return first, second
    return (shown, second) if newest == 0 else (first, shown)
