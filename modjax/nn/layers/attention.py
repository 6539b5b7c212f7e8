"""Attention with rotary positions, and separate methods for queries and for keys and values.

Legend: B batch, L positions, M key positions, W slots of a cache, D model width, N heads, G kv
heads, H head width.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from modjax import specs
from modjax.kernels import (
    Scoring,
    Side,
    attend,
    from_heads,
    received_attention,
    rotate,
    to_heads,
)
from modjax.nn.cache import KVCache, KVWrite
from modjax.nn.call import At, Call, Out
from modjax.nn.layers.dense import RMSNorm, Sublayer, depth_scale, plus
from modjax.nn.params import bias_param, make_param, normal_param, read

MANY = 2**31  # positions: more than any row has


class Seen(NamedTuple):
    """Keys and values that queries may see. An attention called with it as its cache writes none.

    side: the positions of the keys; None means the queries' own.
    places_BL: the place of each query's own key, see modjax.kernels.attend.
    """

    k_BGMH: jax.Array
    v_BGMH: jax.Array
    side: Side | None = None
    places_BL: jax.Array | None = None


class Attention(Sublayer):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions.

    `queries` and `keys` take normalised inputs, the result of `before`. Keys may come from other
    positions than the queries, or from another source.
    """

    def __init__(self, spec: specs.Attention, shape: specs.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec.norm, shape)
        self.spec = spec
        self.scoring = Scoring(spec.mask, spec.scale, spec.softcap)
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
        if spec.bias is not None:
            self.b_q = bias_param((heads, h), ("heads", "head_dim"))
            self.b_k, self.b_v = (
                bias_param((kv_heads, h), ("kv_heads", "head_dim")) for _ in range(2)
            )
        if spec.bias == "all":
            self.b_out = bias_param((d,), ("embed",))
        if spec.qk_norm is not None:
            q_heads, k_heads = (1, 1) if spec.qk_norm == "head" else (heads, kv_heads)
            self.q_norm, self.k_norm = (RMSNorm(n * h, shape) for n in (q_heads, k_heads))

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        y_BLD, passed, write = self.before(x_BLD), {}, ()
        q_BNLH, seen = self.queries(y_BLD, at), cache
        if not isinstance(seen, Seen):
            seen, write = self.look(y_BLD, at, call, cache)
        if cache is None and self.spec.received:
            passed["received"] = received_attention(q_BNLH, seen.k_BGMH, self.scoring, side(at))
        y_BLD = self.attend(q_BNLH, at, *seen, layout=call.layout)
        return Out(self.added(x_BLD, y_BLD), write, {}, passed)

    def look(self, y_BLD: jax.Array, at: At, call: Call, cache: Any) -> tuple[Seen, Any]:
        """Returns what queries may see, with the keys of these positions, and the cache's update.

        y_BLD: the result of `before`.
        """
        k_BGLH, v_BGLH = self.keys(y_BLD, at)
        seen = Seen(k_BGLH, v_BGLH)
        if cache is None:
            return seen, ()
        batch, _, length, _ = k_BGLH.shape
        positions_BL = jnp.broadcast_to(at.positions_BL, (batch, length)).astype(jnp.int32)
        write = KVWrite(k_BGLH, v_BGLH, at.count(batch, length), positions_BL)
        if call.fresh:
            return seen, write
        found, write = cache.read(write, ring=self.spec.mask.kept(MANY) < MANY)
        return Seen(*found), write

    def queries(self, y_BLD: jax.Array, at: At) -> jax.Array:
        """Returns rotated queries, (B, N, L, H)."""
        return checkpoint_name(self._turned(self._heads(y_BLD, "q"), at), "queries")

    def keys(self, source_BMD: jax.Array, at: At) -> tuple[jax.Array, jax.Array]:
        """Returns rotated keys and values, each (B, G, M, H). at: the source's context."""
        k_BGMH = checkpoint_name(self._turned(self._heads(source_BMD, "k"), at), "keys")
        return k_BGMH, checkpoint_name(self._heads(source_BMD, "v"), "values")

    def _heads(self, y_BLD: jax.Array, name: str) -> jax.Array:
        """Returns the heads before rotation, (B, N or G, L, H). name: "q", "k" or "v"."""
        w_DNH, clip = getattr(self, f"w_{name}"), self.spec.clip
        z_BNLH = to_heads(y_BLD, read(w_DNH, y_BLD.dtype))
        if self.spec.bias is not None:
            z_BNLH = plus(z_BNLH, read(getattr(self, f"b_{name}"), y_BLD.dtype)[:, None])
        if self.spec.qk_norm is not None and name != "v":
            norm = getattr(self, f"{name}_norm")
            z_BNLH = norm(z_BNLH) if self.spec.qk_norm == "head" else _over_heads(norm, z_BNLH)
        return z_BNLH if clip is None else jnp.clip(z_BNLH, -clip, clip)

    def _turned(self, x_BNLH: jax.Array, at: At) -> jax.Array:
        rope = self.spec.rope
        return x_BNLH if rope is None else rotate(x_BNLH, at.ropes[str(rope)])

    def attend(
        self,
        q_BNLH: jax.Array,
        at: At,
        k_BGMH: jax.Array,
        v_BGMH: jax.Array,
        keys: Side | None = None,
        places_BL: jax.Array | None = None,
        *,
        layout: str = "masked",
    ) -> jax.Array:
        """Returns the attention's output, projected back to the stream, (B, L, D).

        at: the queries' context. keys, places_BL: see `Seen`. layout: see `Call`.
        """
        out_BNLH = attend(
            q_BNLH, k_BGMH, v_BGMH, self.scoring, side(at), keys, places_BL, layout=layout
        )
        dtype = out_BNLH.dtype
        out_BLD = from_heads(out_BNLH, read(self.w_out, dtype))
        return plus(out_BLD, read(self.b_out, dtype)) if self.spec.bias == "all" else out_BLD

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> KVCache:
        """Returns an empty cache for `length` positions of each row; a window needs fewer slots."""
        _, heads, width = self.w_k.shape
        slots = self.spec.mask.kept(length)
        k_BGWH = jnp.zeros((batch, heads, slots, width), dtype)
        none_B, none_BW = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, slots), jnp.int32)
        return KVCache(k_BGWH, jnp.zeros_like(k_BGWH), none_B, none_BW)


