"""Operations of experts in slots.

Legend: B batch, E experts, L positions, C slots of an expert, Z rows of a block, D model width,
F feed-forward width.
"""

import functools

import jax
import jax.numpy as jnp

from modjax.kernels.target import target
from modjax.kernels.varying import varying_alike


def first_with_counts(count_BEL: jax.Array, size: int) -> jax.Array:
    """Returns the first position at which a running count reaches 1, ..., size, (B, E, size).

    A count that is not reached gives L.
    """
    # A TPU compares a thousand numbers at once, but gathers them one by one.
    method = "compare_all" if target() == "tpu" else "scan"
    sought_C = jnp.arange(1, size + 1, dtype=count_BEL.dtype)
    find = functools.partial(jnp.searchsorted, v=sought_C, method=method)
    return jax.vmap(jax.vmap(find))(count_BEL)


def weighted_product(h_EZF: jax.Array, w_EDF: jax.Array, weight_EZ: jax.Array) -> jax.Array:
    """Returns weight * (h @ w.T) of every expert, (E, Z, D).

    The gradient of the weights is sum_f h_f (dy @ w)_f. Its product is that of the gradient of h,
    so that no activation of width D has to be recomputed.
    """
    return _weighted(*varying_alike(h_EZF, w_EDF, weight_EZ))


@jax.custom_vjp
def _weighted(h_EZF, w_EDF, weight_EZ):
    return jnp.einsum("EZF,EDF->EZD", h_EZF, w_EDF) * weight_EZ[..., None]


def _forward(h_EZF, w_EDF, weight_EZ):
    return _weighted(h_EZF, w_EDF, weight_EZ), (h_EZF, w_EDF, weight_EZ)


def _backward(inputs, dy_EZD):
    h_EZF, w_EDF, weight_EZ = inputs
    back_EZF = jnp.einsum("EZD,EDF->EZF", dy_EZD, w_EDF)
    dw_EDF = jnp.einsum("EZD,EZF->EDF", dy_EZD * weight_EZ[..., None], h_EZF)
    float32 = h_EZF.astype(jnp.float32) * back_EZF.astype(jnp.float32)
    return back_EZF * weight_EZ[..., None], dw_EDF, jnp.sum(float32, axis=2).astype(weight_EZ.dtype)


_weighted.defvjp(_forward, _backward)
