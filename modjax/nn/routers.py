"""Routers: what ranks the positions of a sequence, how training selects, and how to do it causally.

A router is a module that `MoDBlock` consumes by three functions and a number:
  router(x_BLD, at) -> Ranking                      a score for every position
  router.wants(ranking, at, threshold) -> wanted_BL   its own causal rule, or None: the top k
  router.weigh(scores_BK) -> weights_BK             of the update
  router.slack                                      room in training, in multiples of the capacity

Legend: B batch, L positions, K selected positions, D model width.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from modjax.config import MoDConfig
from modjax.flops import predictor_width
from modjax.nn.layers import normal_param, project
from modjax.nn.routing import evenly_spread, position_noise

WEIGHTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda r: r,
    "sigmoid": jax.nn.sigmoid,
    "two_sigmoid": lambda r: 2 * jax.nn.sigmoid(r),
    "one_plus_tanh": lambda r: 1 + jnp.tanh(r),
}


class At(NamedTuple):
    """What a router may look at beside the activations.

    positions_BL: of each token in its sequence. valid_BL: False marks padding; None, there is none.
    key: of random routing, or None. received_BL: attention that each position received in the
    dense block before (see attention.received_attention), or None.
    """

    positions_BL: jax.Array
    valid_BL: jax.Array | None
    key: jax.Array | None
    received_BL: jax.Array | None


class Ranking(NamedTuple):
    """ranking_BL orders the positions; scores_BL, the raw r, weighs their updates.

    losses: name -> (B,) weighted losses of the router's own, to be added to the objective.
    """

    ranking_BL: jax.Array
    scores_BL: jax.Array
    losses: dict[str, jax.Array]


class ExpertChoice(nnx.Module):
    """One linear score r = w . x; training takes the top k (arXiv 2404.02258, Eq. 1)."""

    slack = 1.0

    def __init__(self, d_model: int, config: MoDConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.w = normal_param(rngs, (d_model,), ("norm",), std=1 / math.sqrt(d_model))

    def __call__(self, x_BLD: jax.Array, at: At) -> Ranking:
        scores_BL = _linear(x_BLD, self.w[...][:, None])[..., 0]
        return Ranking(scores_BL, scores_BL, {})

    def wants(self, ranking: Ranking, at: At, threshold: jax.Array) -> jax.Array | None:
        return None

    def weigh(self, scores_BK: jax.Array) -> jax.Array:
        return WEIGHTS[self.config.weight](scores_BK)


class Stochastic(ExpertChoice):
    """The paper's control: positions are drawn at random; the score only weighs them."""

    def __call__(self, x_BLD, at):
        if at.key is None:
            raise ValueError("stochastic routing needs a PRNG key: model(tokens, key=...)")
        scores_BL = super().__call__(x_BLD, at).scores_BL
        return Ranking(position_noise(at.key, at.positions_BL), scores_BL, {})


class Positional(ExpertChoice):
    """A control: positions spread evenly, whatever they hold."""

    def wants(self, ranking, at, threshold):
        return evenly_spread(at.positions_BL, self.config.capacity)


class LearnedPosition(ExpertChoice):
    """A control: the score is learned, from sinusoids of the position alone.

    r = w . phi(p), with phi the encoding of arXiv 1706.03762, section 3.5.
    """

    def __call__(self, x_BLD, at):
        width = x_BLD.shape[-1]
        frequency_D = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angle_BLD = at.positions_BL[..., None].astype(jnp.float32) * frequency_D[None, None]
        phi_BLD = jnp.concatenate([jnp.sin(angle_BLD), jnp.cos(angle_BLD)], axis=-1)[..., :width]
        return super().__call__(phi_BLD, at)


class TokenChoice(nnx.Module):
    """Each position chooses between skipping and being processed, by a softmax over both.

    Balance loss: sum_i f_i P_i / t_i, with f_i the share of positions that choose path i, P_i its
    mean probability and t = (1 - capacity, capacity): Eq. 4 of arXiv 2101.03961 for unequal
    targets; it is 1 where f = P = t. z-loss: mean of logsumexp^2 (arXiv 2202.08906, Eq. 5).
    """

    slack = 1.0

    def __init__(self, d_model: int, config: MoDConfig, *, rngs: nnx.Rngs):
        self.config = config
        std = 1 / math.sqrt(d_model)
        self.w = normal_param(rngs, (d_model, 2), ("norm", None), std=std)

    def __call__(self, x_BLD, at):
        logits_BL2 = _linear(x_BLD, self.w[...])
        odds_BL = logits_BL2[..., 1] - logits_BL2[..., 0]
        share_B = masked_mean((odds_BL > 0).astype(jnp.float32), at.valid_BL)
        probability_B = masked_mean(jax.nn.sigmoid(odds_BL), at.valid_BL)
        c = self.config.capacity
        balance_B = jnp.ones_like(share_B)  # at capacity 1 there is nothing to balance
        if c < 1:
            skipped_B = (1 - share_B) * (1 - probability_B) / (1 - c)
            balance_B = skipped_B + share_B * probability_B / c
        z_B = masked_mean(jnp.square(jax.nn.logsumexp(logits_BL2, axis=-1)), at.valid_BL)
        losses = {
            "balance": self.config.balance_weight * balance_B,
            "z": self.config.z_weight * z_B,
        }
        return Ranking(odds_BL, odds_BL, losses)

    def wants(self, ranking, at, threshold):
        return ranking.ranking_BL > 0

    def weigh(self, scores_BK):
        return jax.nn.sigmoid(scores_BK)


