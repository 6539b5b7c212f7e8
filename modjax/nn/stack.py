"""The layers of a model, segment by segment, run by one loop or another.

The parameters of each place of a pattern are stacked over its repetitions (logical axis "layers"),
whichever loop runs them.

Legend: B batch, L positions, G repetitions of a layer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import spec
from modjax.kernels import target
from modjax.nn.build import LayerModule, build
from modjax.nn.cache import written
from modjax.nn.call import At, Call, Out, under
from modjax.nn.layers import names
from modjax.nn.records import Record
from modjax.nn.sharding import constrain_stream

Places = dict[str, int]  # the names of a segment's layers, in order, and their places in the model
Repetition = tuple[Any, Places, int]  # blocks by name, their places, which repetition it is


class Stack(nnx.Module):
    """The layers of a model. A call says how they are run, see spec.Execution."""

    def __init__(self, model: spec.ModelSpec, *, rngs: nnx.Rngs):
        self.segments = model.segments
        blocks = {}
        for name, layer, times in self._layers():
            stacked = nnx.vmap(
                functools.partial(_build, layer, model.shape),
                transform_metadata={nnx.PARTITION_NAME: "layers"},
            )
            with nnx.split_rngs(rngs, splits=times):
                blocks[name] = stacked(rngs)
        self.blocks = nnx.Dict(blocks)

    def __call__(self, x: jax.Array, at: At, call: Call) -> tuple[jax.Array, dict[str, Record]]:
        """New x, and the records of every place of the patterns, stacked over repetitions."""
        loop = call.layer_loop
        scan = loop == "scan" or (loop == "auto" and target() != "cpu")
        records: dict[str, Record] = {}
        for blocks, places, times in self._segments():
            scanned = scan and not isinstance(blocks, list)
            graphdef, params = nnx.split(blocks) if scanned else _unstacked(blocks, times)

            def group(x, params_and_index, graphdef=graphdef, places=places):
                params, index = params_and_index
                return _run(nnx.merge(graphdef, params), places, x, at, call, index)[:2]

            if call.remat != "none":
                dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
                group = jax.checkpoint(group, policy=dots if call.remat == "dots" else None)
            if scanned:
                x, found = jax.lax.scan(group, x, (params, jnp.arange(times)))
            else:
                each = []
                for index, part in enumerate(params):
                    x, out = group(x, (part, index))
                    each.append(out)
                found = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            records |= found
        return x, records

    def read(
        self, apart: list[Repetition], x: jax.Array, at: At, call: Call, cache: tuple[Any, ...]
    ) -> tuple[jax.Array, tuple[Any, ...], jax.Array]:
        """New x, the caches with these positions, and how many selections took each, (B, L).

        apart: of the method. cache: of every layer, in order, as `empty` has them.
        """
        depth_BL = jnp.zeros(x.shape[:2], jnp.int32)
        caches: list[Any] = []
        for blocks, places, index in apart:
            mine = cache[len(caches) : len(caches) + len(places)]
            x, _, new, more_BL = _run(blocks, places, x, at, call, index, mine)
            caches += new
            depth_BL += more_BL
        return x, tuple(caches), depth_BL

    def apart(self) -> list[Repetition]:
        """Every repetition by itself, so that a step reads the weights that it uses only."""
        found = []
        for blocks, places, times in self._segments():
            graphdef, params = _unstacked(blocks, times)
            found += [
                (_taken_apart(nnx.merge(graphdef, part)), places, index)
                for index, part in enumerate(params)
            ]
        return found

    def empty(
        self,
        apart: list[Repetition],
        batch: int,
        length: int,
        slack: float | None,
        dtype: DTypeLike,
    ) -> tuple[Any, ...]:
        """Empty caches of all layers, in order."""
        return tuple(
            blocks[name].empty(batch, length, slack, dtype)
            for blocks, places, _ in apart
            for name in places
        )

    def unstack(self) -> None:
        """Keeps the repetitions of every layer apart from now on."""
        self.blocks = nnx.List(
            [
                nnx.List([_taken_apart(nnx.merge(*part)) for part in _each(blocks, times)])
                for blocks, _, times in self._segments()
            ]
        )

    def depths(self) -> dict[str, range]:
        """Returns the depths, from 0, of the layers that are stacked under each name."""
        found, first = {}, 0
        for _, places, times in self._segments():
            after = first + len(places) * times
            found |= {n: range(first + i, after, len(places)) for i, n in enumerate(places)}
            first = after
        return found

    def _layers(self) -> list[tuple[str, spec.Layer, int]]:
        found = []
        for segment in self.segments:
            places = names(segment.parts, len(found))
            found += [(name, layer, segment.times or 0) for name, layer in places.items()]
        return found

    def _segments(self) -> list[tuple[Any, Places, int]]:
        """Returns (blocks by name, places, times) of each segment.

        After `unstack`, blocks is a list with an entry for each repetition.
        """
        found, start = [], 0
        for number, segment in enumerate(self.segments):
            places = {name: place for place, name in enumerate(names(segment.parts, start), start)}
            start += len(places)
            if isinstance(self.blocks, nnx.List):
                blocks: Any = list(self.blocks[number])
            else:
                blocks = nnx.Dict({name: self.blocks[name] for name in places})
            found.append((blocks, places, segment.times))
        return found


def _build(layer: spec.Layer, shape: spec.Shape, rngs: nnx.Rngs) -> nnx.Module:
    return build(layer, shape, rngs=rngs)


def _run(
    blocks: Any,
    places: Places,
    x: jax.Array,
    at: At,
    call: Call,
    index: int | jax.Array,
    caches: tuple[Any, ...] | None = None,
) -> tuple[jax.Array, dict[str, Record], list[Any], Any]:
    """Runs one repetition of a segment's pattern.

    Returns new x, records, the caches after it, and how many selections took each position.
    """
    records: dict[str, Record] = {}
    depth_BL: Any = 0
    handed: dict[str, jax.Array] = {}
    after = []
    for order, (name, place) in enumerate(places.items()):
        cache = None if caches is None else caches[order]
        mine = call.inside(index).inside(place)
        out: Out = blocks[name](x, at._replace(handed=handed), mine, cache)
        x = constrain_stream(out.x)
        records |= under(name, out.records)
        handed = {**handed, **out.handed}
        after.append(written(cache, out.write, fresh=call.fresh))
        depth_BL = depth_BL + out.depth_BL
    return x, records, after, depth_BL


def _each(blocks: Any, times: int) -> list[tuple[Any, Any]]:
    """Graph definition and parameters of every repetition."""
    if isinstance(blocks, list):  # see Stack.unstack
        return [nnx.split(block) for block in blocks]
    graphdef, stacked = nnx.split(blocks)
    # lax.split transposes to one concatenation; indexing would pad and add every gradient.
    leaves = [jax.lax.split(leaf, [1] * times) for leaf in jax.tree.leaves(stacked)]
    structure = jax.tree.structure(stacked)
    return [
        (graphdef, jax.tree.unflatten(structure, [part[0] for part in parts]))
        for parts in zip(*leaves, strict=True)
    ]


def _taken_apart(blocks: Any) -> Any:
    """Returns these blocks after every layer in them has split its weights, see `LayerModule`."""
    for _, module in list(nnx.iter_modules(blocks)):
        if isinstance(module, LayerModule):
            module.take_apart()
    return blocks


def _unstacked(blocks: Any, times: int) -> tuple[Any, list[Any]]:
    each = _each(blocks, times)
    return each[0][0], [params for _, params in each]
