"""Rule from outside that is trained by reward: it draws positions, and the loss is their cost.

The loss is REINFORCE (Williams 1992) with a running mean of the loss as its baseline.
Legend: B batch, L positions, K selected positions, R scores of a position.
"""

import dataclasses

import jax
import jax.numpy as jnp

import modjax
from modjax.nn import Record, measured
from modjax.nn.routing.rules import Choice, Rule
from modjax.nn.routing.selection import position_noise


@dataclasses.dataclass(frozen=True)
class Sampled(modjax.Rule):
    """Each position is processed with the probability sigmoid(score)."""

    weight: float = 0.01
    causal = True

    def causal_rules(self) -> tuple[str, ...]:
        return ("sampled",)

    def slot_share(self, capacity: float) -> float:
        return min(1.0, 2 * capacity)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn(Record):
    """log_odds_BL: log probabilities of what was drawn. baseline_B: the mean loss until now."""

    chance_BL: jax.Array
    log_odds_BL: jax.Array
    baseline_B: jax.Array

    def loss(self, tokens=None, totals=None):
        if tokens is None:
            return jnp.float32(0)
        gain_BL = self.baseline_B[:, None] - jax.lax.stop_gradient(tokens.nll_BL)
        return (
            -0.01
            * jnp.sum(gain_BL * self.log_odds_BL * tokens.weights_BL)
            / jnp.sum(tokens.weights_BL)
        )

    def observed(self, measured, updates, tokens=None):
        mean = jnp.sum(tokens.nll_BL * tokens.weights_BL) / jnp.sum(tokens.weights_BL)
        rate = jnp.maximum(0.1, 1 / (updates + 1))
        return {"baseline": measured["baseline"] + rate * (mean - measured["baseline"])}

    def counts(self, valid_BL):
        return {
            "chance": jnp.sum(jnp.where(valid_BL, self.chance_BL, 0.0), axis=1),
            "positions": jnp.sum(valid_BL, axis=1).astype(jnp.float32),
        }

    @classmethod
    def outcome(cls, counts):
        each = [of["chance"].sum() / of["positions"].sum() for of in counts.values()]
        return {"sampled/chance": float(sum(each) / len(each))}

    @classmethod
    def statistics(cls, records, valid_BL):
        chances = [jnp.mean(record.chance_BL) for record in records.values()]
        return {"sampled/chance": jnp.mean(jnp.stack(chances))}


class SampledModule(Rule):
    def __init__(self, spec, shape, *, capacity, rngs):
        super().__init__(spec, shape, capacity=capacity, rngs=rngs)
        self.baseline = measured((1,))

    def choose(self, scores_BLR, at, call) -> Choice:
        scores_BL = scores_BLR[..., 0]
        noise_BL = jax.scipy.special.ndtr(
            position_noise(call.key, at.sequences_BL, at.positions_BL)
        )
        return Choice(scores_BL, scores_BL, noise_BL < jax.nn.sigmoid(scores_BL), scores_BLR)

    def weigh(self, scores_BK):
        return jnp.ones_like(scores_BK)

    def report(self, x_BLD, choice, selection, at):
        sign_BL = jnp.where(choice.requested_BL, 1.0, -1.0)
        baseline_B = jnp.broadcast_to(
            jax.lax.stop_gradient(self.baseline[...]), choice.scores_BL.shape[:1]
        )
        log_odds_BL = jax.nn.log_sigmoid(sign_BL * choice.scores_BL)
        return Drawn(jax.nn.sigmoid(choice.scores_BL), log_odds_BL, baseline_B)


modjax.register(Sampled, SampledModule)
