"""Rules of positions: each turns the scores of a router into a selection.

Legend: B batch, L positions, K selected positions, R scores of a position, D model width,
F feed-forward width.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from modjax import specs
from modjax.kernels import project
from modjax.nn.call import At, Call
from modjax.nn.params import make_param, measured, normal_param, read
from modjax.nn.records import Record
from modjax.nn.routing.losses import RuleRecord, path_losses, selection_loss
from modjax.nn.routing.selection import Selection, position_noise
from modjax.nn.routing.thresholds import above, paced
from modjax.specs.layers.routers import predictor_width

WEIGHTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda r: r,
    "sigmoid": jax.nn.sigmoid,
    "two_sigmoid": lambda r: 2 * jax.nn.sigmoid(r),
    "one_plus_tanh": lambda r: 1 + jnp.tanh(r),
    "one": jnp.ones_like,
}


class Choice(NamedTuple):
    """Scores by which training selects.

    ranking_BL: ranking scores; higher is better.
    scores_BL: raw scores, from which the updates get their weights.
    requested_BL: requested positions, processed from the first on until the slots are full. None
      processes the k best by ranking_BL.
    scores_BLR: all scores of the router.
    """

    ranking_BL: jax.Array
    scores_BL: jax.Array
    requested_BL: jax.Array | None
    scores_BLR: jax.Array


class Rule(nnx.Module):
    """Base class of rules. A rule implements only the methods that its uses need.

    `MoD.rule` needs `choose` and `weigh`. `MoD.causal` needs `decide`, unless training requests
    positions.
    """

    def __init__(self, spec: specs.Rule, shape: specs.Shape, *, capacity: float, rngs: nnx.Rngs):
        self.spec: Any = spec
        self.capacity = capacity

    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        """Returns the choice of training, from the router's scores."""
        raise NotImplementedError

    def weigh(self, scores_BK: jax.Array) -> jax.Array:
        """Returns the weights of the updates at selected positions, from their raw scores."""
        raise NotImplementedError

    def decide(
        self, name: str, x_BLD: jax.Array, choice: Choice, at: At, state: Any
    ) -> tuple[jax.Array, Any]:
        """Returns the positions requested under causal routing, (B, L), and the state after them.

        The default requests the positions that training requests. No position may depend on a later
        one, neither through x_BLD nor through `choice`.

        name: the method, one of the spec's `causal_rules()`, such as "threshold" or "paced".
        """
        if choice.requested_BL is None:
            raise NotImplementedError
        return choice.requested_BL, state

    def start(self, batch: int) -> Any:
        """Returns the state of `decide` before the first position of each row."""
        return ()

    def report(
        self, x_BLD: jax.Array, choice: Choice, selection: Selection, at: At
    ) -> Record | None:
        """Returns the rule's record, for losses, running statistics and metrics, or None.

        selection: the selection of training.
        """
        return None


class Weighed(Rule):
    """Base class of rules that weight each update by a function of its raw score."""

    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        scores_BL = scores_BLR[..., 0]
        return Choice(scores_BL, scores_BL, None, scores_BLR)

    def weigh(self, scores_BK: jax.Array) -> jax.Array:
        return WEIGHTS[self.spec.weight](scores_BK)


class KthBest(Weighed):
    """Base class of rules with a threshold: the running mean of the k-th highest ranking score."""

    def __init__(self, spec: specs.Rule, shape: specs.Shape, *, capacity: float, rngs: nnx.Rngs):
        super().__init__(spec, shape, capacity=capacity, rngs=rngs)
        self.threshold = measured((1,))

    def decide(self, name, x_BLD, choice, at, state):
        return above(choice.ranking_BL, self.threshold), state

    def report(self, x_BLD, choice, selection, at):
        return RuleRecord({}, kth_B=selection.kth_B)


class TopK(KthBest):
    """Top-k selection. Under causal routing, selection by a threshold or by an auxiliary loss.

    "threshold" requests scores above the threshold. "auxiliary" requests scores above 0, and an
    auxiliary loss trains them to agree with the top k.
    """

    def decide(self, name, x_BLD, choice, at, state):
        if name == "auxiliary":
            return choice.scores_BL > 0, state
        return super().decide(name, x_BLD, choice, at, state)

    def report(self, x_BLD, choice, selection, at):
        record, weight = super().report(x_BLD, choice, selection, at), self.spec.auxiliary
        if not weight:
            return record
        taught = selection_loss("auxiliary", weight, choice.scores_BL, selection, at)
        return replace(taught, kth_B=record.kth_B)


class Random(KthBest):
    """Random selection: the k positions with the largest `position_noise`."""

    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        if call.key is None:
            raise ValueError("Random() needs a PRNG key: model(tokens, key=...)")
        noise_BL = position_noise(call.key, at.sequences_BL, at.positions_BL)
        return super().choose(scores_BLR, at, call)._replace(ranking_BL=noise_BL)


