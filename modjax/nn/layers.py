"""The plain layers: attention and MLP, each added to the stream, and layers one after another.

Legend: B batch, L positions, D model width, F feed-forward width, N heads, G kv heads, H head
width; E = N/G + 2.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import spec
from modjax.kernels import Mask, attend, project, project_back, received_attention
from modjax.nn.build import LayerModule, build
from modjax.nn.cache import KVCache, KVWrite
from modjax.nn.call import At, Call, Out, under
from modjax.nn.params import normal_param, read, scale_param
from modjax.spec.layers import GATED

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,
    "geglu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


Product = Callable[[jax.Array, jax.Array], jax.Array]


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a scale (arXiv 1910.07467, Eq. 4), in float32."""

    def __init__(self, d_model: int, *, eps: float):
        self.scale = scale_param(d_model)
        self.eps = eps

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return (unit_rms(x_BLD, self.eps) * read(self.scale)[None, None]).astype(x_BLD.dtype)


def unit_rms(x_BLD: jax.Array, eps: float) -> jax.Array:
    """x over the root of its mean square, in float32."""
    x32_BLD = x_BLD.astype(jnp.float32)
    mean_square_BL1 = jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True)
    return x32_BLD * jax.lax.rsqrt(mean_square_BL1 + eps)


class Sublayer(LayerModule):
    """Adds to the stream what a subclass makes of it, with norms before it, after it, or both.

    A subclass computes what it adds from `before(x)` alone: `nn.streams` relies on it.
    """

    def __init__(self, norm: str, shape: spec.Shape):
        d, eps = shape.d_model, shape.norm_eps
        self.norm = RMSNorm(d, eps=eps) if norm != "after" else None
        self.norm_after = RMSNorm(d, eps=eps) if norm != "before" else None

    def before(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD if self.norm is None else self.norm(x_BLD)

    def added(self, x_BLD: jax.Array, y_BLD: jax.Array) -> jax.Array:
        return x_BLD + (y_BLD if self.norm_after is None else self.norm_after(y_BLD))


class Attention(Sublayer):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, spec: spec.Attention, shape: spec.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec.norm, shape)
        self.spec = spec
        d, h, heads = shape.d_model, shape.head_dim, shape.num_heads
        # For each kv head its queries, its key and its value: one product makes them all.
        each = heads // shape.num_kv_heads + 2
        self.w_qkv = normal_param(
            rngs,
            (d, shape.num_kv_heads, each, h),
            ("embed", "kv_heads", None, "head_dim"),
            std=1 / math.sqrt(d),
        )
        self.w_out = normal_param(
            rngs,
            (heads, h, d),
            ("heads", "head_dim", "embed"),
            std=1 / math.sqrt(heads * h) / depth_scale(shape),
        )

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        q_BNLH, k_BGLH, v_BGLH = self.heads(self.before(x_BLD), at.ropes[self.spec.rope])
        mask = Mask(at.segments_BL, self.spec.window, at.positions_BL)
        write: Any = ()
        handed = {}
        keys, values, seen = k_BGLH, v_BGLH, mask
        if cache is not None:
            write = self._write(k_BGLH, v_BGLH, at)
            if not call.fresh:
                # Written before it is read: XLA copies a cache that is read and then written.
                held = cache.written(write)
                write = write._replace(held=held)
                keys, values = held.k_BGMH, held.v_BGMH
                seen = mask._replace(
                    segments_BL=None, key_positions_BM=held.positions_BM, start_B=cache.length_B
                )
        elif self.spec.received:
            handed["received"] = received_attention(q_BNLH, k_BGLH, mask)
        out_BNLH = attend(q_BNLH, keys, values, seen, self.spec.softcap)
        return Out(self.added(x_BLD, self.merge(out_BNLH)), write, {}, handed)

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> KVCache:
        """A cache with room for `length` positions of each row."""
        _, heads, _, width = self.w_qkv.shape
        k_BGMH = jnp.zeros((batch, heads, length, width), dtype)
        positions_BM = jnp.zeros((batch, length), jnp.int32) if self.spec.window else None
        return KVCache(k_BGMH, jnp.zeros_like(k_BGMH), jnp.zeros(batch, jnp.int32), positions_BM)

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

    def _write(self, k_BGLH, v_BGLH, at: At) -> KVWrite:
        batch, length = k_BGLH.shape[0], k_BGLH.shape[2]
        positions_BL = None
        if self.spec.window:
            positions_BL = jnp.broadcast_to(at.positions_BL, (batch, length)).astype(jnp.int32)
        return KVWrite(k_BGLH, v_BGLH, at.count(batch, length), positions_BL)


