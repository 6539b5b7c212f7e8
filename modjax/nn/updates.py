"""What a train step takes from routed blocks: their losses, and the thresholds that it measures.

Legend: B batch, G groups.
"""

from typing import Any

import jax
import jax.numpy as jnp

from modjax.nn.mod import BlockAux

# The running mean of the k-th score forgets at this rate; until then it is the plain mean.
THRESHOLD_RATE = 0.01


def update_thresholds(blocks: dict[str, Any], aux: dict[str, BlockAux], updates: jax.Array) -> Any:
    """Parameters of the blocks with every threshold moved towards the batch's mean k-th score.

    blocks: the tree of Transformer.blocks. updates: how often this was done before.
    """
    rate = jnp.maximum(THRESHOLD_RATE, 1 / (updates.astype(jnp.float32) + 1))
    new = dict(blocks)
    for name, slot in aux.items():
        old_G = blocks[name]["threshold"][:, 0]
        known_GB = jnp.isfinite(slot["kth_B"])
        total_G = jnp.sum(jnp.where(known_GB, slot["kth_B"], 0.0), axis=1)
        count_G = jnp.sum(known_GB.astype(jnp.float32), axis=1)
        mean_G = jnp.where(count_G > 0, total_G / jnp.maximum(count_G, 1.0), old_G)
        new_G = old_G + rate * (mean_G - old_G)
        new[name] = {**blocks[name], "threshold": new_G[:, None]}
    return new


def routing_losses(aux: dict[str, BlockAux]) -> jax.Array:
    """What the routed blocks add to the objective: the sum over blocks of their mean losses."""
    losses_GB = [loss_GB for slot in aux.values() for loss_GB in slot["losses"].values()]
    return sum((jnp.sum(jnp.mean(loss_GB, axis=1)) for loss_GB in losses_GB), jnp.float32(0))
