"""The layers of a model, segment by segment, run by a scan or an unrolled loop.

A segment is a pattern of layers that repeats. The parameters of each place in the pattern are
stacked over its repeats (logical axis "layers"), whichever loop runs them.

Legend: B batch, L positions.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import specs
from modjax.kernels import target
from modjax.nn.build import LayerModule, build
from modjax.nn.cache import written
from modjax.nn.call import At, Call, Out
from modjax.nn.layers.dense import in_order, names
from modjax.nn.records import Record
from modjax.nn.routing.selection import ROUTING


class Segment(NamedTuple):
    """A repeated pattern of layers, by name. first: number of layers in the patterns before it."""

    layers: dict[str, specs.Layer]
    first: int
    repeats: int


class Repetition(NamedTuple):
    """One repetition of a segment's pattern. blocks: its modules by name."""

    blocks: Any
    segment: Segment
    index: int | jax.Array

    def run(self, x: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        """Runs its layers in order. `At.passed` starts empty: repetitions pass nothing on."""
        blocks = {name: _kept(self.blocks[name], call.remat) for name in self.segment.layers}
        call = call.inside(self.index)
        return in_order(blocks, x, at._replace(passed={}), call, cache, self.segment.first)


def _kept(layer: Any, remat: str) -> Any:
    """Returns a layer whose activations are recomputed in the backward pass, see specs.Execution.

    Each layer is on its own: together, they would also recompute the output of all but the last.
    """
    if remat == "none":
        return layer
    names = (ROUTING, *(() if remat == "full" else remat.split(",")))

    def run(x: jax.Array, at: At, call: Call, cache: Any) -> Out:
        def one(x: jax.Array) -> tuple[Any, ...]:
            out = layer(x, at, call, cache)
            return out.x, dict(out.records), dict(out.passed), out.depth_BL

        policy = jax.checkpoint_policies.save_only_these_names(*names)
        x, records, passed, depth_BL = jax.checkpoint(one, policy=policy)(x)
        return Out(x, (), records, passed, depth_BL)

    return run


class Stack(nnx.Module):
    """The layers of a model. A call says how they are run, see specs.Execution."""

    def __init__(self, model: specs.ModelSpec, *, rngs: nnx.Rngs):
        self.model = model
        blocks = {}
        for segment in self.segments:
            for name, layer in segment.layers.items():
                stacked = nnx.vmap(
                    functools.partial(_build, layer, model.shape),
                    transform_metadata={nnx.PARTITION_NAME: "layers"},
                )
                with nnx.split_rngs(rngs, splits=segment.repeats):
                    blocks[name] = stacked(rngs)
        self.blocks = nnx.Dict(blocks)

    @property
    def segments(self) -> list[Segment]:
        """The model's segments, in order."""
        found, first = [], 0
        for segment in self.model.segments:
            found.append(Segment(names(segment.parts, first), first, segment.times or 0))
            first += len(segment.parts)
        return found

    def __call__(self, x: jax.Array, at: At, call: Call) -> tuple[jax.Array, dict[str, Record]]:
        """Returns the new x, and the records of every layer, stacked over repetitions."""
        loop = call.layer_loop
        scan = loop == "scan" or (loop == "auto" and target() != "cpu")
        records: dict[str, Record] = {}
        for segment, graphdef, params in self._split():

            def run(x, params_and_index, graphdef=graphdef, segment=segment):
                params, index = params_and_index
                out = Repetition(nnx.merge(graphdef, params), segment, index).run(x, at, call)
                return out.x, dict(out.records)

            if scan and not isinstance(params, list):
                x, found = jax.lax.scan(run, x, (params, jnp.arange(segment.repeats)))
            else:
                each = []
                for index, part in enumerate(_unstacked(params, segment.repeats)):
                    x, out = run(x, (part, index))
                    each.append(out)
                found = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            records |= found
        return x, records

    def repetitions(self) -> list[Repetition]:
        """Returns every repetition with its own parameters: a step then reads only what it uses."""
        return [
            Repetition(_with_weights_apart(nnx.merge(graphdef, part)), segment, index)
            for segment, graphdef, params in self._split()
            for index, part in enumerate(_unstacked(params, segment.repeats))
        ]

    def unstack(self) -> None:
        """Replaces the stacked parameters by those of each repetition."""
        self.blocks = nnx.List([repetition.blocks for repetition in self.repetitions()])

    def depths(self) -> dict[str, range]:
        """Returns the depths, from 0, of the layers that are stacked under each name."""
        found, first = {}, 0
        for layers, _, repeats in self.segments:
            after = first + len(layers) * repeats
            found |= {n: range(first + i, after, len(layers)) for i, n in enumerate(layers)}
            first = after
        return found

    def _split(self) -> Iterator[tuple[Segment, Any, Any]]:
        """Yields (segment, graph definition, stacked parameters) for each segment.

        After `unstack` the parameters are a list, with an entry for each repetition.
        """
        unstacked = iter(self.blocks) if isinstance(self.blocks, nnx.List) else None
        for segment in self.segments:
            if unstacked is None:
                blocks = nnx.Dict({n: self.blocks[n] for n in segment.layers})  # type: ignore[index]
                yield segment, *nnx.split(blocks)
            else:
                each = [nnx.split(next(unstacked)) for _ in range(segment.repeats)]
                yield segment, each[0][0], [params for _, params in each]


def empty_caches(
    repetitions: Sequence[Repetition],
    batch: int,
    length: int,
    slack: float | None,
    dtype: DTypeLike,
) -> tuple[Any, ...]:
    """Returns the empty caches of all layers, in order."""
    return tuple(
        blocks[name].empty(batch, length, slack, dtype)
        for blocks, segment, _ in repetitions
        for name in segment.layers
    )


def read_layers(
    repetitions: Sequence[Repetition], x: jax.Array, at: At, call: Call, caches: tuple[Any, ...]
) -> tuple[jax.Array, tuple[Any, ...], jax.Array]:
    """Returns the new x, the updated caches, and how many selections took each position, (B, L).

    caches: of all layers, in order, as `empty_caches` returns them.
    """
    depth_BL = jnp.zeros(x.shape[:2], jnp.int32)
    before, after = iter(caches), []
    for repetition in repetitions:
        mine = {name: next(before) for name in repetition.segment.layers}
        out = repetition.run(x, at, call, mine)
        x, depth_BL = out.x, depth_BL + out.depth_BL
        after += written(mine, out.write, fresh=call.fresh).values()
    return x, tuple(after), depth_BL


def _build(layer: specs.Layer, shape: specs.Shape, rngs: nnx.Rngs) -> nnx.Module:
    return build(layer, shape, rngs=rngs)


def _unstacked(params: Any, repeats: int) -> list[Any]:
    """Returns the parameters of every repetition."""
    if isinstance(params, list):
        return params
    # lax.split transposes to one concatenation; indexing would pad and add every gradient.
    leaves, structure = jax.tree.flatten(params)
    parts = zip(*(jax.lax.split(leaf, [1] * repeats) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(structure, [part[0] for part in each]) for each in parts]


def _with_weights_apart(blocks: Any) -> Any:
    """Calls `LayerModule.split_weights` on every layer in `blocks`, and returns them."""
    for _, module in list(nnx.iter_modules(blocks)):
        if isinstance(module, LayerModule):
            module.split_weights()
    return blocks