class Threshold(KthBest):
    """Selection of the positions above the threshold, in training too."""

    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        choice = super().choose(scores_BLR, at, call)
        return choice._replace(requested_BL=above(choice.ranking_BL, self.threshold))


class Positional(Weighed):
    """Selection of evenly spread positions, whatever they contain."""

    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        choice = super().choose(scores_BLR, at, call)
        return choice._replace(requested_BL=evenly_spread(at.positions_BL, self.capacity))

    def decide(self, name, x_BLD, choice, at, state):
        # Not the default: another rule may make the choice of training.
        return evenly_spread(at.positions_BL, self.capacity), state


class Binary(Rule):
    """Selection of the positions for which a softmax prefers the layer to skipping.

    The probability of the layer is the weight of the update.
    """

    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        log_odds_BL = scores_BLR[..., 1] - scores_BLR[..., 0]
        return Choice(log_odds_BL, log_odds_BL, log_odds_BL > 0, scores_BLR)

    def weigh(self, scores_BK: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(scores_BK)

    def report(self, x_BLD, choice, selection, at):
        found = path_losses(choice.scores_BL, choice.scores_BLR, at.valid_BL, self.capacity)
        weights = {"balance": self.spec.balance, "z": self.spec.z}
        return RuleRecord({name: weights[name] * loss_B for name, loss_B in found.items()})


class Predictor(Rule):
    """Causal predictor of the selection of training (arXiv 2404.02258, section 3.5).

    The logit is a silu MLP of the normalised activations, plus a linear function of the router's
    score: the predictor mostly learns where the k-th score lies. Its inputs get no gradient.
    """

    def __init__(
        self, spec: specs.Predictor, shape: specs.Shape, *, capacity: float, rngs: nnx.Rngs
    ):
        super().__init__(spec, shape, capacity=capacity, rngs=rngs)
        d, hidden = shape.d_model, predictor_width(shape.d_model)

        def weight(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
            return normal_param(rngs, shape, axes, std=1 / math.sqrt(shape[0]), role="predictor")

        self.w_in = weight((d, hidden), ("replicated", None))
        self.w_out = weight((hidden,), ("replicated",))
        # Slope and offset of the line in the router's score.
        self.line = make_param(jnp.array([1.0, 0.0]), ("replicated",), role="predictor")

    def start(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """Returns zero counts of each row's positions that were read, and requested, each (B,)."""
        return jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32)

    def decide(self, name, x_BLD, choice, at, state):
        log_odds_BL = self.logits(x_BLD, choice.scores_BL)
        valid_BL = jnp.ones(log_odds_BL.shape, bool) if at.valid_BL is None else at.valid_BL
        requested_BL = log_odds_BL > 0
        if name == "paced":
            requested_BL = paced(log_odds_BL, self.capacity, valid_BL, *state)
        more = (
            jnp.sum(mask, axis=1, dtype=jnp.int32) for mask in (valid_BL, requested_BL & valid_BL)
        )
        return requested_BL, tuple(map(jnp.add, state, more))

    def report(self, x_BLD, choice, selection, at):
        log_odds_BL = self.logits(x_BLD, choice.scores_BL)
        return selection_loss("predictor", self.spec.weight, log_odds_BL, selection, at)

    @jax.named_scope("router")
    def logits(self, x_BLD: jax.Array, scores_BL: jax.Array) -> jax.Array:
        """Returns float32 logits (B, L), above 0 for positions that should be processed."""
        x_BLD, scores_BL = jax.lax.stop_gradient((x_BLD, scores_BL))
        x32_BLD = x_BLD.astype(jnp.float32)
        scale_BL1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True) + 1e-6)
        normed_BLD = (x32_BLD * scale_BL1).astype(x_BLD.dtype)
        h_BLF = jax.nn.silu(project(normed_BLD, read(self.w_in, normed_BLD.dtype)))
        logits_BL = jnp.einsum("BLF,F->BL", h_BLF.astype(jnp.float32), read(self.w_out))
        slope, offset = read(self.line)
        return logits_BL + slope * scores_BL + offset


def evenly_spread(positions_BL: jax.Array, capacity: float) -> jax.Array:
    """Returns a mask of the positions p with floor((p + 1) capacity) > floor(p capacity), (B, L).

    At a capacity of 1 / n these are the last of every n positions.
    """
    positions_BL = positions_BL.astype(jnp.float32)
    # The small number keeps n * (1 / n) from falling short of 1 in float32.
    before_BL, after_BL = (jnp.floor((positions_BL + n) * capacity + 1e-3) for n in (0, 1))
    return after_BL > before_BL
