"""Rotary positions.

Legend: B batch, L positions, N heads, H head width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from modjax.kernels.target import target


@jax.named_scope("rotary")
def rotate(x_BNLH: jax.Array, rope_BLH: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair of dims (i, i + n) by its angle, for i < n; later dims stay.

    rope_BLH: cos and sin, each (B, L, n).
    """
    cos_B1LH, sin_B1LH = (table[:, None] for table in rope_BLH)
    half = cos_B1LH.shape[-1]
    if target() == "tpu":
        return _rotate_by_product(x_BNLH, cos_B1LH, sin_B1LH)
    a, b, rest = jnp.split(x_BNLH, (half, 2 * half), axis=-1)
    turned = [a * cos_B1LH - b * sin_B1LH, b * cos_B1LH + a * sin_B1LH]
    return jnp.concatenate(turned + ([rest] if rest.shape[-1] else []), axis=-1)


def _rotate_by_product(x_BNLH: jax.Array, cos_B1LH: jax.Array, sin_B1LH: jax.Array) -> jax.Array:
    """Returns `rotate`. A matrix exchanges the dims: a TPU moves parts of lanes slowly."""
    half, width = cos_B1LH.shape[-1], x_BNLH.shape[-1]
    exchange = np.zeros((width, width), x_BNLH.dtype)
    pairs = np.arange(half)
    exchange[half + pairs, pairs], exchange[pairs, half + pairs] = -1, 1
    rest = [(0, 0)] * 3 + [(0, width - 2 * half)]
    cos = jnp.pad(jnp.concatenate([cos_B1LH] * 2, axis=-1), rest, constant_values=1)
    sin = jnp.pad(jnp.concatenate([sin_B1LH] * 2, axis=-1), rest)
    # Every sum has one term, so the highest precision makes it exact; bfloat16 is exact anyway.
    exchanged = jnp.einsum("BNLH,HK->BNLK", x_BNLH, exchange, precision=jax.lax.Precision.HIGHEST)
    return x_BNLH * cos + exchanged * sin
