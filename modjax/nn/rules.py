"""Rules: scores of positions in, a selection out, in training and without the future.

Legend: B batch, L positions, K selected positions, R scores of a position, D model width,
F hidden width of a predictor.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from modjax import spec
from modjax.kernels import project
from modjax.nn.call import At, Call
from modjax.nn.params import make_param, measured, normal_param, read
from modjax.nn.records import Record
from modjax.nn.routed import Balanced, Ranked, Taught, cross_entropy, masked_mean
from modjax.nn.routing import Selection, evenly_spread, kth_best, paced, position_noise
from modjax.spec.routers import predictor_width

WEIGHTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda r: r,
    "sigmoid": jax.nn.sigmoid,
    "two_sigmoid": lambda r: 2 * jax.nn.sigmoid(r),
    "one_plus_tanh": lambda r: 1 + jnp.tanh(r),
    "one": jnp.ones_like,
}


class Choice(NamedTuple):
    """A rule's use of the scores in training.

    ranking_BL: orders the positions. scores_BL: the raw scores that weigh the updates.
    wanted_BL: the positions that ask to be processed, of which the first are; None: the k that rank
      best are processed.
    scores_BLR: the scores as the router made them.
    """

    ranking_BL: jax.Array
    scores_BL: jax.Array
    wanted_BL: jax.Array | None
    scores_BLR: jax.Array


class Chosen(NamedTuple):
    """The selection of training.

    target_BL: the same as a mask. k: positions that the capacity stands for; k_B: of each row
    without its padding.
    """

    selection: Selection
    target_BL: jax.Array
    k: int
    k_B: jax.Array


class Rule(nnx.Module):
    """Base class of rules; a rule implements what it is used for.

    `MoD.rule` needs `choose` and `weigh`; whatever `names` of its spec says needs `decide`.
    """

    def __init__(self, spec: spec.Rule, shape: spec.Shape, *, capacity: float, rngs: nnx.Rngs):
        self.spec: Any = spec
        self.capacity = capacity

    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        """Returns how training selects by the router's scores."""
        raise NotImplementedError

    def weigh(self, scores_BK: jax.Array) -> jax.Array:
        """Returns the weights of the updates at selected positions, from their raw scores."""
        raise NotImplementedError

    def decide(
        self, name: str, x_BLD: jax.Array, choice: Choice, at: At, state: Any
    ) -> tuple[jax.Array, Any]:
        """Returns the positions that ask to be processed, (B, L), and the state after them.

        name: one of the spec's names. No position may depend on a later one; `choice` may be read
        position by position.
        """
        raise NotImplementedError

    def start(self, batch: int) -> Any:
        """Returns the state of `decide` before the first position of each row."""
        return ()

    def report(self, x_BLD: jax.Array, choice: Choice, chosen: Chosen, at: At) -> Record | None:
        """Returns the rule's record: its losses, what it measures, its statistics."""
        return None


class Weighed(Rule):
    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        scores_BL = scores_BLR[..., 0]
        return Choice(scores_BL, scores_BL, None, scores_BLR)

    def weigh(self, scores_BK: jax.Array) -> jax.Array:
        return WEIGHTS[self.spec.weight](scores_BK)


class KthBest(Weighed):
    """Base class of rules with a threshold: the running mean of the k-th best rank."""

    def __init__(self, spec: spec.Rule, shape: spec.Shape, *, capacity: float, rngs: nnx.Rngs):
        super().__init__(spec, shape, capacity=capacity, rngs=rngs)
        self.threshold = measured((1,))

    def passed(self, choice: Choice) -> jax.Array:
        """Returns which positions rank above the threshold."""
        return choice.ranking_BL > jax.lax.stop_gradient(read(self.threshold))[0]

    def decide(self, name, x_BLD, choice, at, state):
        return self.passed(choice), state

    def report(self, x_BLD, choice, chosen, at):
        kth_B = chosen.selection.kth_B
        if kth_B is None:  # training has a rule of its own
            rank_BL = jax.lax.stop_gradient(choice.ranking_BL)
            if at.valid_BL is not None:
                rank_BL = jnp.where(at.valid_BL, rank_BL, -jnp.inf)
            kth_B = kth_best(rank_BL, chosen.k, chosen.k_B)
        return Ranked(kth_B, self.taught(choice, chosen, at))

    def taught(self, choice: Choice, chosen: Chosen, at: At) -> Taught | None:
        """Returns the record of scores that learn to select by themselves, None without any."""
        return None


class TopK(KthBest):
    """The k best positions; with an auxiliary loss also those whose score is above 0."""

    def decide(self, name, x_BLD, choice, at, state):
        if name == "auxiliary":
            return choice.scores_BL > 0, state
        return super().decide(name, x_BLD, choice, at, state)

    def taught(self, choice: Choice, chosen: Chosen, at: At) -> Taught | None:
        if not self.spec.auxiliary:
            return None
        loss_B = cross_entropy(choice.scores_BL, chosen.target_BL, at.valid_BL)
        loss_B = self.spec.auxiliary * loss_B
        return Taught(choice.scores_BL, chosen.target_BL, loss_B, "auxiliary")


