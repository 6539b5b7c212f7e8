"""Thresholds on scores, which select about as many positions as the capacity allows.

A measured threshold is the running mean of the score at which training fills the capacity. A paced
one rises and falls with what a row has selected so far.

Legend: B batch, L positions, X numbers.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modjax.nn.params import read
from modjax.nn.records import running_mean


def above(scores: jax.Array, threshold: nnx.Variable) -> jax.Array:
    """Returns a mask of the scores above a measured threshold, without a gradient.

    threshold: one number, (1,), or one for each entry of the last dim of the scores.
    """
    dims = tuple(range(scores.ndim - 1))
    return scores > jnp.expand_dims(jax.lax.stop_gradient(read(threshold)), dims)


def moved(
    measured: Mapping[str, Any], kth_BX: jax.Array | None, updates: jax.Array
) -> dict[str, jax.Array]:
    """Returns the threshold after one more batch, as {"threshold": ...}; {} if kth_BX is None.

    kth_BX: the k-th best score of each row, infinite for a row that has none.
    updates: number of earlier updates.
    """
    if kth_BX is None:
        return {}
    return {"threshold": running_mean(measured["threshold"], kth_BX, updates)}


def paced(
    log_odds_BL: jax.Array,
    capacity: float,
    valid_BL: jax.Array,
    seen_B: jax.Array,
    spent_B: jax.Array,
) -> jax.Array:
    """Returns a mask of the log-odds above a threshold that keeps each row near capacity, (B, L).

    A row that selected n of its first t positions, at capacity c, is z = (n - c t) / sqrt(c t + 4)
    standard deviations of a count ahead. The 4 damps z at the first positions. The threshold,
    z exp(z^2 / 2), is below 0 for a row that is behind. No position depends on a later one. Packed
    documents share the capacity of their row, as in training. A row that requests every position
    may end about 2 sqrt(c t + 4) above its capacity.

    valid_BL: positions that count. seen_B, spent_B: t and n before the first of these positions.
    """

    def step(state, now):
        (seen_B, spent_B), (log_odds_B, valid_B) = state, now
        fair_B = capacity * seen_B.astype(jnp.float32)
        ahead_B = (spent_B.astype(jnp.float32) - fair_B) / jnp.sqrt(fair_B + 4)
        requested_B = (log_odds_B > ahead_B * jnp.exp(ahead_B**2 / 2)) & valid_B
        counts = seen_B + valid_B.astype(jnp.int32), spent_B + requested_B.astype(jnp.int32)
        return counts, requested_B

    return jax.lax.scan(step, (seen_B, spent_B), (log_odds_BL.T, valid_BL.T))[1].T
