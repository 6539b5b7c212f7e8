"""Cross-entropy of logits with the next tokens.

Legend: B batch, L positions, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Name of the only numbers that a chunk of the loss keeps: the backward pass then computes the
# gradient of the logits as the product writes them, without another pass for a maximum or a sum.
NORMALISER = "normaliser"


@jax.custom_vjp
def cross_entropy(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """Returns log(sum_v exp z_v) - z_t in nats, (B, L), for logits z and target t, in float32."""
    return _forward(logits_BLV, targets_BL)[0]


def _forward(logits_BLV, targets_BL):
    normaliser_BL = checkpoint_name(jax.nn.logsumexp(logits_BLV, axis=-1), NORMALISER)
    # A sum over the vocabulary, because XLA would gather the logits, and scatter their gradient.
    target_BL = jnp.sum(jnp.where(_is_target(logits_BLV, targets_BL), logits_BLV, 0), axis=-1)
    return normaliser_BL - target_BL, (logits_BLV, targets_BL, normaliser_BL)


def _backward(inputs, dy_BL):
    logits_BLV, targets_BL, normaliser_BL = inputs
    p_BLV = jnp.exp(logits_BLV - normaliser_BL[..., None])
    error_BLV = jnp.where(_is_target(logits_BLV, targets_BL), p_BLV - 1, p_BLV)
    return error_BLV * dy_BL[..., None], None


cross_entropy.defvjp(_forward, _backward)


def _is_target(logits_BLV, targets_BL):
    vocab_11V = jnp.arange(logits_BLV.shape[-1], dtype=targets_BL.dtype)[None, None]
    return targets_BL[..., None] == vocab_11V
