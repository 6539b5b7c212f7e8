"""Products of activations with matrices.

Legend: B batch, L positions, D model width, F feed-forward width, N heads, H head width, T rows,
U parts, X numbers.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from modjax.kernels.target import target


def product(x_BLD: jax.Array, w_DF: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Returns x @ w over the last dim of x, (B, L, F), multiplied in x's dtype.

    x is reshaped to a matrix first. Otherwise the gradient of w contracts B and L as two dims, and
    XLA's CPU backend transposes the activations for that, at 1.6 times the cost of the MLP.
    """
    batch, length, width = x_BLD.shape
    x_TD = x_BLD.reshape(batch * length, width)
    y_TF = jnp.matmul(x_TD, w_DF.astype(x_BLD.dtype), preferred_element_type=out_dtype)
    return y_TF.reshape(batch, length, w_DF.shape[1])


def project(x_BLD: jax.Array, w_DF: jax.Array) -> jax.Array:
    """Returns `product(x, w)`, (B, L, F), split into parts for a single position on a CPU.

    A single position does little but read the matrix. XLA's CPU backend reads a matrix of a
    megabyte with one core, but distributes a batch of products over all cores.
    """
    if not _is_single(x_BLD):
        return product(x_BLD, w_DF)
    w_UXF = _parts(w_DF.astype(x_BLD.dtype))
    x_UX = x_BLD.reshape(w_UXF.shape[:2])
    y_UF = jnp.einsum("UX,UXF->UF", x_UX, w_UXF, preferred_element_type=jnp.float32)
    return jnp.sum(y_UF, axis=0).astype(x_BLD.dtype)[None, None]


def project_back(x_BLF: jax.Array, w_DF: jax.Array) -> jax.Array:
    """Returns x @ w.T, (B, L, D), computed as `project` computes x @ w."""
    if not _is_single(x_BLF):
        return product(x_BLF, w_DF.T)
    w_UXF = _parts(w_DF.astype(x_BLF.dtype))
    x_UF = jnp.broadcast_to(x_BLF[0], (w_UXF.shape[0], w_UXF.shape[2]))
    return jnp.einsum("UF,UXF->UX", x_UF, w_UXF).reshape(1, 1, -1)


@jax.named_scope("projections")
def to_heads(x_BLD: jax.Array, w_DNH: jax.Array) -> jax.Array:
    """Returns x @ w for every head, (B, N, L, H), in the layout that attention reads."""
    if target() != "cpu":  # the product writes it in this layout
        return jnp.einsum("BLD,DNH->BNLH", x_BLD, w_DNH)
    (batch, length, width), (_, heads, head_dim) = x_BLD.shape, w_DNH.shape
    z_BLF = project(x_BLD, w_DNH.reshape(width, -1))
    return z_BLF.reshape(batch, length, heads, head_dim).transpose(0, 2, 1, 3)


@jax.named_scope("projections")
def from_heads(x_BNLH: jax.Array, w_NHD: jax.Array) -> jax.Array:
    """Returns the sum over heads of x @ w, (B, L, D)."""
    if target() != "cpu":
        return jnp.einsum("BNLH,NHD->BLD", x_BNLH, w_NHD)
    batch, heads, length, head_dim = x_BNLH.shape
    x_BLF = x_BNLH.transpose(0, 2, 1, 3).reshape(batch, length, heads * head_dim)
    return project(x_BLF, w_NHD.reshape(heads * head_dim, -1))


def _is_single(x_BLD: jax.Array) -> bool:
    return x_BLD.shape[:2] == (1, 1) and target() == "cpu"


def _parts(w_DF: jax.Array) -> jax.Array:
    parts = math.gcd(w_DF.shape[0], 4)
    return w_DF.reshape(parts, -1, w_DF.shape[1])
