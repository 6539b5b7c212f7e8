"""Routers: layers that score every position, in float32.

Legend: B batch, L positions, R scores of a position, D model width.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from modjax import specs
from modjax.nn.build import LayerModule
from modjax.nn.call import At, Call, Out
from modjax.nn.params import normal_param, read
from modjax.nn.routing.selection import ROUTING


class Linear(LayerModule):
    """Linear scores r = x w (arXiv 2404.02258, Eq. 1)."""

    def __init__(self, spec: specs.Router, shape: specs.Shape, *, outputs: int, rngs: nnx.Rngs):
        size, std = (shape.d_model, outputs), 1 / math.sqrt(shape.d_model)
        # Only the direction of a single score matters, so weight decay leaves its length alone.
        about = {"role": "router", "decays": outputs > 1}
        self.w = normal_param(rngs, size, ("replicated", None), std=std, **about)

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: None = None) -> Out:
        return Out(linear(x_BLD, read(self.w)))


class Sinusoids(Linear):
    """Scores r = phi(p) w, with phi the position encoding of arXiv 1706.03762, section 3.5."""

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: None = None) -> Out:
        width = x_BLD.shape[-1]
        frequency_D = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angle_BLD = at.positions_BL[..., None].astype(jnp.float32) * frequency_D[None, None]
        phi_BLD = jnp.concatenate([jnp.sin(angle_BLD), jnp.cos(angle_BLD)], axis=-1)[..., :width]
        return super().__call__(phi_BLD, at, call)


class Received(LayerModule):
    """Scores that an earlier attention layer passed on (A-MoD, arXiv 2412.20875).

    With a cache, no layer passes them on and no rule reads them, so they are 1.
    """

    def __init__(self, spec: specs.Received, shape: specs.Shape, *, outputs: int, rngs: nnx.Rngs):
        self.outputs = outputs

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: None = None) -> Out:
        ones_BL = jnp.ones(x_BLD.shape[:2], jnp.float32)
        received_BL = at.passed.get("received", ones_BL)
        return Out(jnp.repeat(received_BL[..., None], self.outputs, axis=2))


@jax.named_scope("router")
def linear(x_BLD: jax.Array, w_DR: jax.Array) -> jax.Array:
    """Returns x w in float32, (B, L, R)."""
    # Full float32: accelerators would multiply in bfloat16, and ties would be common.
    precision = jax.lax.Precision.HIGHEST
    scores_BLR = jnp.einsum("BLD,DR->BLR", x_BLD.astype(jnp.float32), w_DR, precision=precision)
    return checkpoint_name(scores_BLR, ROUTING)
