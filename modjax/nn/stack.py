"""The layers of a model, segment by segment, run by one loop or another.

The parameters of each place of a pattern are stacked over its repetitions (logical axis "layers"),
whichever loop runs them.

Legend: B batch, L positions.
"""

import functools
from collections.abc import Iterator
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


class Segment(NamedTuple):
    """A pattern of layers that repeats. first: the number of patterns' layers before it."""

    layers: dict[str, specs.Layer]
    first: int
    times: int


class Repetition(NamedTuple):
    """One repetition of a segment's pattern. blocks: its modules by name."""

    blocks: Any
    segment: Segment
    index: int | jax.Array

    def run(self, x: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        """Returns the output of its layers in order; those before it hand nothing on to them."""
        blocks = {name: self.blocks[name] for name in self.segment.layers}
        call = call.inside(self.index)
        return in_order(blocks, x, at._replace(handed={}), call, cache, self.segment.first)


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
                with nnx.split_rngs(rngs, splits=segment.times):
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
        """Returns new x, and the records of every layer, stacked over repetitions."""
        loop = call.layer_loop
        scan = loop == "scan" or (loop == "auto" and target() != "cpu")
        records: dict[str, Record] = {}
        for segment, graphdef, params in self._split():

            def group(x, params_and_index, graphdef=graphdef, segment=segment):
                params, index = params_and_index
                out = Repetition(nnx.merge(graphdef, params), segment, index).run(x, at, call)
                return out.x, dict(out.records)

            if call.remat != "none":
                dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
                group = jax.checkpoint(group, policy=dots if call.remat == "dots" else None)
            if scan and not isinstance(params, list):
                x, found = jax.lax.scan(group, x, (params, jnp.arange(segment.times)))
            else:
                each = []
                for index, part in enumerate(_unstacked(params, segment.times)):
                    x, out = group(x, (part, index))
                    each.append(out)
                found = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            records |= found
        return x, records

    def read(
        self, apart: list[Repetition], x: jax.Array, at: At, call: Call, cache: tuple[Any, ...]
    ) -> tuple[jax.Array, tuple[Any, ...], jax.Array]:
        """Returns new x, the caches with these positions, and how many selections took each.

        apart: of the method. cache: of every layer, in order, as `empty` has them.
        """
        depth_BL = jnp.zeros(x.shape[:2], jnp.int32)
        before, after = iter(cache), []
        for repetition in apart:
            mine = {name: next(before) for name in repetition.segment.layers}
            out = repetition.run(x, at, call, mine)
            x, depth_BL = out.x, depth_BL + out.depth_BL
            after += written(mine, out.write, fresh=call.fresh).values()
        return x, tuple(after), depth_BL

    def apart(self) -> list[Repetition]:
        """Returns every repetition by itself: a step then reads only the weights that it uses."""
        return [
            Repetition(_taken_apart(nnx.merge(graphdef, part)), segment, index)
            for segment, graphdef, params in self._split()
            for index, part in enumerate(_unstacked(params, segment.times))
        ]

    def empty(
        self,
        apart: list[Repetition],
        batch: int,
        length: int,
        slack: float | None,
        dtype: DTypeLike,
    ) -> tuple[Any, ...]:
        """Returns empty caches of all layers, in order."""
        return tuple(
            blocks[name].empty(batch, length, slack, dtype)
            for blocks, segment, _ in apart
            for name in segment.layers
        )

    def unstack(self) -> None:
        """Stores every repetition by itself from now on."""
        self.blocks = nnx.List([repetition.blocks for repetition in self.apart()])

    def depths(self) -> dict[str, range]:
        """Returns the depths, from 0, of the layers that are stacked under each name."""
        found, first = {}, 0
        for layers, _, times in self.segments:
            after = first + len(layers) * times
            found |= {n: range(first + i, after, len(layers)) for i, n in enumerate(layers)}
            first = after
        return found

    def _split(self) -> Iterator[tuple[Segment, Any, Any]]:
        """Yields segments with their graph definitions and stacked parameters.

        After `unstack` the parameters are a list, with an entry for each repetition.
        """
        apart = iter(self.blocks) if isinstance(self.blocks, nnx.List) else None
        for segment in self.segments:
            if apart is None:
                blocks = nnx.Dict({n: self.blocks[n] for n in segment.layers})  # type: ignore[index]
                yield segment, *nnx.split(blocks)
            else:
                each = [nnx.split(next(apart)) for _ in range(segment.times)]
                yield segment, each[0][0], [params for _, params in each]


def _build(layer: specs.Layer, shape: specs.Shape, rngs: nnx.Rngs) -> nnx.Module:
    return build(layer, shape, rngs=rngs)


def _unstacked(params: Any, times: int) -> list[Any]:
    """Returns the parameters of every repetition."""
    if isinstance(params, list):
        return params
    # lax.split transposes to one concatenation; indexing would pad and add every gradient.
    leaves = [jax.lax.split(leaf, [1] * times) for leaf in jax.tree.leaves(params)]
    structure = jax.tree.structure(params)
    return [
        jax.tree.unflatten(structure, [part[0] for part in parts])
        for parts in zip(*leaves, strict=True)
    ]


def _taken_apart(blocks: Any) -> Any:
    """Returns these blocks after every layer in them has split its weights, see `LayerModule`."""
    for _, module in list(nnx.iter_modules(blocks)):
        if isinstance(module, LayerModule):
            module.take_apart()
    return blocks