def _over_heads(norm: RMSNorm, x_BNLH: jax.Array) -> jax.Array:
    """Returns x, normalised over all heads together."""
    x_BLNH = x_BNLH.swapaxes(1, 2)
    y_BLD = norm(x_BLNH.reshape(*x_BLNH.shape[:2], -1))
    return y_BLD.reshape(x_BLNH.shape).swapaxes(1, 2)


def side(at: At) -> Side:
    """Returns the positions, segments and validity of `at`, as modjax.kernels reads them."""
    return Side(at.positions_BL, at.segments_BL, at.valid_BL)


def rotary_tables(
    positions_BL: jax.Array, rope: specs.Rope, head_dim: int, length: int, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of the angles of specs.Rope, each (B, L, rope.width(head_dim) / 2).

    length: see specs.rope.Scaling.multipliers.
    """
    width, scaling = rope.width(head_dim), rope.scaling
    exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    frequency_H = rope.base**-exponent
    if scaling is not None:
        frequency_H *= jnp.asarray(scaling.multipliers(rope.base, width, length), jnp.float32)
    angle_BLH = positions_BL[..., None].astype(jnp.float32) * frequency_H[None, None]
    tables = jnp.cos(angle_BLH), jnp.sin(angle_BLH)
    if scaling is not None and scaling.magnitude != 1:
        tables = tuple(scaling.magnitude * table for table in tables)
    cos_BLH, sin_BLH = (table.astype(dtype) for table in tables)
    return cos_BLH, sin_BLH