class Random(KthBest):
    """Positions that rank best by noise of the key, the sequence and the position."""

    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        if call.key is None:
            raise ValueError("Random() needs a PRNG key: model(tokens, key=...)")
        noise_BL = position_noise(call.key, at.sequences_BL, at.positions_BL)
        return super().choose(scores_BLR, at, call)._replace(ranking_BL=noise_BL)


class Threshold(KthBest):
    """Positions above the threshold, in training too."""

    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        choice = super().choose(scores_BLR, at, call)
        return choice._replace(wanted_BL=self.passed(choice))


class Positional(Weighed):
    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        wanted_BL = evenly_spread(at.positions_BL, self.capacity)
        return super().choose(scores_BLR, at, call)._replace(wanted_BL=wanted_BL)

    def decide(self, name, x_BLD, choice, at, state):
        return choice.wanted_BL, state


class Binary(Rule):
    """Each position takes the likelier of two paths; the probability weighs its update.

    Balance loss: sum_i f_i P_i / t_i, with f_i the share of positions that choose path i, P_i its
    mean probability and t = (1 - capacity, capacity): Eq. 4 of arXiv 2101.03961 for unequal
    targets; it is 1 where f = P = t. z-loss: mean of logsumexp^2 (arXiv 2202.08906, Eq. 5).
    """

    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        odds_BL = scores_BLR[..., 1] - scores_BLR[..., 0]
        return Choice(odds_BL, odds_BL, odds_BL > 0, scores_BLR)

    def weigh(self, scores_BK: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(scores_BK)

    def decide(self, name, x_BLD, choice, at, state):
        return choice.wanted_BL, state

    def report(self, x_BLD, choice, chosen, at):
        share_B = masked_mean((choice.scores_BL > 0).astype(jnp.float32), at.valid_BL)
        probability_B = masked_mean(jax.nn.sigmoid(choice.scores_BL), at.valid_BL)
        balance_B, c = jnp.ones_like(share_B), self.capacity  # at 1 there is nothing to balance
        if c < 1:
            skipped_B = (1 - share_B) * (1 - probability_B) / (1 - c)
            balance_B = skipped_B + share_B * probability_B / c
        z_B = masked_mean(jnp.square(jax.nn.logsumexp(choice.scores_BLR, axis=-1)), at.valid_BL)
        return Balanced({"balance": self.spec.balance * balance_B, "z": self.spec.z * z_B})


class Pace(NamedTuple):
    """How many positions of each row a paced rule has seen, and how many it has asked for."""

    seen_B: jax.Array
    spent_B: jax.Array


class Predictor(Rule):
    """Predicts the selection of training without the future (arXiv 2404.02258, section 3.5).

    The logit is a silu MLP of the normalised activations, plus a line in the router's own score:
    what it learns is mostly where the k-th score lies. Nothing before it gets a gradient.
    """

    def __init__(self, spec: spec.Predictor, shape: spec.Shape, *, capacity: float, rngs: nnx.Rngs):
        super().__init__(spec, shape, capacity=capacity, rngs=rngs)
        d, hidden = shape.d_model, predictor_width(shape.d_model)
        axes = ("replicated", None)
        self.w_in = normal_param(rngs, (d, hidden), axes, std=1 / math.sqrt(d), role="predictor")
        self.w_out = normal_param(
            rngs, (hidden,), ("replicated",), std=1 / math.sqrt(hidden), role="predictor"
        )
        # Slope and offset of the line in the router's score.
        self.line = make_param(jnp.array([1.0, 0.0]), ("replicated",), role="predictor")

    def decide(self, name, x_BLD, choice, at, state):
        odds_BL = self.odds(x_BLD, choice.scores_BL)
        valid_BL = jnp.ones(odds_BL.shape, bool) if at.valid_BL is None else at.valid_BL
        wanted_BL = odds_BL > 0
        if name == "paced":
            wanted_BL = paced(odds_BL, self.capacity, valid_BL, state.seen_B, state.spent_B)
        more = (jnp.sum(mask, axis=1, dtype=jnp.int32) for mask in (valid_BL, wanted_BL & valid_BL))
        return wanted_BL, Pace(*map(jnp.add, state, more))

    def start(self, batch: int) -> Pace:
        none_B = jnp.zeros(batch, jnp.int32)
        return Pace(none_B, none_B)

    def report(self, x_BLD, choice, chosen, at):
        odds_BL = self.odds(x_BLD, choice.scores_BL)
        loss_B = self.spec.weight * cross_entropy(odds_BL, chosen.target_BL, at.valid_BL)
        return Taught(odds_BL, chosen.target_BL, loss_B, "predictor")

    def odds(self, x_BLD: jax.Array, scores_BL: jax.Array) -> jax.Array:
        """Returns logits (B, L), float32; positive where the position should be processed."""
        x_BLD, scores_BL = jax.lax.stop_gradient((x_BLD, scores_BL))
        x32_BLD = x_BLD.astype(jnp.float32)
        scale_BL1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True) + 1e-6)
        h_BLF = jax.nn.silu(
            project((x32_BLD * scale_BL1).astype(x_BLD.dtype), read(self.w_in, None))
        )
        logits_BL = jnp.einsum("BLF,F->BL", h_BLF.astype(jnp.float32), read(self.w_out))
        slope, offset = read(self.line)
        return logits_BL + slope * scores_BL + offset
