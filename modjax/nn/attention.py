"""Causal self-attention with grouped queries, rotary positions and segments.

Legend: B batch, L query positions, M key positions, D width, N heads, G kv heads, R = N/G,
H head width.
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
    batch, heads, length, head_dim = q_BNLH.shape
    kv_heads = k_BGMH.shape[1]
    q_BGRLH = q_BNLH.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    q_BGRLH = q_BGRLH * jnp.asarray(1 / math.sqrt(head_dim), q_BNLH.dtype)
    chunks = []
    chunk = max(MIN_QUERY_CHUNK, math.ceil(length / QUERY_CHUNKS))
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        mask_BLM = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :])[None]
        if segment_ids_BL is not None:
            same = segment_ids_BL[:, start:stop, None] == segment_ids_BL[:, None, :stop]
            mask_BLM = mask_BLM & same
        chunks.append(
            _attend(q_BGRLH[..., start:stop, :], k_BGMH[:, :, :stop], v_BGMH[:, :, :stop], mask_BLM)
        )
    out_BGRLH = chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=3)
    return out_BGRLH.reshape(batch, heads, length, head_dim)


def _attend(q_BGRLH, k_BGMH, v_BGMH, mask_BLM):
    """One chunk of queries against the keys up to its end; q is scaled already."""
    s_BGRLM = jnp.einsum("BGRLH,BGMH->BGRLM", q_BGRLH, k_BGMH, preferred_element_type=jnp.float32)
    s_BGRLM = jnp.where(mask_BLM[:, None, None], s_BGRLM, -jnp.inf)
    top_BGRL1 = jax.lax.stop_gradient(jnp.max(s_BGRLM, axis=-1, keepdims=True))
    p_BGRLM = jnp.exp(s_BGRLM - top_BGRL1)
    # Normalising after the product with the values divides H numbers a row, not M.
    total_BGRL1 = jnp.sum(p_BGRLM, axis=-1, keepdims=True)
    out_BGRLH = jnp.einsum("BGRLM,BGMH->BGRLH", p_BGRLM.astype(v_BGMH.dtype), v_BGMH)
    return (out_BGRLH / total_BGRL1.astype(out_BGRLH.dtype)).astype(q_BGRLH.dtype)


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
        std = 1 / math.sqrt(d_model)
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.w_q = normal_param(rngs, (d_model, num_heads, h), q_axes, std=std)
        self.w_k = normal_param(rngs, (d_model, num_kv_heads, h), kv_axes, std=std)
        self.w_v = normal_param(rngs, (d_model, num_kv_heads, h), kv_axes, std=std)
        out_axes = ("heads", "head_dim", "embed")
        self.w_out = normal_param(rngs, (num_heads, h, d_model), out_axes, std=output_std)

    def __call__(
        self,
        x_BLD: jax.Array,
        rope_BLH: tuple[jax.Array, jax.Array],
        segment_ids_BL: jax.Array | None,
    ) -> jax.Array:
        q_BNLH, k_BGLH, v_BGLH = (
            _project_heads(x_BLD, w[...]) for w in (self.w_q, self.w_k, self.w_v)
        )
        out_BNLH = causal_attention(
            rotate(q_BNLH, rope_BLH), rotate(k_BGLH, rope_BLH), v_BGLH, segment_ids_BL
        )
        batch, heads, length, head_dim = out_BNLH.shape
        out_BLD = out_BNLH.transpose(0, 2, 1, 3).reshape(batch, length, heads * head_dim)
        return project(out_BLD, self.w_out[...].reshape(heads * head_dim, -1))


def _project_heads(x_BLD: jax.Array, w_DNH: jax.Array) -> jax.Array:
    batch, length, _ = x_BLD.shape
    y_BLF = project(x_BLD, w_DNH.reshape(w_DNH.shape[0], -1))
    return y_BLF.reshape(batch, length, *w_DNH.shape[1:]).transpose(0, 2, 1, 3)
