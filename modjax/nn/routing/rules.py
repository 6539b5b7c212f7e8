"""Routers score positions, in float32; rules turn scores into a selection.

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
from modjax.nn.build import LayerModule
from modjax.nn.call import At, Call, Out
from modjax.nn.params import make_param, measured, normal_param, read
from modjax.nn.records import Record
from modjax.nn.routing.routed import Learnt
from modjax.nn.routing.selection import (
    Selection,
    evenly_spread,
    paced,
    position_noise,
    selected_mask,
)
from modjax.specs.layers.routers import predictor_width

WEIGHTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda r: r,
    "sigmoid": jax.nn.sigmoid,
    "two_sigmoid": lambda r: 2 * jax.nn.sigmoid(r),
    "one_plus_tanh": lambda r: 1 + jnp.tanh(r),
    "one": jnp.ones_like,
}


class Linear(LayerModule):
    """Scores r = x w (arXiv 2404.02258, Eq. 1)."""

    def __init__(self, spec: specs.Router, shape: specs.Shape, *, outputs: int, rngs: nnx.Rngs):
        size, std = (shape.d_model, outputs), 1 / math.sqrt(shape.d_model)
        # A lone score is a direction, whose length no decay should pull at.
        about = {"role": "router", "decays": outputs > 1}
        self.w = normal_param(rngs, size, ("replicated", None), std=std, **about)

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: None = None) -> Out:
        return Out(linear(x_BLD, read(self.w)))


class Sinusoids(Linear):
    """Scores r = phi(p) w, with phi the encoding of arXiv 1706.03762, section 3.5."""

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: None = None) -> Out:
        width = x_BLD.shape[-1]
        frequency_D = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angle_BLD = at.positions_BL[..., None].astype(jnp.float32) * frequency_D[None, None]
        phi_BLD = jnp.concatenate([jnp.sin(angle_BLD), jnp.cos(angle_BLD)], axis=-1)[..., :width]
        return super().__call__(phi_BLD, at, call)


class Received(LayerModule):
    """Scores that an earlier attention layer passed on (A-MoD, arXiv 2412.20875).

    With a cache no layer passes them on, and none is needed: they are 1.
    """

    def __init__(self, spec: specs.Received, shape: specs.Shape, *, outputs: int, rngs: nnx.Rngs):
        self.outputs = outputs

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: None = None) -> Out:
        ones_BL = jnp.ones(x_BLD.shape[:2], jnp.float32)
        received_BL = at.handed.get("received", ones_BL)
        return Out(jnp.repeat(received_BL[..., None], self.outputs, axis=2))


class Choice(NamedTuple):
    """A rule's use of the scores in training.

    ranking_BL: orders the positions. scores_BL: the raw scores that weigh the updates.
    wanted_BL: the positions that are requested, of which the first are processed; None: the k that
      rank best are processed.
    scores_BLR: the scores as the router made them.
    """

    ranking_BL: jax.Array
    scores_BL: jax.Array
    wanted_BL: jax.Array | None
    scores_BLR: jax.Array


class Rule(nnx.Module):
    """Base class of rules; a rule implements what it is used for.

    `MoD.rule` needs `choose` and `weigh`; each of its `ways` needs `decide`, or its default.
    """

    def __init__(self, spec: specs.Rule, shape: specs.Shape, *, capacity: float, rngs: nnx.Rngs):
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
        """Returns the positions that are requested, (B, L), and the state after them.

        By default those that training requests. No position may depend on a later one; `choice`
        may be read position by position. name: one of the spec's names.
        """
        if choice.wanted_BL is None:
            raise NotImplementedError
        return choice.wanted_BL, state

    def start(self, batch: int) -> Any:
        """Returns the state of `decide` before the first position of each row."""
        return ()

    def report(
        self, x_BLD: jax.Array, choice: Choice, selection: Selection, at: At
    ) -> Record | None:
        """Returns the rule's record: its losses, what it measures, its statistics.

        selection: that of training.
        """
        return None


class Weighed(Rule):
    def choose(self, scores_BLR: jax.Array, at: At, call: Call) -> Choice:
        scores_BL = scores_BLR[..., 0]
        return Choice(scores_BL, scores_BL, None, scores_BLR)

    def weigh(self, scores_BK: jax.Array) -> jax.Array:
        return WEIGHTS[self.spec.weight](scores_BK)


class KthBest(Weighed):
    """Base class of rules with a threshold: the running mean of the k-th best rank."""

    def __init__(self, spec: specs.Rule, shape: specs.Shape, *, capacity: float, rngs: nnx.Rngs):
        super().__init__(spec, shape, capacity=capacity, rngs=rngs)
        self.threshold = measured((1,))

    def passed(self, choice: Choice) -> jax.Array:
        """Returns which positions rank above the threshold."""
        return choice.ranking_BL > jax.lax.stop_gradient(read(self.threshold))[0]

    def decide(self, name, x_BLD, choice, at, state):
        return self.passed(choice), state

    def report(self, x_BLD, choice, selection, at):
        return Learnt({}, kth_B=selection.kth_B)


class TopK(KthBest):
    """The k best positions; with an auxiliary loss also those whose score is above 0."""

    def decide(self, name, x_BLD, choice, at, state):
        if name == "auxiliary":
            return choice.scores_BL > 0, state
        return super().decide(name, x_BLD, choice, at, state)

    def report(self, x_BLD, choice, selection, at):
        taught, weight = Learnt({}), self.spec.auxiliary
        if weight:
            taught = learn("auxiliary", weight, choice.scores_BL, selection, at)
        return replace(taught, kth_B=selection.kth_B)


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
        choice = super().choose(scores_BLR, at, call)
        return choice._replace(wanted_BL=evenly_spread(at.positions_BL, self.capacity))

    def decide(self, name, x_BLD, choice, at, state):  # beside any rule of training
        return evenly_spread(at.positions_BL, self.capacity), state


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

    def report(self, x_BLD, choice, selection, at):
        share_B = masked_mean((choice.scores_BL > 0).astype(jnp.float32), at.valid_BL)
        probability_B = masked_mean(jax.nn.sigmoid(choice.scores_BL), at.valid_BL)
        balance_B, c = jnp.ones_like(share_B), self.capacity  # at 1 there is nothing to balance
        if c < 1:
            skipped_B = (1 - share_B) * (1 - probability_B) / (1 - c)
            balance_B = skipped_B + share_B * probability_B / c
        z_B = masked_mean(jnp.square(jax.nn.logsumexp(choice.scores_BLR, axis=-1)), at.valid_BL)
        return Learnt({"balance": self.spec.balance * balance_B, "z": self.spec.z * z_B})


class Predictor(Rule):
    """Predicts the selection of training without the future (arXiv 2404.02258, section 3.5).

    The logit is a silu MLP of the normalised activations, plus a line in the router's own score:
    what it learns is mostly where the k-th score lies. Nothing before it gets a gradient.
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

    def decide(self, name, x_BLD, choice, at, state):
        """Decides; the state is the numbers of positions read and requested, each (B,)."""
        odds_BL = self.odds(x_BLD, choice.scores_BL)
        valid_BL = jnp.ones(odds_BL.shape, bool) if at.valid_BL is None else at.valid_BL
        wanted_BL = odds_BL > 0
        if name == "paced":
            wanted_BL = paced(odds_BL, self.capacity, valid_BL, *state)
        more = (jnp.sum(mask, axis=1, dtype=jnp.int32) for mask in (valid_BL, wanted_BL & valid_BL))
        return wanted_BL, tuple(map(jnp.add, state, more))

    def start(self, batch: int) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32)

    def report(self, x_BLD, choice, selection, at):
        odds_BL = self.odds(x_BLD, choice.scores_BL)
        return learn("predictor", self.spec.weight, odds_BL, selection, at)

    def odds(self, x_BLD: jax.Array, scores_BL: jax.Array) -> jax.Array:
        """Returns logits (B, L), float32; positive where the position should be processed."""
        x_BLD, scores_BL = jax.lax.stop_gradient((x_BLD, scores_BL))
        x32_BLD = x_BLD.astype(jnp.float32)
        scale_BL1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True) + 1e-6)
        normed_BLD = (x32_BLD * scale_BL1).astype(x_BLD.dtype)
        h_BLF = jax.nn.silu(project(normed_BLD, read(self.w_in, None)))
        logits_BL = jnp.einsum("BLF,F->BL", h_BLF.astype(jnp.float32), read(self.w_out))
        slope, offset = read(self.line)
        return logits_BL + slope * scores_BL + offset


