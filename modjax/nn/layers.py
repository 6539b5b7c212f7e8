"""The plain layers: parameters, RMSNorm, MLP and rotary positions.

Legend: B batch, L positions, D model width, F feed-forward width, N heads, H head width; P parts of
K each.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax.config import GATED_MLPS

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,
    "geglu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def normal_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], *, std: float
) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2); `axes` names its logical axes for sharding."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def product(x_BLD: jax.Array, w_DF: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """x @ w over the last dim of x, multiplied in x's dtype: (B, L, F).

    The product is taken of two matrices: contracting B and L as two dims in the gradient of w
    makes XLA's CPU backend transpose the activations first, at 1.6 times the cost of the MLP.
    """
    batch, length, width = x_BLD.shape
    x_TD = x_BLD.reshape(batch * length, width)
    y_TF = jnp.matmul(x_TD, w_DF.astype(x_BLD.dtype), preferred_element_type=out_dtype)
    return y_TF.reshape(batch, length, w_DF.shape[1])


def project(x_BLD: jax.Array, w_DF: jax.Array) -> jax.Array:
    """`product` with a block's matrix; that of a lone position is taken in parts on a CPU.

    It does little but read the matrix, and XLA's CPU backend reads one of a megabyte with one core
    only; a batch of products it shares out.
    """
    if not _alone(x_BLD):
        return product(x_BLD, w_DF)
    w_PKF = _parts(w_DF.astype(x_BLD.dtype))
    y_PF = jnp.einsum(
        "PK,PKF->PF", x_BLD.reshape(w_PKF.shape[:2]), w_PKF, preferred_element_type=jnp.float32
    )
    return jnp.sum(y_PF, axis=0).astype(x_BLD.dtype)[None, None]


def project_back(x_BLF: jax.Array, w_DF: jax.Array) -> jax.Array:
    """x @ w.T, as `project` takes x @ w: (B, L, D)."""
    if not _alone(x_BLF):
        return product(x_BLF, w_DF.T)
    w_PKF = _parts(w_DF.astype(x_BLF.dtype))
    x_PF = jnp.broadcast_to(x_BLF[0], (w_PKF.shape[0], w_PKF.shape[2]))
    return jnp.einsum("PF,PKF->PK", x_PF, w_PKF).reshape(1, 1, -1)


def _alone(x_BLD: jax.Array) -> bool:
    return x_BLD.shape[:2] == (1, 1) and jax.default_backend() == "cpu"


def _parts(w_DF: jax.Array) -> jax.Array:
    parts = math.gcd(w_DF.shape[0], 4)
    return w_DF.reshape(parts, -1, w_DF.shape[1])


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a scale (arXiv 1910.07467, Eq. 4), in float32."""

    def __init__(self, d_model: int, *, eps: float):
        scale = jnp.ones((d_model,), jnp.float32)
        self.scale = nnx.Param(scale, out_sharding=("norm",), eager_sharding=False)
        self.eps = eps

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        x32_BLD = x_BLD.astype(jnp.float32)
        mean_square_BL1 = jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True)
        y_BLD = x32_BLD * jax.lax.rsqrt(mean_square_BL1 + self.eps) * self.scale[None, None]
        return y_BLD.astype(x_BLD.dtype)


class MLP(nnx.Module):
    """Two matrices around `activation`, or three where its name ends in "glu" (arXiv 2002.05202).

    `output_std` scales the initial output projection, so that a deep stack starts near identity.
    """

    def __init__(
        self, d_model: int, d_ff: int, *, activation: str, output_std: float, rngs: nnx.Rngs
    ):
        std = 1 / math.sqrt(d_model)
        self.activation = activation
        self.w_in = normal_param(rngs, (d_model, d_ff), ("embed", "mlp"), std=std)
        if activation in GATED_MLPS:
            self.w_gate = normal_param(rngs, (d_model, d_ff), ("embed", "mlp"), std=std)
        # The long dim last: a lone position does little but read the matrix, and rows of d_ff
        # numbers are read faster than rows of d_model.
        self.w_out = normal_param(rngs, (d_model, d_ff), ("embed", "mlp"), std=output_std)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        h_BLF = project(x_BLD, self.w_in[...])
        if self.activation in GATED_MLPS:
            h_BLF = act(project(x_BLD, self.w_gate[...])) * h_BLF
        else:
            h_BLF = act(h_BLF)
        return project_back(h_BLF, self.w_out[...])


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
