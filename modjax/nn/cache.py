"""Caches of earlier positions, which mirror the layers, and their updates.

A layer never changes a cache. It returns an update, which the stack applies once. Attention reads
its own update, so it also returns the updated cache: applying the update twice would make XLA copy
the cache.

Legend: B batch, L positions, M key positions, W slots of a cache, G kv heads, H head width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from modjax.errors import require
from modjax.kernels import Side
from modjax.nn.routing.selection import wide


class LayerCache:
    """Base class of the cache of one layer: a pytree, whose arrays begin with the batch."""

    def written(self, write: Any, *, fresh: bool = False) -> Self:
        """Returns the cache with an update applied. fresh: the cache is empty."""
        raise NotImplementedError

    def overflow(self) -> jax.Array | int:
        """Returns how many positions of each row were dropped, (B,), or 0 if none can be."""
        return 0


class KVWrite(NamedTuple):
    """New keys and values of one attention.

    k, v: (B, G, L, H).
    count_B: number of new positions in each row; they come first, before padding.
    positions_BL: positions in the sequence.
    updated: the cache with this update, if the layer has applied it already.
    """

    k_BGLH: jax.Array
    v_BGLH: jax.Array
    count_B: jax.Array
    positions_BL: jax.Array
    updated: "KVCache | None" = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache(LayerCache):
    """Keys and values of one attention, in a ring buffer: key i of a row is in slot i mod W.

    k, v: (B, G, W, H). The keys are rotated already.
    length_B: number of keys written to each row, including those that were overwritten.
    positions_BW: positions in the sequence.
    """

    k_BGWH: jax.Array
    v_BGWH: jax.Array
    length_B: jax.Array
    positions_BW: jax.Array

    @property
    def side(self) -> Side:
        """The positions of the slots, and which slots are filled."""
        filled_BW = jnp.arange(self.k_BGWH.shape[2])[None] < self.length_B[:, None]
        return Side(self.positions_BW, None, filled_BW)

    def read(
        self, write: KVWrite, *, ring: bool
    ) -> tuple[tuple[jax.Array, jax.Array, Side], KVWrite]:
        """Returns the (keys, values, side) that new queries may see, and the update.

        The keys and values are (B, G, M, H).
        ring: whether a row may have more positions than the cache has slots.
        """
        if write.k_BGLH.shape[2] == 1 or not ring:
            # Written before it is read: XLA copies a cache that is read and then written.
            cache = self.written(write)
            return (cache.k_BGWH, cache.v_BGWH, cache.side), write._replace(updated=cache)
        # The last of several positions would overwrite keys that the first of them still see.
        new_1L = jnp.arange(write.k_BGLH.shape[2])[None]
        new = Side(write.positions_BL, None, new_1L < write.count_B[:, None])
        both = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), self.side, new)
        k_BGMH = jnp.concatenate([self.k_BGWH, write.k_BGLH], axis=2)
        v_BGMH = jnp.concatenate([self.v_BGWH, write.v_BGLH], axis=2)
        return (k_BGMH, v_BGMH, both), write

    def written(self, write: KVWrite, *, fresh: bool = False) -> "KVCache":
        if write.updated is not None:
            return write.updated
        slots, new = self.k_BGWH.shape[2], write.k_BGLH.shape[2]
        length_B = self.length_B + write.count_B
        if fresh and new <= slots:
            empty = (0, slots - new)
            padding = (0, 0), (0, 0), empty, (0, 0)
            k_BGWH, v_BGWH = (jnp.pad(x, padding) for x in (write.k_BGLH, write.v_BGLH))
            return KVCache(k_BGWH, v_BGWH, length_B, jnp.pad(write.positions_BL, ((0, 0), empty)))
        place_1L, count_B1 = jnp.arange(new)[None], write.count_B[:, None]
        stays_BL = (place_1L < count_B1) & (place_1L >= count_B1 - slots)
        slot_BL = (self.length_B[:, None] + place_1L) % slots
        slot_BL = jnp.where(stays_BL, slot_BL, slots)  # beyond the end: not written
        # An index per head: XLA makes a write at a single index a dynamic-update-slice, fuses that
        # into every reader, and copies the cache for each. Row by row: none leaves its shard.
        heads_G1 = jnp.arange(self.k_BGWH.shape[1])[:, None]

        def one(old_GWH, slot_L, new_GLH):
            return old_GWH.at[heads_G1, slot_L[None]].set(new_GLH, mode="drop")

        k_BGWH = jax.vmap(one)(self.k_BGWH, slot_BL, write.k_BGLH)
        v_BGWH = jax.vmap(one)(self.v_BGWH, slot_BL, write.v_BGLH)
        place = jax.vmap(lambda old_W, slot_L, new_L: old_W.at[slot_L].set(new_L, mode="drop"))
        positions_BW = place(self.positions_BW, slot_BL, write.positions_BL)
        return KVCache(k_BGWH, v_BGWH, length_B, positions_BW)


def written(cache: Any, write: Any, *, fresh: bool) -> Any:
    """Returns a cache with its update applied. It is a LayerCache, a dictionary of them, or ()."""
    if isinstance(cache, dict):
        return {name: written(part, write[name], fresh=fresh) for name, part in cache.items()}
    if isinstance(cache, LayerCache):
        return cache.written(write, fresh=fresh)
    accepted = "must be a modjax.nn.LayerCache, a dictionary of them, or () for no cache"
    require(isinstance(cache, tuple) and not cache, "the cache of a layer", type(cache), accepted)
    return cache


def overflow(cache: Any) -> Any:
    """Returns how many positions of each row a cache dropped, (B,), or 0 if none can be."""
    if isinstance(cache, dict):
        return sum(map(overflow, cache.values()))
    return cache.overflow() if isinstance(cache, LayerCache) else 0


def unwritten(write: Any) -> Any:
    """Returns an update without the updated caches in it, so that a branch returns few arrays."""

    def one(part: Any) -> Any:
        return part._replace(updated=None) if isinstance(part, KVWrite) else part

    return jax.tree.map(one, write, is_leaf=lambda part: isinstance(part, KVWrite))


def where_read(read_B: jax.Array, new: Any, old: Any) -> Any:
    """Returns the new arrays (B, ...) in rows where read_B > 0, and the old ones elsewhere."""
    return jax.tree.map(lambda n, o: jnp.where(wide(read_B > 0, o), n, o), new, old)
