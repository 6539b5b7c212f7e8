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
    room = ((0, 0), (0, 0), (0, slots - k_BGKH.shape[2]), (0, 0))
    return KVCache(
        jnp.pad(k_BGKH, room), jnp.pad(v_BGKH, room), length_B.astype(jnp.int32),
        overflow_B.astype(jnp.int32),
    )  # fmt: skip


def append(cache: KVCache, k_BG1H: jax.Array, v_BG1H: jax.Array, write_B: jax.Array) -> KVCache:
    """Writes one token into the next slot of the rows that `write_B` names, which must have one."""
    batch, _, slots, _ = cache.k_BGMH.shape
    rows_B = jnp.arange(batch)
    slot_B = jnp.where(write_B, cache.length_B, slots)  # beyond the end: dropped
    return cache._replace(
        k_BGMH=cache.k_BGMH.at[rows_B, :, slot_B].set(k_BG1H[:, :, 0], mode="drop"),
        v_BGMH=cache.v_BGMH.at[rows_B, :, slot_B].set(v_BG1H[:, :, 0], mode="drop"),
        length_B=cache.length_B + write_B.astype(jnp.int32),
    )


def cached_attention(
    q_BN1H: jax.Array, k_BG1H: jax.Array, v_BG1H: jax.Array, cache: KVCache
) -> jax.Array:
    """Attention (B, N, 1, H) of one new token over the cached ones and itself.

    Scores and softmax are float32, the products take the inputs' dtype.
    """
    batch, heads, _, head_dim = q_BN1H.shape
    kv_heads, slots = cache.k_BGMH.shape[1:3]
    q_BGRH = q_BN1H.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    q_BGRH = q_BGRH * jnp.asarray(1 / math.sqrt(head_dim), q_BN1H.dtype)

    def scores(k_BGMH):
        return jnp.einsum("BGRH,BGMH->BGRM", q_BGRH, k_BGMH, preferred_element_type=jnp.float32)

    filled_B11M = (jnp.arange(slots)[None] < cache.length_B[:, None])[:, None, None]
    s_BGRM = jnp.where(filled_B11M, scores(cache.k_BGMH), -jnp.inf)
    own_BGR1 = scores(k_BG1H)
    top_BGR1 = jnp.maximum(jnp.max(s_BGRM, axis=-1, keepdims=True), own_BGR1)
    p_BGRM, own_BGR1 = jnp.exp(s_BGRM - top_BGR1), jnp.exp(own_BGR1 - top_BGR1)
    total_BGR1 = jnp.sum(p_BGRM, axis=-1, keepdims=True) + own_BGR1
    out_BGRH = jnp.einsum("BGRM,BGMH->BGRH", p_BGRM.astype(v_BG1H.dtype), cache.v_BGMH)
    out_BGRH += own_BGR1.astype(v_BG1H.dtype) * v_BG1H
    out_BGRH = (out_BGRH / total_BGR1.astype(out_BGRH.dtype)).astype(q_BN1H.dtype)
    return out_BGRH.reshape(batch, heads, 1, head_dim)