class AttentionReceived(nnx.Module):
    """A-MoD (arXiv 2412.20875): rank by the attention received in the dense block before.

    No parameters, and the update is not weighed. Received attention comes from later positions:
    only a predictor can select causally.
    """

    slack = 1.0

    def __init__(self, d_model: int, config: MoDConfig, *, rngs: nnx.Rngs):
        self.config = config

    def __call__(self, x_BLD, at):
        ones_BL = jnp.ones(x_BLD.shape[:2], jnp.float32)
        received_BL = ones_BL if at.received_BL is None else at.received_BL
        return Ranking(received_BL, ones_BL, {})

    def wants(self, ranking, at, threshold):
        return None

    def weigh(self, scores_BK):
        return jnp.ones_like(scores_BK)


class Threshold(ExpertChoice):
    """Causal in training too: positions that score above a running mean of the k-th score.

    After arXiv 2603.11535. The threshold is measured by training, see nn/updates.py.
    """

    def __init__(self, d_model: int, config: MoDConfig, *, rngs: nnx.Rngs):
        super().__init__(d_model, config, rngs=rngs)
        self.slack = config.slack

    def wants(self, ranking, at, threshold):
        return ranking.ranking_BL > threshold


class Predictor(nnx.Module):
    """Foretells the top k of a router without the future (arXiv 2404.02258, section 3.5).

    The logit is a silu MLP of the normalised activations, plus a line in the router's own score:
    what it learns is mostly where the k-th score lies. Nothing before it gets a gradient.
    """

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        hidden = predictor_width(d_model)
        std = 1 / math.sqrt(d_model)
        self.w_in = normal_param(rngs, (d_model, hidden), ("norm", None), std=std)
        self.w_out = normal_param(rngs, (hidden,), ("norm",), std=1 / math.sqrt(hidden))
        # Slope and offset of the line in the router's score.
        self.line = nnx.Param(jnp.array([1.0, 0.0]), out_sharding=("norm",), eager_sharding=False)

    def __call__(self, x_BLD: jax.Array, scores_BL: jax.Array) -> jax.Array:
        """Logits (B, L), float32; positive where the position should be processed."""
        x_BLD, scores_BL = jax.lax.stop_gradient((x_BLD, scores_BL))
        x32_BLD = x_BLD.astype(jnp.float32)
        scale_BL1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True) + 1e-6)
        h_BLF = jax.nn.silu(project((x32_BLD * scale_BL1).astype(x_BLD.dtype), self.w_in[...]))
        logits_BL = jnp.einsum("BLF,F->BL", h_BLF.astype(jnp.float32), self.w_out[...])
        slope, offset = self.line[...]
        return logits_BL + slope * scores_BL + offset


def _linear(x_BLD: jax.Array, w_DK: jax.Array) -> jax.Array:
    # Full float32: accelerators would multiply in bfloat16, and ties would be common.
    return jnp.einsum(
        "BLD,DK->BLK", x_BLD.astype(jnp.float32), w_DK, precision=jax.lax.Precision.HIGHEST
    )


def masked_mean(x_BL: jax.Array, valid_BL: jax.Array | None) -> jax.Array:
    """Mean over each row's valid positions, (B,); 0 where there is none."""
    if valid_BL is None:
        return jnp.mean(x_BL, axis=1)
    total_B = jnp.sum(jnp.where(valid_BL, x_BL, 0.0), axis=1)
    return total_B / jnp.maximum(jnp.sum(valid_BL, axis=1), 1).astype(jnp.float32)


ROUTERS: dict[str, Callable[..., nnx.Module]] = {
    "mod": ExpertChoice,
    "stochastic": Stochastic,
    "positional": Positional,
    "learned_position": LearnedPosition,
    "token_choice": TokenChoice,
    "attention": AttentionReceived,
    "threshold": Threshold,
}
