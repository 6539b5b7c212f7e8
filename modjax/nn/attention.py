"""Causal self-attention with grouped queries, rotary positions and segments.

Legend: B batch, L query positions, M key positions, D width, N heads, G kv heads, R = N/G,
E = R + 2, H head width.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from modjax.nn.layers import normal_param, project, rotate

# Queries are processed in up to four chunks of at least this many positions, each against the
# keys up to its end: of the future that the mask hides, three quarters are never computed.
QUERY_CHUNKS, MIN_QUERY_CHUNK = 4, 128


def causal_attention(
    q_BNLH: jax.Array, k_BGMH: jax.Array, v_BGMH: jax.Array, segment_ids_BL: jax.Array | None
) -> jax.Array:
    """Softmax attention (B, N, L, H) over earlier positions of the same segment.

    q (B, N, L, H), k and v (B, G, L, H), segment ids (B, L) or None; N is a multiple of G.
    Causality follows the order of the positions in the arrays. Every position attends at least to
    itself. Scores and softmax are float32, the products take the inputs' dtype.
    """
    chunks = []
    for start, stop in _query_chunks(q_BNLH.shape[2]):
        p_BGRLM, total_BGRL1, _ = _probabilities(q_BNLH, k_BGMH, segment_ids_BL, start, stop)
        out_BGRLH = jnp.einsum(
            "BGRLM,BGMH->BGRLH", p_BGRLM.astype(v_BGMH.dtype), v_BGMH[:, :, :stop]
        )
        # Normalising after the product with the values divides H numbers a row, not M.
        chunks.append((out_BGRLH / total_BGRL1.astype(out_BGRLH.dtype)).astype(q_BNLH.dtype))
    out_BGRLH = chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=3)
    return out_BGRLH.reshape(q_BNLH.shape)


def received_attention(
    q_BNLH: jax.Array, k_BGMH: jax.Array, segment_ids_BL: jax.Array | None
) -> jax.Array:
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
        p_BGRLM, total_BGRL1, mask_BLM = _probabilities(q_BNLH, k_BGMH, segment_ids_BL, start, stop)
        column_BM = jnp.mean(jnp.sum(p_BGRLM / total_BGRL1, axis=3), axis=(1, 2))
        received_BM = received_BM.at[:, :stop].add(column_BM)
        mask_BLM = mask_BLM.astype(jnp.float32)
        share_BM = jnp.sum(mask_BLM / jnp.sum(mask_BLM, axis=2, keepdims=True), axis=1)
        uniform_BM = uniform_BM.at[:, :stop].add(share_BM)
    return received_BM / uniform_BM


def _query_chunks(length: int) -> list[tuple[int, int]]:
    chunk = max(MIN_QUERY_CHUNK, math.ceil(length / QUERY_CHUNKS))
    return [(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _probabilities(q_BNLH, k_BGMH, segment_ids_BL, start, stop):
    """Attention of queries start:stop before normalisation, its sums, and the mask."""
    batch, heads, _, head_dim = q_BNLH.shape
    kv_heads = k_BGMH.shape[1]
    q_BNLH = q_BNLH[:, :, start:stop] * jnp.asarray(1 / math.sqrt(head_dim), q_BNLH.dtype)
    q_BGRLH = q_BNLH.reshape(batch, kv_heads, heads // kv_heads, stop - start, head_dim)
    mask_BLM = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :])[None]
    if segment_ids_BL is not None:
        same = segment_ids_BL[:, start:stop, None] == segment_ids_BL[:, None, :stop]
        mask_BLM = mask_BLM & same
    s_BGRLM = jnp.einsum(
        "BGRLH,BGMH->BGRLM", q_BGRLH, k_BGMH[:, :, :stop], preferred_element_type=jnp.float32
    )
    s_BGRLM = jnp.where(mask_BLM[:, None, None], s_BGRLM, -jnp.inf)
    top_BGRL1 = jax.lax.stop_gradient(jnp.max(s_BGRLM, axis=-1, keepdims=True))
    p_BGRLM = jnp.exp(s_BGRLM - top_BGRL1)
    return p_BGRLM, jnp.sum(p_BGRLM, axis=-1, keepdims=True), mask_BLM


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions: (B, L, D) to (B, L, D)."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        output_std: float,
        rngs: nnx.Rngs,
    ):
        h = d_model // num_heads
        # For each kv head its R queries, its key and its value: one product makes them all.
        each = num_heads // num_kv_heads + 2
        self.w_qkv = normal_param(
            rngs, (d_model, num_kv_heads, each, h), ("embed", "kv_heads", None, "head_dim"),
            std=1 / math.sqrt(d_model),
        )  # fmt: skip
        out_axes = ("heads", "head_dim", "embed")
        self.w_out = normal_param(rngs, (num_heads, h, d_model), out_axes, std=output_std)

    def __call__(
        self,
        x_BLD: jax.Array,
        rope_BLH: tuple[jax.Array, jax.Array],
        segment_ids_BL: jax.Array | None,
    ) -> jax.Array:
        return self.merge(causal_attention(*self.heads(x_BLD, rope_BLH), segment_ids_BL))

    def heads(
        self, x_BLD: jax.Array, rope_BLH: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries (B, N, L, H), rotated keys and values (B, G, L, H)."""
        (batch, length, width), (_, _, each, head_dim) = x_BLD.shape, self.w_qkv.shape
        y_BLF = project(x_BLD, self.w_qkv[...].reshape(width, -1))
        y_BLGEH = y_BLF.reshape(batch, length, -1, each, head_dim)
        q_BNLH, k_BGLH, v_BGLH = (
            part_BLGEH.reshape(batch, length, -1, head_dim).transpose(0, 2, 1, 3)
            for part_BLGEH in jax.lax.split(y_BLGEH, (each - 2, 1, 1), axis=3)
        )
        return rotate(q_BNLH, rope_BLH), rotate(k_BGLH, rope_BLH), v_BGLH

    def merge(self, out_BNLH: jax.Array) -> jax.Array:
        """What the heads attended to, projected back: (B, L, D)."""
        batch, heads, length, head_dim = out_BNLH.shape
        out_BLD = out_BNLH.transpose(0, 2, 1, 3).reshape(batch, length, heads * head_dim)
        return project(out_BLD, self.w_out[...].reshape(heads * head_dim, -1))
