"""Attention behind one door: `attend`, with what each query may see as data.

Legend: B batch, L query positions, M key positions or slots of a cache, N heads, G kv heads,
R = N/G, Q = R * L, H head width.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Queries are processed in up to four chunks of at least this many positions, each against the
# keys up to its end: of the future that the mask hides, three quarters are never computed.
QUERY_CHUNKS, MIN_QUERY_CHUNK = 4, 128


class Mask(NamedTuple):
    """What each query may see: keys that do not come after it in the arrays, and of those

    segments_BL: keys of its own segment (queries and keys are the same positions); None, all.
    window: keys whose position is less than `window` before its own; None, all.
    positions_BL, key_positions_BM: those positions, for a window; the keys' where they differ.
    start_B: for keys in a cache: how many of its slots come before the first query. None: queries
      and keys are the same positions.
    """

    segments_BL: jax.Array | None = None
    window: int | None = None
    positions_BL: jax.Array | None = None
    key_positions_BM: jax.Array | None = None
    start_B: jax.Array | None = None


def attend(
    q_BNLH: jax.Array,
    k_BGMH: jax.Array,
    v_BGMH: jax.Array,
    mask: Mask,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention, (B, N, L, H), over what `mask` lets each query see, at least itself.

    q (B, N, L, H), k and v (B, G, M, H); N is a multiple of G. Scores and softmax are float32, the
    products take the inputs' dtype. softcap: c of c tanh(s / c) on the scores s.
    """
    if mask.start_B is not None:
        return _cached(q_BNLH, k_BGMH, v_BGMH, mask, softcap)
    chunks = []
    for start, stop in _query_chunks(q_BNLH.shape[2]):
        p_BGRLM, total_BGRL1, _ = _probabilities(q_BNLH, k_BGMH, mask, softcap, start, stop)
        out_BGRLH = jnp.einsum(
            "BGRLM,BGMH->BGRLH", p_BGRLM.astype(v_BGMH.dtype), v_BGMH[:, :, :stop]
        )
        # Normalising after the product with the values divides H numbers a row, not M.
        chunks.append((out_BGRLH / total_BGRL1.astype(out_BGRLH.dtype)).astype(q_BNLH.dtype))
    out_BGRLH = chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=3)
    return out_BGRLH.reshape(q_BNLH.shape)


def received_attention(q_BNLH: jax.Array, k_BGMH: jax.Array, mask: Mask) -> jax.Array:
    """Attention that each position receives, relative to what uniform attention would give it.

    (B, L) float32: the mean over heads of sum_i a_ij / sum_i (1 / n_i), over the queries i that
    see position j, of which each sees n_i positions. A-MoD (arXiv 2412.20875) sums the columns of
    attention that is not causal; here those of early positions are longer, hence the division.
    No gradient passes.
    """
    q_BNLH, k_BGMH = jax.lax.stop_gradient((q_BNLH, k_BGMH))
    batch, _, length, _ = q_BNLH.shape
    received_BM = uniform_BM = jnp.zeros((batch, length), jnp.float32)
    for start, stop in _query_chunks(length):
        p_BGRLM, total_BGRL1, mask_BLM = _probabilities(q_BNLH, k_BGMH, mask, None, start, stop)
        column_BM = jnp.mean(jnp.sum(p_BGRLM / total_BGRL1, axis=3), axis=(1, 2))
        received_BM = received_BM.at[:, :stop].add(column_BM)
        mask_BLM = mask_BLM.astype(jnp.float32)
        share_BM = jnp.sum(mask_BLM / jnp.sum(mask_BLM, axis=2, keepdims=True), axis=1)
        uniform_BM = uniform_BM.at[:, :stop].add(share_BM)
    return received_BM / uniform_BM


def _query_chunks(length: int) -> list[tuple[int, int]]:
    chunk = max(MIN_QUERY_CHUNK, math.ceil(length / QUERY_CHUNKS))
    return [(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _probabilities(q_BNLH, k_BGMH, mask: Mask, softcap, start, stop):
    """Attention of queries start:stop before normalisation, its sums, and what they see."""
    batch, heads, _, head_dim = q_BNLH.shape
    kv_heads = k_BGMH.shape[1]
    q_BNLH = q_BNLH[:, :, start:stop] * jnp.asarray(1 / math.sqrt(head_dim), q_BNLH.dtype)
    q_BGRLH = q_BNLH.reshape(batch, kv_heads, heads // kv_heads, stop - start, head_dim)
    seen_BLM = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :])[None]
    if mask.segments_BL is not None:
        segments_BL = mask.segments_BL
        same_BLM = segments_BL[:, start:stop, None] == segments_BL[:, None, :stop]
        seen_BLM = seen_BLM & same_BLM
    if mask.window is not None and mask.positions_BL is not None:
        positions_BL = mask.positions_BL
        away_BLM = positions_BL[:, start:stop, None] - positions_BL[:, None, :stop]
        seen_BLM = seen_BLM & (away_BLM < mask.window)
    s_BGRLM = jnp.einsum(
        "BGRLH,BGMH->BGRLM", q_BGRLH, k_BGMH[:, :, :stop], preferred_element_type=jnp.float32
    )
    s_BGRLM = jnp.where(seen_BLM[:, None, None], _capped(s_BGRLM, softcap), -jnp.inf)
    top_BGRL1 = jax.lax.stop_gradient(jnp.max(s_BGRLM, axis=-1, keepdims=True))
    p_BGRLM = jnp.exp(s_BGRLM - top_BGRL1)
    return p_BGRLM, jnp.sum(p_BGRLM, axis=-1, keepdims=True), seen_BLM


def _cached(q_BNLH, k_BGMH, v_BGMH, mask: Mask, softcap):
    batch, heads, length, head_dim = q_BNLH.shape
    kv_heads, slots = k_BGMH.shape[1:3]
    q_BGQH = q_BNLH.reshape(batch, kv_heads, heads // kv_heads * length, head_dim)
    q_BGQH = q_BGQH * jnp.asarray(1 / math.sqrt(head_dim), q_BNLH.dtype)
    s_BGQM = jnp.einsum("BGQH,BGMH->BGQM", q_BGQH, k_BGMH, preferred_element_type=jnp.float32)
    own_BL = mask.start_B[:, None] + jnp.arange(length)[None]  # type: ignore[index]
    seen_BLM = jnp.arange(slots)[None, None] <= own_BL[..., None]
    if mask.window is not None and mask.positions_BL is not None:
        away_BLM = mask.positions_BL[:, :, None] - mask.key_positions_BM[:, None]  # type: ignore[index]
        seen_BLM = seen_BLM & (away_BLM < mask.window)
    seen_B1QM = jnp.tile(seen_BLM, (1, heads // kv_heads, 1))[:, None]
    s_BGQM = jnp.where(seen_B1QM, _capped(s_BGQM, softcap), -jnp.inf)
    p_BGQM = jnp.exp(s_BGQM - jnp.max(s_BGQM, axis=-1, keepdims=True))
    total_BGQ1 = jnp.sum(p_BGQM, axis=-1, keepdims=True)
    out_BGQH = jnp.einsum("BGQM,BGMH->BGQH", p_BGQM.astype(q_BNLH.dtype), v_BGMH)
    out_BGQH = (out_BGQH / total_BGQ1.astype(out_BGQH.dtype)).astype(q_BNLH.dtype)
    return out_BGQH.reshape(q_BNLH.shape)


def _capped(s_BGQM, softcap: float | None):
    return s_BGQM if softcap is None else softcap * jnp.tanh(s_BGQM / softcap)
