"""Random draws of the next token.

Legend: B batch, V vocabulary.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from modjax.errors import require


@dataclass(frozen=True)
class Sampling:
    """Settings of random draws.

    temperature: divides the logits; 0 takes the most likely token.
    top_k: draws from the k most likely tokens only; 0 draws from all.
    top_p: draws from the fewest most likely tokens that have this mass (arXiv 1904.09751).
    vocab_size: never draws ids from this one on; None draws all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    vocab_size: int | None = None

    def __post_init__(self):
        finite = 0 <= self.temperature < math.inf
        require(finite, "temperature", self.temperature, "must be 0 or more, and finite")
        require(self.top_k >= 0, "top_k", self.top_k, "must be 0 (all) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")


PLAIN = Sampling()


def draw_tokens(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns one token per row, (B,). It depends on the key, the row's number and its logits."""
    if sampling.vocab_size is not None:
        allowed_V = jnp.arange(logits_BV.shape[1]) < sampling.vocab_size
        logits_BV = jnp.where(allowed_V[None], logits_BV, -jnp.inf)
    if sampling.temperature < np.finfo(np.float32).tiny:  # 0 in float32
        return jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
    # The largest logit becomes 0, so that no temperature overflows.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)) / sampling.temperature
    vocab = logits_BV.shape[1]
    if 0 < sampling.top_k < vocab:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=1)
        # A token stays while those before it have less mass than top_p: the first always stays.
        kept_B = jnp.sum(jnp.cumsum(p_BV, axis=1) - p_BV < sampling.top_p, axis=1)
        least_B1 = jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=1)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(logits_BV.shape[0]))
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
