"""Mixture-of-Depths: a wrapper that lets any block process only a share of the positions.

Legend: B batch, L positions, K selected positions, D model width, A routed blocks.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modjax.config import MoDConfig
from modjax.flops import selected_tokens
from modjax.nn.layers import normal_param
from modjax.nn.routing import (
    Selection,
    expert_choice,
    gather,
    scatter_add,
    selected_mask,
    stochastic,
)
from modjax.nn.sharding import constrain

WEIGHTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda r: r,
    "sigmoid": jax.nn.sigmoid,
    "two_sigmoid": lambda r: 2 * jax.nn.sigmoid(r),
    "one_plus_tanh": lambda r: 1 + jnp.tanh(r),
}


class MoDBlock(nnx.Module):
    """Routes the k = max(1, round(capacity * L)) best-scored positions through `inner`.

    Eq. 1 of arXiv 2404.02258. `inner` maps (x_BKD, *per_position) to x_BKD or to (x_BKD, aux)
    and sees the selected positions only, in order, with what belongs to each of them.
    """

    def __init__(self, inner: nnx.Module, d_model: int, config: MoDConfig, *, rngs: nnx.Rngs):
        self.inner = inner
        self.config = config
        self.router = normal_param(rngs, (d_model,), ("norm",), std=1 / math.sqrt(d_model))

    def __call__(
        self,
        x_BLD: jax.Array,
        *per_position: Any,
        valid_BL: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns x_BLD and {"scores_BL", "selected_BL"}.

        per_position: pytrees of arrays (B or 1, L, ...) that `inner` takes beside x: positions,
          segment ids, rotary tables. Each is gathered like x.
        valid_BL: False marks padding, which is never selected.
        key: for subclasses whose selection is random.
        """
        length = x_BLD.shape[1]
        # Full float32: accelerators would multiply in bfloat16, and ties would be common.
        scores_BL = jnp.einsum(
            "BLD,D->BL", x_BLD.astype(jnp.float32), self.router[...],
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        selection = self.select(scores_BL, selected_tokens(self.config.capacity, length),
                                valid_BL, key)  # fmt: skip
        x_BKD, selected_inputs = jax.tree.map(
            lambda leaf: gather(leaf, selection.indices_BK), (x_BLD, per_position)
        )
        x_BKD = constrain(x_BKD, "batch", "length", None)
        out = self.inner(x_BKD, *selected_inputs)  # type: ignore[operator]
        y_BKD = (out[0] if isinstance(out, tuple) else out).astype(x_BLD.dtype)
        weight_BK1 = WEIGHTS[self.config.weight](selection.scores_BK)[..., None]
        update_BKD = _update(self.config.residual, weight_BK1.astype(x_BLD.dtype), x_BKD, y_BKD)
        aux = {"scores_BL": scores_BL, "selected_BL": selected_mask(selection, length)}
        return scatter_add(x_BLD, selection.indices_BK, update_BKD), aux

    def select(
        self, scores_BL: jax.Array, k: int, valid_BL: jax.Array | None, key: jax.Array | None
    ) -> Selection:
        del key
        return expert_choice(scores_BL, k, valid_BL)


class StochasticMoDBlock(MoDBlock):
    """The paper's control: the same block, its positions drawn at random."""

    def select(self, scores_BL, k, valid_BL, key):
        if key is None:
            raise ValueError("stochastic routing needs a PRNG key: model(tokens, key=...)")
        return stochastic(scores_BL, k, valid_BL, key)


def _update(residual: str, weight_BK1, x_BKD, y_BKD):
    """What is added to the stream at selected positions, for each reading of Eq. 1."""
    if residual == "delta":
        return weight_BK1 * (y_BKD - x_BKD)
    if residual == "literal":
        return weight_BK1 * y_BKD
    return weight_BK1 * y_BKD - x_BKD


def routing_statistics(
    aux: dict[str, dict[str, jax.Array]], valid_BL: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Scalars that describe the routers of one forward pass; {} for a dense model.

    score_mean, score_std: of the raw scores over valid positions, averaged over routed blocks.
    position_entropy: entropy of "which position was chosen", from the batch's counts, averaged
      over routed blocks and divided by log L: 1 where every position is chosen equally often.
    chosen_by_all, chosen_by_none: share of valid positions that every, or no, routed block took.
    """
    if not aux:
        return {}
    scores_ABL = jnp.concatenate([slot["scores_BL"] for slot in aux.values()])
    selected_ABL = jnp.concatenate([slot["selected_BL"] for slot in aux.values()])
    length = scores_ABL.shape[-1]
    if valid_BL is None:
        valid_BL = jnp.ones(scores_ABL.shape[1:], bool)
    count = jnp.sum(valid_BL).astype(jnp.float32)
    masked_ABL = jnp.where(valid_BL[None], scores_ABL, 0.0)
    mean_A = jnp.sum(masked_ABL, axis=(1, 2)) / count
    centred_ABL = jnp.where(valid_BL[None], scores_ABL - mean_A[:, None, None], 0.0)
    std_A = jnp.sqrt(jnp.sum(jnp.square(centred_ABL), axis=(1, 2)) / count)
    chosen_AL = jnp.sum(selected_ABL, axis=1).astype(jnp.float32)
    share_AL = chosen_AL / jnp.maximum(jnp.sum(chosen_AL, axis=1, keepdims=True), 1.0)
    entropy_A = -jnp.sum(jax.scipy.special.xlogy(share_AL, share_AL), axis=1) / math.log(length)
    every_BL = jnp.all(selected_ABL, axis=0) & valid_BL
    none_BL = ~jnp.any(selected_ABL, axis=0) & valid_BL
    return {
        "router/score_mean": jnp.mean(mean_A),
        "router/score_std": jnp.mean(std_A),
        "router/position_entropy": jnp.mean(entropy_A),
        "router/chosen_by_all": jnp.sum(every_BL).astype(jnp.float32) / count,
        "router/chosen_by_none": jnp.sum(none_BL).astype(jnp.float32) / count,
    }
