"""Base class of routed layers: a router, its rules, and the selection that they make.

Legend: B batch, L positions, K selected positions, R scores of a position, D model width.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modjax import specs
from modjax.errors import require
from modjax.nn.build import build
from modjax.nn.call import At, Call, under
from modjax.nn.records import Record
from modjax.nn.routing.routing_records import Routed
from modjax.nn.routing.rules import Choice
from modjax.nn.routing.selection import (
    Selection,
    of_valid,
    select_first_k,
    select_top_k,
    selected_mask,
    wide,
)
from modjax.nn.routing.within import widened
from modjax.specs.layers.mod import MoDConfig, selected_tokens

Process = Callable[[Selection], Any]  # runs a layer on the selected positions


class RoutedLayer(nnx.Module):
    """Router with a rule that selects in training, and perhaps another for causal routing."""

    def __init__(self, config: MoDConfig, shape: specs.Shape, *, rngs: nnx.Rngs):
        self.config = config
        shape, outputs = shape._replace(streams=1), config.rule.outputs
        self.router: Any = build(config.router, shape, rngs=rngs, outputs=outputs)

        def made(rule: specs.Rule) -> Any:
            return build(rule, shape, rngs=rngs, capacity=config.capacity)

        self.rule = made(config.rule)
        self.causal = None if config.causal is None else made(config.causal)

    def rules(self) -> dict[str, Any]:
        """Returns the rules by the names of their attributes."""
        return {"rule": self.rule} | ({} if self.causal is None else {"causal": self.causal})

    def start(self, batch: int, router: Any = ()) -> dict[str, Any]:
        """Returns the state before the first position. router: an empty cache of the router."""
        return {"router": router} | {n: rule.start(batch) for n, rule in self.rules().items()}

    def route(
        self, x_BLD: jax.Array, at: At, call: Call, state: dict[str, Any], limit: jax.Array | int
    ) -> tuple[Selection | None, dict[str, Record], dict[str, Any]]:
        """Selects positions by the scores of the router.

        state: as `start` returns it.
        limit: under causal routing, a row processes its first `limit` requested positions and drops
          the others; an int or (B, 1).

        Returns
          the selection of training, or None under causal routing;
          the records; "" is this layer's own `Routed`;
          the state after these positions, with the update of the router's cache.
        """
        scored = self.router(x_BLD, at, call, state["router"] or None)
        choice = self.rule.choose(scored.x, at, call)
        if choice.requested_BL is not None:
            choice = choice._replace(requested_BL=_valid(choice.requested_BL, at))
        k_B = of_valid(self._k, at.valid_BL, *x_BLD.shape[:2])
        selection = self._trained(choice, at, k_B)
        target_BL = requested_BL = selected_BL = selected_mask(selection, x_BLD.shape[1])
        if call.routing != "trained":
            name, attribute = self.decider(call.routing)
            rule, seen = self.rules()[attribute], self._seen_by(attribute, choice)
            requested_BL, after = rule.decide(name, x_BLD, seen, at, state[attribute])
            requested_BL, state = _valid(requested_BL, at), {**state, attribute: after}
            selected_BL = requested_BL & (jnp.cumsum(requested_BL, axis=1) <= limit)
        elif choice.requested_BL is not None:
            requested_BL = choice.requested_BL
        tied_B = selection.tied_B
        own = Routed(choice.scores_BL, target_BL, requested_BL, selected_BL, k_B, tied_B)
        records: dict[str, Record] = {"": own, **under("router", scored.records)}
        for attribute, rule in self.rules().items():
            record = rule.report(x_BLD, self._seen_by(attribute, choice), selection, at)
            if record is not None:
                records[attribute] = record
        trained = selection if call.routing == "trained" else None
        return trained, records, {**state, "router": scored.write}

    def run(self, process: Process, selection: Selection | None, own: Routed, bound: int) -> Any:
        """Returns process(selection). None selects the positions of own.selected_BL, in buckets."""
        if selection is not None:
            return process(selection)
        k = self._k(own.scores_BL.shape[1])
        # 1.5 k fits most rows.
        return in_buckets(process, own.selected_BL, own.scores_BL, (1.5 * k, 3 * k), bound)

    def decider(self, routing: str) -> tuple[str, str]:
        """Returns the name of the rule's method under a causal routing, and the rule's attribute.

        A routing that the layer does not know, such as "causal", means its default method.
        """
        names = self.config.causal_rules()
        need = "its router looks ahead: give it a rule that does not, such as causal=Predictor()"
        require(len(names) > 0, "routing", routing, need)
        name = routing if routing in names else names[0]
        causal = self.config.causal
        return name, "causal" if causal is not None and name in causal.causal_rules() else "rule"

    def update(self, scores_BK: jax.Array, x_BKD: jax.Array, y_BKD: jax.Array) -> jax.Array:
        """Returns the weighted updates of selected positions, (B, K, D), see `MoDConfig`."""
        weight = wide(self.rule.weigh(scores_BK).astype(x_BKD.dtype), x_BKD)
        y_BKD = y_BKD.astype(x_BKD.dtype)
        return weight * (y_BKD - x_BKD if self.config.residual == "delta" else y_BKD)

    def _seen_by(self, attribute: str, choice: Choice) -> Choice:
        """Returns the choice as a rule sees it: `causal` gets ones for scores that look ahead."""
        if attribute == "rule" or not self.config.router.looks_ahead("causal"):
            return choice
        ones_BL = jnp.ones_like(choice.scores_BL)
        return Choice(ones_BL, ones_BL, None, jnp.ones_like(choice.scores_BLR))

    def _k(self, positions: int) -> int:
        return selected_tokens(self.config.capacity, positions)

    def _trained(self, choice: Choice, at: At, k_B: jax.Array) -> Selection:
        """Returns the selection of training: the top k_B, or the requested ones that fit."""
        scores_BL, (batch, length) = choice.scores_BL, choice.scores_BL.shape
        best = select_top_k(choice.ranking_BL, scores_BL, self._k(length), at.valid_BL, k_B)
        if choice.requested_BL is None:
            return best
        slots = functools.partial(
            selected_tokens, self.config.rule.slot_share(self.config.capacity)
        )
        slots_B = of_valid(slots, at.valid_BL, batch, length)
        first = select_first_k(choice.requested_BL, scores_BL, slots(length), slots_B)
        return first._replace(kth_B=best.kth_B)


def in_buckets(
    process: Process,
    selected_BL: jax.Array,
    scores_BL: jax.Array,
    sizes: Sequence[float],
    bound: int,
) -> Any:
    """Returns process(selection) for the selected positions of each row.

    Their number varies, but shapes are static. So `process` is compiled for a few bucket sizes, and
    the smallest one that fits every row runs. The result has the shapes of the largest, `bound`.

    sizes: sizes to compile as well, in ascending order; those above `bound` are left out.
    """

    def run(size: int) -> Any:
        return process(select_first_k(selected_BL, scores_BL, size))

    buckets = _buckets(sizes, bound)
    if len(buckets) == 1:
        return run(bound)
    like = jax.eval_shape(lambda: run(bound))
    branches = [lambda size=size: widened(run(size), like) for size in buckets]
    largest = jnp.max(jnp.sum(selected_BL, axis=1))
    return jax.lax.switch(jnp.searchsorted(jnp.array(buckets), largest), branches)


def _valid(requested_BL: jax.Array, at: At) -> jax.Array:
    return requested_BL if at.valid_BL is None else requested_BL & at.valid_BL


def _buckets(sizes: Sequence[float], bound: int) -> list[int]:
    return [math.ceil(size) for size in sizes if math.ceil(size) < bound] + [bound]
