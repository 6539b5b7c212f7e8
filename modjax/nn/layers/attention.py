"""Attention with rotary positions, and separate methods for queries and for keys and values.

Legend: B batch, L positions, M key positions, W slots of a cache, D model width, N heads, G kv
heads, H head width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import specs
from modjax.kernels import Side, attend, project, received_attention
from modjax.nn.cache import KVCache, KVWrite
from modjax.nn.call import At, Call, Out
from modjax.nn.layers.dense import Sublayer, depth_scale
from modjax.nn.params import make_param, normal_param, read

MANY = 2**31  # positions: more than any row has


class Attention(Sublayer):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions.

    `queries` and `keys` take inputs that are already normalised, see `before`. Keys may come from
    other positions than the queries, or from another source.
    """

    def __init__(self, spec: specs.Attention, shape: specs.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec.norm, shape)
        self.spec = spec
        d, h, heads, kv_heads = shape.d_model, shape.head_dim, shape.num_heads, shape.num_kv_heads
        # One draw for all three matrices: for each kv head its queries, its key and its value.
        each = heads // kv_heads
        drawn = jax.random.normal(rngs.params(), (d, kv_heads, each + 2, h), jnp.float32)
        w_q, w_k, w_v = jnp.split(1 / math.sqrt(d) * drawn, (each, each + 1), axis=2)
        axes = ("embed", "kv_heads", "head_dim")
        self.w_q = make_param(w_q.reshape(d, heads, h), ("embed", "heads", "head_dim"))
        self.w_k, self.w_v = (make_param(w[:, :, 0], axes) for w in (w_k, w_v))
        std, axes = 1 / math.sqrt(heads * h) / depth_scale(shape), ("heads", "head_dim", "embed")
        self.w_out = normal_param(rngs, (heads, h, d), axes, std=std)

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        y_BLD, passed, write = self.before(x_BLD), {}, ()
        q_BNLH, (k_BGLH, v_BGLH) = self.queries(y_BLD, at), self.keys(y_BLD, at)
        seen: tuple[jax.Array, jax.Array, Side | None] = k_BGLH, v_BGLH, None
        if cache is None and self.spec.received:
            passed["received"] = received_attention(q_BNLH, k_BGLH, self.spec.mask, side(at))
        if cache is not None:
            batch, _, length, _ = k_BGLH.shape
            positions_BL = jnp.broadcast_to(at.positions_BL, (batch, length)).astype(jnp.int32)
            write = KVWrite(k_BGLH, v_BGLH, at.count(batch, length), positions_BL)
            if not call.fresh:
                seen, write = cache.read(write, ring=self.spec.mask.kept(MANY) < MANY)
        return Out(self.added(x_BLD, self.attend(q_BNLH, at, *seen)), write, {}, passed)

    def queries(self, y_BLD: jax.Array, at: At) -> jax.Array:
        """Returns rotated queries, (B, N, L, H)."""
        return rotate(_heads(y_BLD, read(self.w_q, None)), at.ropes[self.spec.rope])

    def keys(self, source_BMD: jax.Array, at: At) -> tuple[jax.Array, jax.Array]:
        """Returns rotated keys and values, each (B, G, M, H). at: the source's context."""
        k_BGMH = rotate(_heads(source_BMD, read(self.w_k, None)), at.ropes[self.spec.rope])
        return k_BGMH, _heads(source_BMD, read(self.w_v, None))

    def attend(
        self,
        q_BNLH: jax.Array,
        at: At,
        k_BGMH: jax.Array,
        v_BGMH: jax.Array,
        keys: Side | None = None,
    ) -> jax.Array:
        """Returns the attention's output, projected back to the stream, (B, L, D).

        at: the queries' context. keys: the positions of the keys; None means the queries' own.
        """
        mask, softcap = self.spec.mask, self.spec.softcap
        out_BNLH = attend(q_BNLH, k_BGMH, v_BGMH, mask, side(at), keys, softcap)
        batch, heads, length, head_dim = out_BNLH.shape
        out_BLD = out_BNLH.transpose(0, 2, 1, 3).reshape(batch, length, heads * head_dim)
        return project(out_BLD, read(self.w_out, None).reshape(heads * head_dim, -1))

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> KVCache:
        """Returns an empty cache for `length` positions of each row; a window needs fewer slots."""
        _, heads, width = self.w_k.shape
        slots = self.spec.mask.kept(length)
        k_BGWH = jnp.zeros((batch, heads, slots, width), dtype)
        none_B, none_BW = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, slots), jnp.int32)
        return KVCache(k_BGWH, jnp.zeros_like(k_BGWH), none_B, none_BW)


def side(at: At) -> Side:
    """Returns the positions, segments and validity of `at`, as modjax.kernels reads them."""
    return Side(at.positions_BL, at.segments_BL, at.valid_BL)


def _heads(y_BLD: jax.Array, w_DNH: jax.Array) -> jax.Array:
    """Returns the projection to each head, (B, N, L, H)."""
    (batch, length, width), (_, heads, head_dim) = y_BLD.shape, w_DNH.shape
    z_BLNH = project(y_BLD, w_DNH.reshape(width, -1)).reshape(batch, length, heads, head_dim)
    return z_BLNH.transpose(0, 2, 1, 3)


def rotary_tables(
    positions_BL: jax.Array, head_dim: int, base: float, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin, (B, L, H/2), of position * base^(-2i/H) (arXiv 2104.09864, Eq. 34)."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle_BLH = positions_BL[..., None].astype(jnp.float32) * (base**-exponent)[None, None]
    return jnp.cos(angle_BLH).astype(dtype), jnp.sin(angle_BLH).astype(dtype)


def rotate(x_BNLH: jax.Array, rope_BLH: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (x_i, x_{i + H/2}) by the angle of its position."""
    cos_B1LH, sin_B1LH = (table[:, None] for table in rope_BLH)
    a, b = jnp.split(x_BNLH, 2, axis=-1)
    return jnp.concatenate([a * cos_B1LH - b * sin_B1LH, b * cos_B1LH + a * sin_B1LH], axis=-1)
