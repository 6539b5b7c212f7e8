"""What layers keep of earlier positions: caches that mirror the layers, and what is written there.

A layer never changes a cache; it returns what is to be written, and the stack writes it, once. An
attention that has to read what it writes returns the cache with it: two equal writes would cost a
copy of the cache each wherever XLA does not see that they are equal.

Legend: B batch, L new positions, G kv heads, M slots, H head width.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp


class KVWrite(NamedTuple):
    """New keys and values (B, G, L, H), of which row b has count_B[b]; positions where needed.

    held: the cache with them, where the layer has already written them.
    """

    k_BGLH: jax.Array
    v_BGLH: jax.Array
    count_B: jax.Array
    positions_BL: jax.Array | None
    held: "KVCache | None" = None

    def padded(self, length: int) -> Self:
        """The same, `length` wide."""
        more = length - self.k_BGLH.shape[2]
        k_BGLH, v_BGLH = (_pad(x, 2, more) for x in (self.k_BGLH, self.v_BGLH))
        positions_BL = None if self.positions_BL is None else _pad(self.positions_BL, 1, more)
        return self._replace(k_BGLH=k_BGLH, v_BGLH=v_BGLH, positions_BL=positions_BL)


class KVCache(NamedTuple):
    """Keys and values of one attention; row b has filled its first length_B[b] slots.

    k, v (B, G, M, H): keys are rotated by their original positions already. positions_BM: those,
    where a window asks for them.
    """

    k_BGMH: jax.Array
    v_BGMH: jax.Array
    length_B: jax.Array
    positions_BM: jax.Array | None

    def written(self, write: KVWrite, *, fresh: bool = False) -> Self:
        """With the new entries after the old ones. fresh: there are no old ones."""
        if write.held is not None:
            return write.held  # type: ignore[return-value]
        slots, new = self.k_BGMH.shape[2], write.k_BGLH.shape[2]
        length_B = self.length_B + write.count_B
        if fresh:
            wide = write.padded(slots)
            return self._replace(
                k_BGMH=wide.k_BGLH,
                v_BGMH=wide.v_BGLH,
                length_B=length_B,
                positions_BM=wide.positions_BL,
            )
        offset_1L = jnp.arange(new)[None]
        slot_BL = jnp.where(
            offset_1L < write.count_B[:, None], self.length_B[:, None] + offset_1L, slots
        )  # beyond the end: dropped
        # An index per head: XLA makes a write at a single index a dynamic-update-slice, fuses that
        # into every reader, and copies the cache for each. Row by row: none leaves its shard.
        heads_G1 = jnp.arange(self.k_BGMH.shape[1])[:, None]

        def one(old_GMH, slot_L, new_GLH):
            return old_GMH.at[heads_G1, slot_L[None]].set(new_GLH, mode="drop")

        k_BGMH = jax.vmap(one)(self.k_BGMH, slot_BL, write.k_BGLH)
        v_BGMH = jax.vmap(one)(self.v_BGMH, slot_BL, write.v_BGLH)
        positions_BM = self.positions_BM
        if positions_BM is not None:
            place = jax.vmap(lambda old_M, slot_L, new_L: old_M.at[slot_L].set(new_L, mode="drop"))
            positions_BM = place(positions_BM, slot_BL, write.positions_BL)
        return type(self)(k_BGMH, v_BGMH, length_B, positions_BM)


def written(cache: Any, write: Any, *, fresh: bool) -> Any:
    """A cache, of any nesting, with what is to be written."""
    if isinstance(cache, dict):
        return {name: written(part, write[name], fresh=fresh) for name, part in cache.items()}
    return cache.written(write, fresh=fresh) if hasattr(cache, "written") else cache


def unwritten(write: Any) -> Any:
    """What is to be written, without caches that hold it: what a branch returns should be small."""
    return jax.tree.map(
        lambda part: part._replace(held=None) if isinstance(part, KVWrite) else part,
        write,
        is_leaf=lambda part: isinstance(part, KVWrite),
    )


def overflow(cache: Any) -> Any:
    """Positions of each row that found no slot, summed over layers; 0 where none can be missed."""
    if isinstance(cache, dict):
        return sum(map(overflow, cache.values()))
    return getattr(cache, "overflow_B", 0)


def _pad(x: jax.Array, dim: int, more: int) -> jax.Array:
    return jnp.pad(x, [(0, more if d == dim else 0) for d in range(x.ndim)])
