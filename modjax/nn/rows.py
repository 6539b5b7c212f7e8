"""A decode step of some rows of a batch only.

Legend: B batch; P shards of the batch with R rows each, S of them run.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from modjax.nn.sharding import batch_shards


def run_rows(function: Callable[[Any], Any], inputs: Any, asked_B: jax.Array) -> Any:
    """function(inputs), of arrays (B, ...), in the rows that ask for it; others may hold zeros.

    The others are not computed: of a few compiled numbers of rows, the first that holds those that
    ask is run; where none asks, nothing is. Rows move within a shard of the batch, never between
    two.
    """
    shards = batch_shards(asked_B.shape[0])
    asked_PR = asked_B.reshape(shards, -1)
    rows = asked_PR.shape[1]
    order_PR = jnp.argsort(~asked_PR, axis=1, stable=True)
    sizes = [0, *(2**i for i in range(math.ceil(math.log2(rows)))), rows]
    none = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, inputs))

    def of(size: int) -> Callable[[], Any]:
        def branch():
            if size == 0:
                return none
            if size == rows:
                return function(inputs)
            order_PS = order_PR[:, :size]
            found = function(jax.tree.map(lambda leaf: _take(leaf, order_PS), inputs))
            return jax.tree.map(lambda old, new: _put(old, new, order_PS), none, found)

        return branch

    most = jnp.max(jnp.sum(asked_PR, axis=1))
    return jax.lax.switch(jnp.searchsorted(jnp.array(sizes), most), [of(s) for s in sizes])


def _take(leaf: jax.Array, order_PS: jax.Array) -> jax.Array:
    """Rows of a leaf (B, ...), within each of the P shards."""
    shards, size = order_PS.shape
    parts = leaf.reshape(shards, -1, *leaf.shape[1:])
    return jax.vmap(lambda part, order: part[order])(parts, order_PS).reshape(
        shards * size, *leaf.shape[1:]
    )


def _put(old: jax.Array, new: jax.Array, order_PS: jax.Array) -> jax.Array:
    """A leaf (B, ...) with those rows replaced."""
    shards = order_PS.shape[0]
    old_parts, new_parts = (x.reshape(shards, -1, *old.shape[1:]) for x in (old, new))
    put = jax.vmap(lambda old, new, order: old.at[order].set(new))
    return put(old_parts, new_parts, order_PS).reshape(old.shape)