class MLP(Sublayer):
    """Two matrices around an activation, or three for a gated one (arXiv 2002.05202)."""

    def __init__(self, spec: spec.MLP, shape: spec.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec.norm, shape)
        d, f = shape.d_model, shape.d_ff
        self.activation = spec.activation
        std = 1 / math.sqrt(d)
        self.w_in = normal_param(rngs, (d, f), ("embed", "mlp"), std=std)
        if spec.activation in GATED:
            self.w_gate = normal_param(rngs, (d, f), ("embed", "mlp"), std=std)
        # The long dim last: a lone position does little but read the matrix, and rows of d_ff
        # numbers are read faster than rows of d_model.
        output_std = 1 / math.sqrt(f) / depth_scale(shape)
        self.w_out = normal_param(rngs, (d, f), ("embed", "mlp"), std=output_std, transposed=True)

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        weights = {name: read(getattr(self, name), None) for name in mlp_weights(self.activation)}
        y_BLD = mlp(self.before(x_BLD), weights, self.activation, project, project_back)
        return Out(self.added(x_BLD, y_BLD))


def mlp_weights(activation: str) -> tuple[str, ...]:
    """The names of the matrices of an MLP, each (D, F)."""
    return ("w_in", "w_gate", "w_out") if activation in GATED else ("w_in", "w_out")


def mlp(
    x: jax.Array, weights: Mapping[str, Any], activation: str, product: Product, back: Product
) -> jax.Array:
    """What an MLP with these weights adds. product, back: of x with a matrix and its transpose."""
    act = ACTIVATIONS[activation]
    h = product(x, weights["w_in"])
    h = act(product(x, weights["w_gate"])) * h if "w_gate" in weights else act(h)
    return back(h, weights["w_out"])


class Seq(LayerModule):
    """Layers one after another."""

    def __init__(self, spec: spec.Seq, shape: spec.Shape, *, rngs: nnx.Rngs):
        self.spec = spec
        self.parts = nnx.Dict(
            {name: build(part, shape, rngs=rngs) for name, part in names(spec.parts).items()}
        )

    def __call__(self, x: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        writes, records, depth_BL = {}, {}, 0
        handed: dict[str, jax.Array] = {}
        for index, name in enumerate(names(self.spec.parts)):
            part_cache = None if cache is None else cache[name]
            here = at._replace(handed={**at.handed, **handed})
            out = self.parts[name](x, here, call.inside(index), part_cache)
            x, writes[name] = out.x, out.write
            records |= under(f"parts/{name}", out.records)
            handed = {**handed, **out.handed}
            depth_BL = depth_BL + out.depth_BL
        return Out(x, () if cache is None else writes, records, handed, depth_BL)

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> Any:
        return {name: p.empty(batch, length, slack, dtype) for name, p in self.parts.items()}


def names(parts: Iterable[spec.Layer], start: int = 0) -> dict[str, spec.Layer]:
    """Returns layers by their place and class, as in 1_mod: so their modules are named."""
    return {f"{i}_{type(part).__name__.lower()}": part for i, part in enumerate(parts, start)}


def depth_scale(shape: spec.Shape) -> float:
    """GPT-2's rule: the 2 * num_layers additions to the stream start with total variance 1."""
    return math.sqrt(2 * shape.num_layers)


def rotary_tables(
    positions_BL: jax.Array, head_dim: int, base: float, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each (B, L, H/2), of position * base^(-2i/H) (arXiv 2104.09864, Eq. 34)."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle_BLH = positions_BL[..., None].astype(jnp.float32) * (base**-exponent)[None, None]
    return jnp.cos(angle_BLH).astype(dtype), jnp.sin(angle_BLH).astype(dtype)


def rotate(x_BNLH: jax.Array, rope_BLH: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (x_i, x_{i + H/2}) by its position's angle."""
    cos_B1LH, sin_B1LH = (table[:, None] for table in rope_BLH)
    a, b = jnp.split(x_BNLH, 2, axis=-1)
    return jnp.concatenate([a * cos_B1LH - b * sin_B1LH, b * cos_B1LH + a * sin_B1LH], axis=-1)
