"""Routers: what ranks the positions of a sequence, how training selects, and how to do it causally.

A router is a module that a routed layer consumes by three functions:
  router(x_BLD, at, key) -> Ranking                   a score for every position
  router.wants(ranking, at, threshold) -> wanted_BL   its own causal rule, or None: the top k
  router.weigh(scores_BK) -> weights_BK               of the update
What a routing scheme is apart from that, spec/mod.py says.

Legend: B batch, L positions, K selected positions, D model width.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from modjax.kernels import project
from modjax.nn.call import At
from modjax.nn.params import make_param, normal_param
from modjax.nn.routing import evenly_spread, position_noise
from modjax.spec.mod import MoDConfig, predictor_width

WEIGHTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda r: r,
    "sigmoid": jax.nn.sigmoid,
    "two_sigmoid": lambda r: 2 * jax.nn.sigmoid(r),
    "one_plus_tanh": lambda r: 1 + jnp.tanh(r),
}


class Ranking(NamedTuple):
    """ranking_BL orders the positions; scores_BL, the raw r, weighs their updates.

    losses: name -> (B,) weighted losses of the router's own, to be added to the objective.
    """

    ranking_BL: jax.Array
    scores_BL: jax.Array
    losses: dict[str, jax.Array]


class ExpertChoice(nnx.Module):
    """One linear score r = w . x; training takes the top k (arXiv 2404.02258, Eq. 1)."""

    def __init__(self, d_model: int, config: MoDConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.w = normal_param(
            rngs, (d_model,), ("replicated",), std=1 / math.sqrt(d_model), role="router"
        )

    def __call__(self, x_BLD: jax.Array, at: At, key: jax.Array | None) -> Ranking:
        scores_BL = linear(x_BLD, self.w[...][:, None])[..., 0]
        return Ranking(scores_BL, scores_BL, {})

    def wants(self, ranking: Ranking, at: At, threshold: jax.Array) -> jax.Array | None:
        return None

    def weigh(self, scores_BK: jax.Array) -> jax.Array:
        return WEIGHTS[self.config.weight](scores_BK)


class Stochastic(ExpertChoice):
    """The paper's control: positions are drawn at random; the score only weighs them."""

    def __call__(self, x_BLD, at, key):
        if key is None:
            raise ValueError("stochastic routing needs a PRNG key: model(tokens, key=...)")
        scores_BL = super().__call__(x_BLD, at, key).scores_BL
        return Ranking(position_noise(key, at.sequences_BL, at.positions_BL), scores_BL, {})


class Positional(ExpertChoice):
    """A control: positions spread evenly, whatever they hold."""

    def wants(self, ranking, at, threshold):
        return evenly_spread(at.positions_BL, self.config.capacity)


class LearnedPosition(ExpertChoice):
    """A control: the score is learned, from sinusoids of the position alone.

    r = w . phi(p), with phi the encoding of arXiv 1706.03762, section 3.5.
    """

    def __call__(self, x_BLD, at, key):
        width = x_BLD.shape[-1]
        frequency_D = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angle_BLD = at.positions_BL[..., None].astype(jnp.float32) * frequency_D[None, None]
        phi_BLD = jnp.concatenate([jnp.sin(angle_BLD), jnp.cos(angle_BLD)], axis=-1)[..., :width]
        return super().__call__(phi_BLD, at, key)


class TokenChoice(nnx.Module):
    """Each position chooses between skipping and being processed, by a softmax over both.

    Balance loss: sum_i f_i P_i / t_i, with f_i the share of positions that choose path i, P_i its
    mean probability and t = (1 - capacity, capacity): Eq. 4 of arXiv 2101.03961 for unequal
    targets; it is 1 where f = P = t. z-loss: mean of logsumexp^2 (arXiv 2202.08906, Eq. 5).
    """

    def __init__(self, d_model: int, config: MoDConfig, *, rngs: nnx.Rngs):
        self.config = config
        std = 1 / math.sqrt(d_model)
        self.w = normal_param(rngs, (d_model, 2), ("replicated", None), std=std, role="router")

    def __call__(self, x_BLD, at, key):
        logits_BL2 = linear(x_BLD, self.w[...])
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
    """A-MoD (arXiv 2412.20875): rank by the attention that an earlier layer says was received.

    No parameters, and the update is not weighed. Received attention comes from later positions:
    only a predictor can select causally. With a cache nobody hands it on, nor is it needed.
    """

    def __init__(self, d_model: int, config: MoDConfig, *, rngs: nnx.Rngs):
        self.config = config

    def __call__(self, x_BLD, at, key):
        ones_BL = jnp.ones(x_BLD.shape[:2], jnp.float32)
        received_BL = at.handed.get("received", ones_BL)
        return Ranking(received_BL, ones_BL, {})

    def wants(self, ranking, at, threshold):
        return None

    def weigh(self, scores_BK):
        return jnp.ones_like(scores_BK)


class Threshold(ExpertChoice):
    """Causal in training too: positions that score above a running mean of the k-th score.

    After arXiv 2603.11535. The threshold is measured by training, see nn/routed.py.
    """

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
        self.w_in = normal_param(
            rngs, (d_model, hidden), ("replicated", None), std=std, role="predictor"
        )
        self.w_out = normal_param(
            rngs, (hidden,), ("replicated",), std=1 / math.sqrt(hidden), role="predictor"
        )
        # Slope and offset of the line in the router's score.
        self.line = make_param(jnp.array([1.0, 0.0]), ("replicated",), role="predictor")

    def __call__(self, x_BLD: jax.Array, scores_BL: jax.Array) -> jax.Array:
        """Logits (B, L), float32; positive where the position should be processed."""
        x_BLD, scores_BL = jax.lax.stop_gradient((x_BLD, scores_BL))
        x32_BLD = x_BLD.astype(jnp.float32)
        scale_BL1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True) + 1e-6)
        h_BLF = jax.nn.silu(project((x32_BLD * scale_BL1).astype(x_BLD.dtype), self.w_in[...]))
        logits_BL = jnp.einsum("BLF,F->BL", h_BLF.astype(jnp.float32), self.w_out[...])
        slope, offset = self.line[...]
        return logits_BL + slope * scores_BL + offset


def linear(x_BLD: jax.Array, w_DK: jax.Array) -> jax.Array:
    """A router's scores, (B, L, K), in float32."""
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
    "expert_choice": ExpertChoice,
    "stochastic": Stochastic,
    "positional": Positional,
    "learned_position": LearnedPosition,
    "token_choice": TokenChoice,
    "received": AttentionReceived,
    "threshold": Threshold,
}
