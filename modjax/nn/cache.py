"""Key-value caches: every block of a model keeps the positions that it processed, row by row.

Legend: B batch, N heads, G kv heads, R = N/G, M slots, K positions, H head width, D model width.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Keys and values of one block; row b has filled its first length_B[b] slots.

    k, v (B, G, M, H): keys are rotated by their original positions already, so that a slot need
    not know its position. overflow_B: tokens that found no slot, and passed the block by.
    """

    k_BGMH: jax.Array
    v_BGMH: jax.Array
    length_B: jax.Array
    overflow_B: jax.Array


def filled(
    k_BGKH: jax.Array, v_BGKH: jax.Array, length_B: jax.Array, overflow_B: jax.Array, slots: int
) -> KVCache:
    """A cache of `slots` >= K slots; of the K given, row b uses the first length_B[b]."""
    k_BGMH, v_BGMH = with_slots((k_BGKH, v_BGKH), slots)
    return KVCache(k_BGMH, v_BGMH, length_B.astype(jnp.int32), overflow_B.astype(jnp.int32))


def with_slots(kv_BGKH: tuple[jax.Array, jax.Array], slots: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values with empty slots after the K given."""
    room = ((0, 0), (0, 0), (0, slots - kv_BGKH[0].shape[2]), (0, 0))
    return jnp.pad(kv_BGKH[0], room), jnp.pad(kv_BGKH[1], room)


def append(cache: KVCache, k_BG1H: jax.Array, v_BG1H: jax.Array, write_B: jax.Array) -> KVCache:
    """Writes one token into the next slot of the rows that `write_B` names, which must have one."""
    batch, kv_heads, slots, _ = cache.k_BGMH.shape
    # One index per row and head: XLA makes a write at a single index a dynamic-update-slice, fuses
    # that into every reader, and copies the cache for each.
    rows_B1, heads_1G = jnp.arange(batch)[:, None], jnp.arange(kv_heads)[None]
    slot_B1 = jnp.where(write_B, cache.length_B, slots)[:, None]  # beyond the end: dropped
    k_BGMH, v_BGMH = (
        old.at[rows_B1, heads_1G, slot_B1].set(new_BG1H[:, :, 0], mode="drop")
        for old, new_BG1H in ((cache.k_BGMH, k_BG1H), (cache.v_BGMH, v_BG1H))
    )
    length_B = cache.length_B + write_B.astype(jnp.int32)
    return cache._replace(k_BGMH=k_BGMH, v_BGMH=v_BGMH, length_B=length_B)


def last(cache: KVCache) -> tuple[jax.Array, jax.Array]:
    """Keys and values (B, G, 1, H) of the slot that each row filled last."""
    slot_B111 = jnp.maximum(cache.length_B - 1, 0)[:, None, None, None]
    k_BG1H, v_BG1H = (
        jnp.take_along_axis(leaf, slot_B111, axis=2) for leaf in (cache.k_BGMH, cache.v_BGMH)
    )
    return k_BG1H, v_BG1H


def cached_attention(q_BN1H: jax.Array, cache: KVCache) -> jax.Array:
    """Attention (B, N, 1, H) of each row's last token over what its cache holds.

    Scores and softmax are float32, the products take the inputs' dtype.
    """
    batch, heads, _, head_dim = q_BN1H.shape
    kv_heads, slots = cache.k_BGMH.shape[1:3]
    q_BGRH = q_BN1H.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    q_BGRH = q_BGRH * jnp.asarray(1 / math.sqrt(head_dim), q_BN1H.dtype)
    s_BGRM = jnp.einsum("BGRH,BGMH->BGRM", q_BGRH, cache.k_BGMH, preferred_element_type=jnp.float32)
    filled_B11M = (jnp.arange(slots)[None] < cache.length_B[:, None])[:, None, None]
    s_BGRM = jnp.where(filled_B11M, s_BGRM, -jnp.inf)
    p_BGRM = jnp.exp(s_BGRM - jnp.max(s_BGRM, axis=-1, keepdims=True))
    total_BGR1 = jnp.sum(p_BGRM, axis=-1, keepdims=True)
    out_BGRH = jnp.einsum("BGRM,BGMH->BGRH", p_BGRM.astype(q_BN1H.dtype), cache.v_BGMH)
    out_BGRH = (out_BGRH / total_BGR1.astype(out_BGRH.dtype)).astype(q_BN1H.dtype)
    return out_BGRH.reshape(batch, heads, 1, head_dim)
