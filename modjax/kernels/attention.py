"""Softmax attention of queries over the keys that a mask shows to them.

Legend: B batch, L positions, M key positions, N heads, G kv heads, Q query heads of a kv head,
T rows, H head width. B may be 1 in a Side. T stands for Q and L.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from modjax.specs.layers.masks import Mask

# Queries are computed in chunks, each against the keys within the mask's reach only: at most so
# many chunks where the reach has no bound, one, and two, of MIN_QUERY_CHUNK queries or more. Of
# what a causal mask hides, four chunks leave out three quarters.
QUERY_CHUNKS, MIN_QUERY_CHUNK = (1, 4, 16), 128
LEAST = float(jnp.finfo(jnp.float32).min)


class Side(NamedTuple):
    """The positions of the queries, or of the keys, in their sequences.

    segments_BL: a query sees keys of its own segment; None: all are one segment.
    valid_BL: a key that is not valid is hidden; None: all are valid.
    """

    positions_BL: jax.Array
    segments_BL: jax.Array | None = None
    valid_BL: jax.Array | None = None


def attend(
    q_BNLH: jax.Array,
    k_BGMH: jax.Array,
    v_BGMH: jax.Array,
    mask: Mask,
    queries: Side,
    keys: Side | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Returns softmax attention, (B, N, L, H); 0 for a query that sees no key.

    q (B, N, L, H), k and v (B, G, M, H); N is a multiple of G. Scores and softmax are float32, the
    products take the inputs' dtype.
    keys: None: those of the queries' own positions, which ascend, invalid ones last.
    softcap: c of c tanh(s / c) on the scores s; None: no cap.
    """
    parts = []
    for rows, columns in _chunks(mask, q_BNLH.shape[2], k_BGMH.shape[2], own=keys is None):
        p_BGQLM, total_BGQL1, _ = _probabilities(
            q_BNLH, k_BGMH, mask, queries, keys, softcap, rows, columns
        )
        out_BGQLH = jnp.einsum(
            "BGQLM,BGMH->BGQLH", p_BGQLM.astype(v_BGMH.dtype), v_BGMH[:, :, columns]
        )
        # Normalising after the product with the values divides H numbers a query, not M.
        parts.append((out_BGQLH / total_BGQL1.astype(out_BGQLH.dtype)).astype(q_BNLH.dtype))
    out_BGQLH = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
    return out_BGQLH.reshape(q_BNLH.shape)


def received_attention(
    q_BNLH: jax.Array, k_BGMH: jax.Array, mask: Mask, positions: Side
) -> jax.Array:
    """Returns the attention that each position receives, relative to uniform attention.

    (B, L) float32: the mean over heads of sum_i a_ij / sum_i (1 / n_i), over the queries i that
    see position j, of which each sees n_i positions; 0 where none sees it. A-MoD (arXiv 2412.20875)
    sums the columns of attention that is not causal; under a causal mask those of early positions
    are longer, hence the division. No gradient passes.
    """
    q_BNLH, k_BGMH = jax.lax.stop_gradient((q_BNLH, k_BGMH))
    batch, _, length, _ = q_BNLH.shape
    received_BM = uniform_BM = jnp.zeros((batch, length), jnp.float32)
    for rows, columns in _chunks(mask, length, length, own=True):
        p_BGQLM, total_BGQL1, seen_BLM = _probabilities(
            q_BNLH, k_BGMH, mask, positions, None, None, rows, columns
        )
        column_BM = jnp.mean(jnp.sum(p_BGQLM / total_BGQL1, axis=3), axis=(1, 2))
        received_BM = received_BM.at[:, columns].add(column_BM)
        seen_BLM = seen_BLM.astype(jnp.float32)
        count_BL1 = jnp.maximum(jnp.sum(seen_BLM, axis=2, keepdims=True), 1)
        uniform_BM = uniform_BM.at[:, columns].add(jnp.sum(seen_BLM / count_BL1, axis=1))
    return received_BM / jnp.where(uniform_BM > 0, uniform_BM, 1)


def _chunks(mask: Mask, queries: int, keys: int, *, own: bool) -> list[tuple[slice, slice]]:
    """Returns which queries are computed together, and the keys that these may see.

    own: the keys are those of the queries' own positions. Since these ascend, two of them are at
    least as far apart as their places in the arrays: the reach bounds both.
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


def _probabilities(
    q_BNLH, k_BGMH, mask: Mask, queries: Side, keys: Side | None, softcap, rows: slice, columns
):
    """Returns attention before its normalisation, its sums, and which keys each query sees."""
    query = jax.tree.map(lambda leaf: leaf[:, rows], queries)
    key = jax.tree.map(lambda leaf: leaf[:, columns], queries if keys is None else keys)
    seen_BLM = mask.seen(query.positions_BL[:, :, None], key.positions_BL[:, None])
    if query.segments_BL is not None and key.segments_BL is not None:
        seen_BLM &= query.segments_BL[:, :, None] == key.segments_BL[:, None]
    if key.valid_BL is not None:
        seen_BLM &= key.valid_BL[:, None]
    q_BNLH, k_BGMH = q_BNLH[:, :, rows], k_BGMH[:, :, columns]
    batch, heads, length, head_dim = q_BNLH.shape
    kv_heads = k_BGMH.shape[1]
    q_BNLH = q_BNLH * jnp.asarray(1 / math.sqrt(head_dim), q_BNLH.dtype)
    # With two dims of queries, XLA's CPU backend transposes all keys of a cache at every step.
    # Training keeps both: one dim would be rounded otherwise.
    dims = (heads // kv_heads, length) if keys is None else (-1,)
    q_BGTH = q_BNLH.reshape(batch, kv_heads, *dims, head_dim)
    s_BGTM = jnp.einsum("BG...H,BGMH->BG...M", q_BGTH, k_BGMH, preferred_element_type=jnp.float32)
    s_BGQLM = s_BGTM.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    s_BGQLM = s_BGQLM if softcap is None else softcap * jnp.tanh(s_BGQLM / softcap)
    s_BGQLM = jnp.where(seen_BLM[:, None, None], s_BGQLM, -jnp.inf)
    # A query that sees no key has a finite maximum and a sum of 1, and so attends to nothing.
    top_BGQL1 = jax.lax.stop_gradient(jnp.max(s_BGQLM, axis=-1, keepdims=True, initial=LEAST))
    p_BGQLM = jnp.exp(s_BGQLM - top_BGQL1)
    total_BGQL1 = jnp.sum(p_BGQLM, axis=-1, keepdims=True)
    return p_BGQLM, jnp.where(total_BGQL1 > 0, total_BGQL1, 1), seen_BLM
