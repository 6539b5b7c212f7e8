"""Work on a selection of positions.

Legend: B batch, L positions, K selected positions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from modjax.nn.call import At, Call, Out, under
from modjax.nn.records import Inside, inside
from modjax.nn.routing import Selection, gather, scatter_add
from modjax.nn.sharding import constrain_stream


def within(
    selection: Selection, layer: Any, x: jax.Array, at: At, call: Call, cache: Any = None
) -> tuple[jax.Array, Out]:
    """Runs `layer` on the selected positions of x (B, L, ...) only, with their part of `at`.

    Returns what the layer reads, (B, K, ...), and its output: x (B, K, ...), which `scatter_add`
    puts in place; records, as of positions inside a selection; depth_BL, with this selection.
    """
    part, part_at = jax.tree.map(
        lambda leaf: gather(leaf, selection.indices_BK), (x, at._replace(valid_BL=None))
    )
    part, part_at = constrain_stream(part), part_at._replace(valid_BL=selection.valid_BK)
    out = layer(part, part_at, call.inside(0)._replace(selected=True), cache)
    taken_BK = jnp.where(selection.valid_BK, 1 + out.depth_BL, 0)
    none_BL = jnp.zeros(x.shape[:2], taken_BK.dtype)
    return part, out._replace(
        records=under("inner", inside(dict(out.records), selection.indices_BK, selection.valid_BK)),
        depth_BL=scatter_add(none_BL, selection.indices_BK, taken_BK),
    )


def widened(tree: Any, like: Any) -> Any:
    """Returns arrays of a smaller selection in the shapes that a larger one has.

    Positions that it lacks are not valid: they hold zeros, and their indices lie beyond all.
    """

    def one(node: Any, like: Any) -> Any:
        if not isinstance(node, Inside):
            return _padded(node, like.shape)
        more = jnp.arange(like.indices_BK.shape[-1], dtype=node.indices_BK.dtype)
        known = node.indices_BK.shape[-1]
        beyond = jnp.iinfo(more.dtype).max - len(more)
        indices_BK = _padded(node.indices_BK, like.indices_BK.shape)
        return Inside(
            widened(node.record, like.record),
            jnp.where(more < known, indices_BK, beyond + more),
            _padded(node.valid_BK, like.valid_BK.shape),
        )

    return jax.tree.map(one, tree, like, is_leaf=lambda node: isinstance(node, Inside))


def _padded(x: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    x = jnp.asarray(x)
    more = [(0, new - old) for old, new in zip(x.shape, shape, strict=True)]
    return jnp.pad(x, more) if any(after for _, after in more) else x
