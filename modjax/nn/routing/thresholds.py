"""Thresholds: scores above them are selected, and they follow the capacity.

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
    """Returns which scores are above a measured threshold, without a gradient.

    threshold: one number, (1,), or one for each entry of the last dim of the scores.
    """
    dims = tuple(range(scores.ndim - 1))
    return scores > jnp.expand_dims(jax.lax.stop_gradient(read(threshold)), dims)


def moved(
    measured: Mapping[str, Any], kth_BX: jax.Array | None, updates: jax.Array
) -> dict[str, jax.Array]:
    """Returns the threshold after one more batch, by name; {} without k-th best scores.

    kth_BX: the k-th best score of each row, infinite for a row that has none.
    """
    if kth_BX is None:
        return {}
    return {"threshold": running_mean(measured["threshold"], kth_BX, updates)}


def paced(
    odds_BL: jax.Array, capacity: float, valid_BL: jax.Array, seen_B: jax.Array, spent_B: jax.Array
) -> jax.Array:
    """Returns which log-odds are above a threshold that follows their row's spending, (B, L).

    Let a row have selected n of its first t positions. With a capacity c it is
    z = (n - c t) / sqrt(c t + 4) ahead, in standard deviations of a count; the 4 keeps the first
    positions calm. The threshold is z exp(z^2 / 2), which is below 0 for a row that lags. No
    position depends on a later one. Documents packed into one row share its capacity, as in
    training. A row that requests every position may end about 2 sqrt(c t + 4) above its capacity.

    valid_BL: positions that count. seen_B, spent_B: t and n before the first of these positions.
    """

    def step(state, now):
        (seen_B, spent_B), (odds_B, valid_B) = state, now
        fair_B = capacity * seen_B.astype(jnp.float32)
        ahead_B = (spent_B.astype(jnp.float32) - fair_B) / jnp.sqrt(fair_B + 4)
        wanted_B = (odds_B > ahead_B * jnp.exp(ahead_B**2 / 2)) & valid_B
        return (seen_B + valid_B.astype(jnp.int32), spent_B + wanted_B.astype(jnp.int32)), wanted_B

    return jax.lax.scan(step, (seen_B, spent_B), (odds_BL.T, valid_BL.T))[1].T
