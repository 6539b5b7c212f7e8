"""Caches of earlier positions, which mirror the layers, and their updates.

A layer never changes a cache. It returns an update, which the stack applies, once. Attention that
reads its own update returns the updated cache with it: applying it twice would make XLA copy the
cache.

Legend: B batch, L positions, M key positions, W slots of a cache, G kv heads, H head width.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from modjax.kernels import Side


class KVWrite(NamedTuple):
    """New keys and values (B, G, L, H) and their positions; row b has the first count_B[b].

    held: the cache with them, where the layer has applied the update already.
    """

    k_BGLH: jax.Array
    v_BGLH: jax.Array
    count_B: jax.Array
    positions_BL: jax.Array
    held: "KVCache | None" = None


class KVCache(NamedTuple):
    """Keys and values of one attention, in a ring of slots: the i-th of a row is in slot i mod W.

    k, v (B, G, W, H): keys are rotated by their positions already. length_B: how many each row has
    had, those that were overwritten included. positions_BW: their positions in the sequence.
    """

    k_BGWH: jax.Array
    v_BGWH: jax.Array
    length_B: jax.Array
    positions_BW: jax.Array

    @property
    def side(self) -> Side:
        """The positions that the slots hold."""
        filled_BW = jnp.arange(self.k_BGWH.shape[2])[None] < self.length_B[:, None]
        return Side(self.positions_BW, None, filled_BW)

    def read(
        self, write: KVWrite, *, ring: bool
    ) -> tuple[tuple[jax.Array, jax.Array, Side], KVWrite]:
        """Returns what new positions see, keys and values (B, G, M, H) and their side; the update.

        ring: a row may have more positions than the cache has slots.
        """
        if write.k_BGLH.shape[2] == 1 or not ring:
            # Written before it is read: XLA copies a cache that is read and then written.
            held = self.written(write)
            return (held.k_BGWH, held.v_BGWH, held.side), write._replace(held=held)
        # The last of several would overwrite keys that the first of them still see.
        new_1L = jnp.arange(write.k_BGLH.shape[2])[None]
        new = Side(write.positions_BL, None, new_1L < write.count_B[:, None])
        both = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), self.side, new)
        k_BGMH = jnp.concatenate([self.k_BGWH, write.k_BGLH], axis=2)
        v_BGMH = jnp.concatenate([self.v_BGWH, write.v_BGLH], axis=2)
        return (k_BGMH, v_BGMH, both), write

    def written(self, write: KVWrite, *, fresh: bool = False) -> Self:
        """Returns the cache with the new entries. fresh: there are no old ones."""
        if write.held is not None:
            return write.held  # type: ignore[return-value]
        slots, new = self.k_BGWH.shape[2], write.k_BGLH.shape[2]
        length_B = self.length_B + write.count_B
        if fresh and new <= slots:
            k_BGWH, v_BGWH = (_padded(x, 2, slots) for x in (write.k_BGLH, write.v_BGLH))
            positions_BW = _padded(write.positions_BL, 1, slots)
            return type(self)(k_BGWH, v_BGWH, length_B, positions_BW)
        place_1L, count_B1 = jnp.arange(new)[None], write.count_B[:, None]
        kept_BL = (place_1L < count_B1) & (place_1L >= count_B1 - slots)
        slot_BL = (self.length_B[:, None] + place_1L) % slots
        slot_BL = jnp.where(kept_BL, slot_BL, slots)  # beyond the end: dropped
        # An index per head: XLA makes a write at a single index a dynamic-update-slice, fuses that
        # into every reader, and copies the cache for each. Row by row: none leaves its shard.
        heads_G1 = jnp.arange(self.k_BGWH.shape[1])[:, None]

        def one(old_GWH, slot_L, new_GLH):
            return old_GWH.at[heads_G1, slot_L[None]].set(new_GLH, mode="drop")

        k_BGWH = jax.vmap(one)(self.k_BGWH, slot_BL, write.k_BGLH)
        v_BGWH = jax.vmap(one)(self.v_BGWH, slot_BL, write.v_BGLH)
        place = jax.vmap(lambda old_W, slot_L, new_L: old_W.at[slot_L].set(new_L, mode="drop"))
        positions_BW = place(self.positions_BW, slot_BL, write.positions_BL)
        return type(self)(k_BGWH, v_BGWH, length_B, positions_BW)


def written(cache: Any, write: Any, *, fresh: bool) -> Any:
    """Returns a cache, of any nesting, with its update applied."""
    if isinstance(cache, dict):
        return {name: written(part, write[name], fresh=fresh) for name, part in cache.items()}
    return cache.written(write, fresh=fresh) if hasattr(cache, "written") else cache


def unwritten(write: Any) -> Any:
    """Returns an update without caches that hold it: what a branch returns should be small."""
    return jax.tree.map(
        lambda part: part._replace(held=None) if isinstance(part, KVWrite) else part,
        write,
        is_leaf=lambda part: isinstance(part, KVWrite),
    )


def overflow(cache: Any) -> Any:
    """Returns the positions of each row that were dropped, summed over layers; 0: none can be."""
    if isinstance(cache, dict):
        return sum(map(overflow, cache.values()))
    return getattr(cache, "overflow_B", 0)


def _padded(x: jax.Array, dim: int, length: int) -> jax.Array:
    more = length - x.shape[dim]
    return jnp.pad(x, [(0, more if d == dim else 0) for d in range(x.ndim)])
