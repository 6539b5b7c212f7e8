"""Placement of the residual stream."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from modjax.kernels.target import target
from modjax.sharding import constrain


def constrain_stream(x: jax.Array) -> jax.Array:
    """Fixes the sharding of activations (B, L, ...), of any rank, and their layout on a TPU.

    Left alone, the TPU compiler puts positions last, and copies the stream for every gather.
    """
    x = constrain(x, "batch", "length", *[None] * (x.ndim - 2))
    if target() != "tpu":
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
