"""Layers that run on a part of a batch: on selected positions of each row, or on some rows.

Legend: B batch, L positions, K selected positions, U parts, Z rows of a block, T rows. A part is a
shard of the batch with Z rows, of which T run.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from modjax.kernels import constrain_stream
from modjax.nn.cache import unwritten
from modjax.nn.call import At, Call, Out, under
from modjax.nn.records import Inside, inside
from modjax.nn.routing.selection import Selection, gather, scatter_add, wide
from modjax.sharding import batch_shards

# Returns a layer's update of the stream, from the scores and the layer's input and output.
Update = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def within(
    selection: Selection, layer: Any, x: jax.Array, at: At, call: Call, cache: Any = None
) -> tuple[jax.Array, Out]:
    """Runs `layer` on the selected positions of x (B, L, ...), gathered with their context.

    Returns the layer's input, (B, K, ...), and its output:
      x: (B, K, ...); the caller adds its update with `scatter_add`;
      records: wrapped as `Inside` of the selection;
      depth_BL: the layer's own, plus 1 at the selected positions.
    """
    indices_BK, padded = selection.indices_BK, selection.padded
    part, part_at = gather((x, at._replace(valid_BL=None)), indices_BK, padded=padded)
    part, part_at = constrain_stream(part), part_at._replace(valid_BL=selection.valid_BK)
    out = layer(part, part_at, call.inside(0)._replace(selected=True, layout="part"), cache)
    taken_BK = jnp.where(selection.valid_BK, 1 + out.depth_BL, 0)
    none_BL = jnp.zeros(x.shape[:2], taken_BK.dtype)
    return part, out._replace(
        records=under("inner", inside(dict(out.records), indices_BK, selection.valid_BK)),
        depth_BL=scatter_add(none_BL, indices_BK, taken_BK, padded=padded),
    )


def update_selected(
    selection: Selection, update: Update, layer: Any, x: jax.Array, at: At, call: Call, cache: Any
) -> Out:
    """Runs `layer` on the selected positions of x, and adds its updates there."""
    part, out = within(selection, layer, x, at, call, cache)
    change = update(selection.scores_BK, part, out.x)
    x_new = scatter_add(x, selection.indices_BK, change, padded=selection.padded)
    return Out(x_new, unwritten(out.write), out.records, {}, out.depth_BL)


def update_rows(
    selected_BL: jax.Array,
    scores_BL: jax.Array,
    update: Update,
    layer: Any,
    x: jax.Array,
    at: At,
    call: Call,
    cache: Any,
) -> Out:
    """Runs `layer` on each row with a selected position, and adds its updates at these positions.

    If there is no such row, the weights of the layer are not read. No record is reported.
    """

    def run(inputs: Any) -> Out:
        x, at, cache, scores_BL = inputs
        out = layer(x, at, call.inside(0), cache)
        change = update(scores_BL, x, out.x)
        change = jnp.where(wide(at.valid_BL, x), change, jnp.zeros_like(x))
        depth_BL = jnp.where(at.valid_BL, 1 + out.depth_BL, 0)
        return Out(change, unwritten(out.write), {}, {}, depth_BL)

    at = at._replace(valid_BL=selected_BL)
    at = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(x), *leaf.shape[1:])), at)
    out = run_rows(run, (x, at, cache, scores_BL), jnp.any(selected_BL, axis=1))
    return out._replace(x=x + out.x)


def widened(tree: Any, like: Any) -> Any:
    """Returns the arrays of a selection, padded to the shapes of a larger one, `like`.

    The added positions are not valid: they contain zeros, and their indices lie beyond L.
    """

    def one(node: Any, like: Any) -> Any:
        if not isinstance(node, Inside):
            more = [(0, m - n) for n, m in zip(jnp.shape(node), like.shape, strict=True)]
            return jnp.pad(node, more) if more else jnp.asarray(node)
        record, indices_BK, valid_BK = map(widened, vars(node).values(), vars(like).values())
        place_K = jnp.arange(valid_BK.shape[-1], dtype=indices_BK.dtype)
        beyond_K = jnp.iinfo(place_K.dtype).max - len(place_K) + place_K
        known_K = place_K < node.valid_BK.shape[-1]
        return Inside(record, jnp.where(known_K, indices_BK, beyond_K), valid_BK)

    return jax.tree.map(one, tree, like, is_leaf=lambda node: isinstance(node, Inside))


def run_rows(function: Callable[[Any], Any], inputs: Any, active_B: jax.Array) -> Any:
    """Returns function(inputs), of arrays (B, ...), in the active rows.

    Other rows are zeros, or the function's output if they ran too: mask them. The function is
    compiled for a few numbers of rows, and the smallest one that fits the active rows runs. If no
    row is active, it does not run. Rows move within a shard of the batch only.
    """
    shards = batch_shards(active_B.shape[0])
    active_UZ = active_B.reshape(shards, -1)
    rows = active_UZ.shape[1]
    order_UZ = jnp.argsort(~active_UZ, axis=1, stable=True)
    sizes = [0, *(2**i for i in range(math.ceil(math.log2(rows)))), rows]
    none = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, inputs))

    def parts(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(shards, -1, *leaf.shape[1:])

    def run(size: int) -> Any:
        if size in (0, rows):
            return function(inputs) if size else none
        order_UT = order_UZ[:, :size]

        def take(leaf: jax.Array) -> jax.Array:
            taken = jax.vmap(lambda part_Z, order_T: part_Z[order_T])(parts(leaf), order_UT)
            return taken.reshape(shards * size, *leaf.shape[1:])

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            each = jax.vmap(lambda old_Z, new_T, order_T: old_Z.at[order_T].set(new_T))
            return each(parts(old), parts(new), order_UT).reshape(old.shape)

        return jax.tree.map(put, none, function(jax.tree.map(take, inputs)))

    largest = jnp.max(jnp.sum(active_UZ, axis=1))
    branches = [functools.partial(run, size) for size in sizes]
    return jax.lax.switch(jnp.searchsorted(jnp.array(sizes), largest), branches)
