"""Products of activations with matrices.

Legend: B batch, L positions, D model width, F feed-forward width, T = B * L; P parts of K each.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from modjax.kernels.target import target


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
    return x_BLD.shape[:2] == (1, 1) and target() == "cpu"


def _parts(w_DF: jax.Array) -> jax.Array:
    parts = math.gcd(w_DF.shape[0], 4)
    return w_DF.reshape(parts, -1, w_DF.shape[1])
