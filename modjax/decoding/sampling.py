"""How the next token is drawn.

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
    """How the next token is drawn.

    temperature: divides the logits; 0 takes the likeliest token. top_k: only the k likeliest; 0,
    all. top_p: only the fewest likeliest that have this mass (arXiv 1904.09751). vocab_size: ids
    from here on are never drawn; None, all may be.
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
    """One token per row, (B,); a row's draw depends on the key, its number and its logits."""
    if sampling.vocab_size is not None:
        allowed_V = jnp.arange(logits_BV.shape[1]) < sampling.vocab_size
        logits_BV = jnp.where(allowed_V[None], logits_BV, -jnp.inf)
    if sampling.temperature < np.finfo(np.float32).tiny:  # 0 in float32
        return jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
    # The likeliest becomes 0, so that no temperature overflows.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)) / sampling.temperature
    vocab = logits_BV.shape[1]
    if 0 < sampling.top_k < vocab:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=1)
        # A token stays while those before it have less than the mass: the first always does.
        kept_B = jnp.sum(jnp.cumsum(p_BV, axis=1) - p_BV < sampling.top_p, axis=1)
        least_B1 = jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=1)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(logits_BV.shape[0]))
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
