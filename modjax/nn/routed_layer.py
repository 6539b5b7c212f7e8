"""The part that all routed layers share: a router, its rules, and a selection by them.

Legend: B batch, L positions, K selected positions, D model width.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from modjax import spec
from modjax.errors import require
from modjax.nn.build import build
from modjax.nn.call import At, Call, Out, under
from modjax.nn.records import Record
from modjax.nn.routed import Routed
from modjax.nn.routing import (
    Selection,
    of_valid,
    select_first_k,
    select_top_k,
    selected_mask,
    wide,
)
from modjax.nn.rules import Choice, Chosen
from modjax.nn.within import widened
from modjax.spec.mod import MoDConfig, selected_tokens

Process = Callable[[Selection], Any]  # runs selected positions


class Route(NamedTuple):
    """The state of routing after some positions of each row, or at their end.

    router: the router's cache, or what is to be written there. rules: the state of each rule.
    """

    router: Any
    rules: dict[str, Any]


class RoutedLayer(nnx.Module):
    """A router, the rule that selects in training, and perhaps another without the future."""

    def __init__(self, config: MoDConfig, shape: spec.Shape, *, rngs: nnx.Rngs):
        self.config = config
        shape, outputs = shape._replace(streams=1), config.rule.outputs
        self.router: Any = build(config.router, shape, rngs=rngs, outputs=outputs)

        def made(rule: spec.Rule) -> Any:
            return build(rule, shape, rngs=rngs, capacity=config.capacity)

        self.rule = made(config.rule)
        self.causal = None if config.causal is None else made(config.causal)

    def rules(self) -> dict[str, Any]:
        """Returns the rules by their attribute."""
        return {"rule": self.rule} | ({} if self.causal is None else {"causal": self.causal})

    def start(self, batch: int, router: Any) -> Route:
        """Returns the state before the first position. router: its empty cache."""
        return Route(router, {name: rule.start(batch) for name, rule in self.rules().items()})

    def route(
        self,
        x_BLD: jax.Array,
        at: At,
        call: Call,
        state: Route,
        room_B: jax.Array | None,
        bound: int,
        process: Process,
    ) -> tuple[Any, dict[str, Record], Route]:
        """Returns the result of `process` for the selection, the records, and the new state.

        Where `call.routing` never looks ahead, `process` is compiled for a few sizes, and its
        result has the shapes of the largest, see `widened`.
        room_B: how many positions can be taken now; None, `bound`, which holds for all rows.
        """
        batch, length = x_BLD.shape[:2]
        scored, choice = self.score(x_BLD, at, call, state)
        k_B = of_valid(self._k, at.valid_BL, batch, length)
        selection = self._as_trained(choice, at, k_B)
        target_BL = selected_mask(selection, length)
        chosen = Chosen(selection, target_BL, self._k(length), k_B)
        wanted_BL = selected_BL = target_BL
        if call.routing != "trained":
            wanted_BL, rules = self.decide(x_BLD, choice, at, call.routing, state.rules)
            state = state._replace(rules=rules)
            limit_B1 = bound if room_B is None else room_B[:, None]
            selected_BL = wanted_BL & (jnp.cumsum(wanted_BL, axis=1) <= limit_B1)
        elif choice.wanted_BL is not None:
            wanted_BL = valid_ones(choice.wanted_BL, at.valid_BL)
        tied_B = selection.tied_B
        own = Routed(choice.scores_BL, target_BL, wanted_BL, selected_BL, k_B, tied_B)
        records: dict[str, Record] = {"": own, **under("router", scored.records)}
        for name, rule in self.rules().items():
            record = rule.report(x_BLD, self.seen_by(name, choice), chosen, at)
            records |= {} if record is None else {name: record}
        state = state._replace(router=scored.write)
        if call.routing == "trained":
            return process(selection), records, state

        def run(size: int) -> Any:
            return process(select_first_k(selected_BL, choice.scores_BL, size))

        # Static shapes, none dropped: the first of a few compiled sizes that holds every row.
        buckets = _buckets(self._k(length), bound)
        if len(buckets) == 1:
            return run(bound), records, state
        like = jax.eval_shape(lambda: run(bound))
        branches = [lambda size=size: widened(run(size), like) for size in buckets]
        largest = jnp.max(jnp.sum(selected_BL, axis=1))
        index = jnp.searchsorted(jnp.array(buckets), largest)
        return jax.lax.switch(index, branches), records, state

    def score(self, x_BLD: jax.Array, at: At, call: Call, state: Route) -> tuple[Out, Choice]:
        """Returns the router's output, and what the rule makes of the scores for training."""
        scored = self.router(x_BLD, at, call, state.router or None)
        return scored, self.rule.choose(scored.x, at, call)

    def seen_by(self, name: str, choice: Choice) -> Choice:
        """Returns the choice as a rule may see it: ones for scores that look ahead."""
        if name == "rule" or not self.config.router.looks_ahead("causal"):
            return choice
        ones_BL = jnp.ones_like(choice.scores_BL)
        return Choice(ones_BL, ones_BL, None, jnp.ones_like(choice.scores_BLR))

    def decide(
        self, x_BLD: jax.Array, choice: Choice, at: At, routing: str, state: dict[str, Any]
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the positions that ask to be processed without the future, and the rules' state.

        routing: the name of one of the layer's ways; any other stands for the layer's own.
        """
        name, mine = self.decider(routing)
        wanted_BL, after = self.rules()[mine].decide(
            name, x_BLD, self.seen_by(mine, choice), at, state[mine]
        )
        return valid_ones(wanted_BL, at.valid_BL), {**state, mine: after}

    def decider(self, routing: str) -> tuple[str, str]:
        """Returns the name of the way to select under a routing, and the rule that has it."""
        names = self.config.names()
        need = "its router looks ahead: give it a rule that does not, such as causal=Predictor()"
        require(len(names) > 0, "routing", routing, need)
        name = routing if routing in names else names[0]
        causal = self.config.causal
        return name, "causal" if causal is not None and name in causal.names() else "rule"

    def update(self, scores_BK: jax.Array, x_BKD: jax.Array, y_BKD: jax.Array) -> jax.Array:
        """Returns what is added to the stream at selected positions, for each reading of Eq. 1."""
        weight = wide(self.rule.weigh(scores_BK).astype(x_BKD.dtype), x_BKD)
        y_BKD = y_BKD.astype(x_BKD.dtype)
        return weight * (y_BKD - x_BKD if self.config.residual == "delta" else y_BKD)

    def _k(self, positions: int) -> int:
        """Returns how many of a row's valid positions the capacity stands for."""
        return selected_tokens(self.config.capacity, positions)

    def _as_trained(self, choice: Choice, at: At, k_B: jax.Array) -> Selection:
        """Returns the selection of training."""
        batch, length = choice.scores_BL.shape
        if choice.wanted_BL is None:
            ranking_BL = jax.lax.stop_gradient(choice.ranking_BL)
            return select_top_k(ranking_BL, choice.scores_BL, self._k(length), at.valid_BL, k_B)

        def slots(positions: int) -> int:
            return selected_tokens(self.config.rule.room(self.config.capacity), positions)

        slots_B = of_valid(slots, at.valid_BL, batch, length)
        wanted_BL = valid_ones(choice.wanted_BL, at.valid_BL)
        return select_first_k(wanted_BL, choice.scores_BL, slots(length), slots_B)


def valid_ones(wanted_BL: jax.Array, valid_BL: jax.Array | None) -> jax.Array:
    """Returns the wanted positions that are not padding."""
    return wanted_BL if valid_BL is None else wanted_BL & valid_BL


def _buckets(k: int, bound: int) -> list[int]:
    """Returns sizes to compile: 3/2 k for the usual, 3 k, and `bound`. Each costs compile time."""
    return [size for size in (math.ceil(1.5 * k), 3 * k) if size < bound] + [bound]
