"""Softmax attention as XLA compiles it, on every platform and for all inputs.

Legend: B batch, L positions, M key positions, N heads, G kv heads, Q query heads of a kv head,
T rows, H head width. B may be 1 in a Side. T is Q and L, as one dim or two.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from modjax.kernels.scoring import Scoring, Side
from modjax.specs.masks import Mask

# Queries are computed in chunks, each with the keys within the mask's reach only. QUERY_CHUNKS has
# the most chunks for a mask whose reach has no bound, one bound, and two. A chunk has at least
# MIN_QUERY_CHUNK queries. Four chunks leave out three quarters of what a causal mask hides.
QUERY_CHUNKS, MIN_QUERY_CHUNK = (1, 4, 16), 128
KEY_BLOCK = 512
LEAST = float(jnp.finfo(jnp.float32).min)


def attend(
    q_BNLH: jax.Array,
    k_BGMH: jax.Array,
    v_BGMH: jax.Array,
    scoring: Scoring,
    queries: Side,
    keys: Side | None,
    places_BL: jax.Array | None,
) -> jax.Array:
    """Returns `modjax.kernels.attend`."""
    own = keys is None
    ahead = scoring.mask.reach[1]
    if keys is not None and places_BL is not None and ahead is not None:
        ends_BL = places_BL + ahead + 1
        return _attend_by_blocks(q_BNLH, k_BGMH, v_BGMH, scoring, queries, keys, ends_BL)
    keys = queries if keys is None else keys
    parts = []
    for rows, columns in _chunks(scoring.mask, q_BNLH.shape[2], k_BGMH.shape[2], own=own):
        seen_BLM = _seen(scoring.mask, queries.part(rows), keys.part(columns))
        scored = q_BNLH[:, :, rows], k_BGMH[:, :, columns], seen_BLM
        p_BGQLM, total_BGQL1 = _probabilities(*scored, scoring, own=own)
        value_BGMH = v_BGMH[:, :, columns]
        out_BGQLH = jnp.einsum("BGQLM,BGMH->BGQLH", p_BGQLM.astype(v_BGMH.dtype), value_BGMH)
        out_BGQLH = checkpoint_name(out_BGQLH, "context")  # the gradient of the division reads it
        # Normalising after the product with the values divides H numbers a query, not M.
        parts.append((out_BGQLH / total_BGQL1.astype(out_BGQLH.dtype)).astype(q_BNLH.dtype))
    out_BGQLH = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
    return out_BGQLH.reshape(q_BNLH.shape)


def received_attention(
    q_BNLH: jax.Array, k_BGMH: jax.Array, scoring: Scoring, positions: Side
) -> jax.Array:
    """Returns the attention that each position receives, relative to uniform attention.

    The result is (B, L) float32: the mean over heads of sum_i a_ij / sum_i (1 / n_i). The sums are
    over the queries i that see position j, and n_i is the number of positions that query i sees.
    A position that no query sees gets 0. A-MoD (arXiv 2412.20875) sums the columns of attention
    without a causal mask. Under one, more queries see early positions, hence the division. No
    gradient passes.
    """
    q_BNLH, k_BGMH = jax.lax.stop_gradient((q_BNLH, k_BGMH))
    batch, _, length, _ = q_BNLH.shape
    received_BM = uniform_BM = jnp.zeros((batch, length), jnp.float32)
    for rows, columns in _chunks(scoring.mask, length, length, own=True):
        seen_BLM = _seen(scoring.mask, positions.part(rows), positions.part(columns))
        scored = q_BNLH[:, :, rows], k_BGMH[:, :, columns], seen_BLM
        p_BGQLM, total_BGQL1 = _probabilities(*scored, scoring, own=True)
        column_BM = jnp.mean(jnp.sum(p_BGQLM / total_BGQL1, axis=3), axis=(1, 2))
        received_BM = received_BM.at[:, columns].add(column_BM)
        seen_BLM = seen_BLM.astype(jnp.float32)
        count_BL1 = jnp.maximum(jnp.sum(seen_BLM, axis=2, keepdims=True), 1)
        uniform_BM = uniform_BM.at[:, columns].add(jnp.sum(seen_BLM / count_BL1, axis=1))
    return received_BM / jnp.where(uniform_BM > 0, uniform_BM, 1)


def _chunks(mask: Mask, queries: int, keys: int, *, own: bool) -> list[tuple[slice, slice]]:
    """Returns slices of the queries of each chunk, and of the keys that they may see.

    own: whether the keys are at the queries' own positions. These ascend, so two positions are at
    least as far apart as their places in the arrays. The mask's reach therefore bounds the places
    too.
    """
    back, ahead = mask.reach if own else (None, None)
    most = QUERY_CHUNKS[(back is not None) + (ahead is not None)]
    size = max(MIN_QUERY_CHUNK if most > 1 else queries, math.ceil(queries / most))
    found = []
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        first = 0 if back is None else max(0, start - back)
        last = keys if ahead is None else min(keys, stop + ahead)
        found.append((slice(start, stop), slice(first, last)))
    return found


def _seen(mask: Mask, queries: Side, keys: Side) -> jax.Array:
    """Returns which keys each query sees, (B, L, M) bool."""
    seen_BLM = mask.seen(queries.positions_BL[:, :, None], keys.positions_BL[:, None])
    if queries.segments_BL is not None and keys.segments_BL is not None:
        seen_BLM &= queries.segments_BL[:, :, None] == keys.segments_BL[:, None]
    return seen_BLM if keys.valid_BL is None else seen_BLM & keys.valid_BL[:, None]


def _attend_by_blocks(
    q_BNLH: jax.Array,
    k_BGMH: jax.Array,
    v_BGMH: jax.Array,
    scoring: Scoring,
    queries: Side,
    keys: Side,
    ends_BL: jax.Array,
) -> jax.Array:
    """Returns `attend`, but reads the keys in blocks, up to the last that a chunk may see.

    ends_BL: the place after the last key that each query may see.

    The softmax is that of FlashAttention (arXiv 2205.14135, section 3.1): the output so far is
    scaled by exp(old - new) when a block raises the maximum of the scores.
    """
    parts, (batch, heads, length, head_dim) = [], q_BNLH.shape
    kv_heads, number, block = *k_BGMH.shape[1:3], min(KEY_BLOCK, k_BGMH.shape[2])
    for start in range(0, length, MIN_QUERY_CHUNK):
        rows = slice(start, start + MIN_QUERY_CHUNK)
        rows_BNLH, side = q_BNLH[:, :, rows], queries.part(rows)

        def add(i: jax.Array, sums: Any, rows_BNLH: Any = rows_BNLH, side: Side = side) -> Any:
            top_BGQL1, total_BGQL1, out_BGQLH = sums
            first = jnp.minimum(i * block, number - block)  # the last block may overlap another
            cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first)
            key_BGMH, value_BGMH = (cut(x, slice_size=block, axis=2) for x in (k_BGMH, v_BGMH))
            part = jax.tree.map(lambda x: cut(x, slice_size=block, axis=1), keys)
            new_1M = first + jnp.arange(block)[None] >= i * block
            seen_BLM = _seen(scoring.mask, side, part) & new_1M[:, None]
            s_BGQLM = _scores(rows_BNLH, key_BGMH, seen_BLM, scoring, own=False)
            most_BGQL1 = jnp.maximum(top_BGQL1, jnp.max(s_BGQLM, axis=-1, keepdims=True))
            p_BGQLM, kept_BGQL1 = jnp.exp(s_BGQLM - most_BGQL1), jnp.exp(top_BGQL1 - most_BGQL1)
            new_BGQLH = jnp.einsum(
                "BGQLM,BGMH->BGQLH",
                p_BGQLM.astype(value_BGMH.dtype),
                value_BGMH,
                preferred_element_type=jnp.float32,
            )
            total_BGQL1 = kept_BGQL1 * total_BGQL1 + jnp.sum(p_BGQLM, axis=-1, keepdims=True)
            return most_BGQL1, total_BGQL1, kept_BGQL1 * out_BGQLH + new_BGQLH

        zeros = jnp.zeros((batch, kv_heads, heads // kv_heads, rows_BNLH.shape[2], head_dim))
        none_BGQL1 = zeros[..., :1]
        last = jnp.minimum(jnp.max(ends_BL[:, rows]), number)
        sums = jnp.full_like(none_BGQL1, LEAST), none_BGQL1, zeros
        _, total_BGQL1, out_BGQLH = jax.lax.fori_loop(0, -(-last // block), add, sums)
        out_BGQLH /= jnp.where(total_BGQL1 > 0, total_BGQL1, 1)
        parts.append(out_BGQLH.astype(q_BNLH.dtype).reshape(rows_BNLH.shape))
    return jnp.concatenate(parts, axis=2)


def _probabilities(
    q_BNLH: jax.Array, k_BGMH: jax.Array, seen_BLM: jax.Array, scoring: Scoring, *, own: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns attention before normalisation, (B, G, Q, L, M), and its sums. own: see `_chunks`."""
    s_BGQLM = _scores(q_BNLH, k_BGMH, seen_BLM, scoring, own=own)
    # A query that sees no key has a finite maximum and a sum of 1, and so attends to nothing.
    top_BGQL1 = jax.lax.stop_gradient(jnp.max(s_BGQLM, axis=-1, keepdims=True, initial=LEAST))
    p_BGQLM = jnp.exp(s_BGQLM - top_BGQL1)
    total_BGQL1 = jnp.sum(p_BGQLM, axis=-1, keepdims=True)
    return p_BGQLM, jnp.where(total_BGQL1 > 0, total_BGQL1, 1)


def _scores(
    q_BNLH: jax.Array, k_BGMH: jax.Array, seen_BLM: jax.Array, scoring: Scoring, *, own: bool
) -> jax.Array:
    """Returns the scores in float32, (B, G, Q, L, M), -inf for hidden keys. own: see `_chunks`."""
    batch, heads, length, head_dim = q_BNLH.shape
    kv_heads, softcap = k_BGMH.shape[1], scoring.softcap
    q_BNLH = q_BNLH * jnp.asarray(scoring.factor(head_dim), q_BNLH.dtype)
    # With two dims of queries, XLA's CPU backend transposes all keys of a cache at every step.
    # Training keeps both: one dim would be rounded otherwise.
    dims = (heads // kv_heads, length) if own else (-1,)
    q_BGTH = q_BNLH.reshape(batch, kv_heads, *dims, head_dim)
    s_BGTM = jnp.einsum("BG...H,BGMH->BG...M", q_BGTH, k_BGMH, preferred_element_type=jnp.float32)
    s_BGQLM = s_BGTM.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    s_BGQLM = s_BGQLM if softcap is None else softcap * jnp.tanh(s_BGQLM / softcap)
    return jnp.where(seen_BLM[:, None, None], s_BGQLM, -jnp.inf)