def learn(name: str, weight: float, logits_BL: jax.Array, selection: Selection, at: At) -> Learnt:
    """Returns the record of logits that learn by cross-entropy to be above 0 where selected."""
    target_BL = selected_mask(selection, logits_BL.shape[1])
    sign_BL = jnp.where(target_BL, 1.0, -1.0)
    loss_B = weight * masked_mean(jax.nn.softplus(-sign_BL * logits_BL), at.valid_BL)
    return Learnt({name: loss_B}, logits_BL, target_BL)


def masked_mean(x_BL: jax.Array, valid_BL: jax.Array | None) -> jax.Array:
    """Returns the mean over each row's valid positions, (B,); 0 where there is none."""
    if valid_BL is None:
        return jnp.mean(x_BL, axis=1)
    total_B = jnp.sum(jnp.where(valid_BL, x_BL, 0.0), axis=1)
    return total_B / jnp.maximum(jnp.sum(valid_BL, axis=1), 1).astype(jnp.float32)


def linear(x_BLD: jax.Array, w_DR: jax.Array) -> jax.Array:
    """Returns x w in float32, (B, L, R)."""
    # Full float32: accelerators would multiply in bfloat16, and ties would be common.
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("BLD,DR->BLR", x_BLD.astype(jnp.float32), w_DR, precision=precision)
