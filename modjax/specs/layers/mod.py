"""Mixture-of-Depths: a layer that processes a share of the positions (arXiv 2404.02258)."""

import math
from dataclasses import dataclass
from typing import Annotated

from modjax.errors import require
from modjax.specs.fields import Share, check, one_of
from modjax.specs.layer import Costs, Layer, Load, Router, Shape, spec
from modjax.specs.layers.dense import DENSE
from modjax.specs.layers.routers import Linear, Rule, TopK

LINEAR, TOP_K = Linear(), TopK()


def selected_tokens(capacity: float, seq_len: int) -> int:
    """Returns k, the number of positions within capacity; seq_len excludes padding."""
    return max(1, round(capacity * seq_len))


def cache_slots(capacity: float, length: int, slack: float | None) -> int:
    """Returns a routed layer's cache slots for `length` positions: all of them if slack is None."""
    return length if slack is None else min(length, max(1, math.ceil(slack * capacity * length)))


@dataclass(frozen=True, kw_only=True)
class MoDConfig:
    """Selection of a routed layer, and the form of its update (arXiv 2404.02258, Eq. 1).

    capacity: share of the positions of each sequence, without padding, that are processed, in
      (0, 1].
    router: layer that scores the positions.
    rule: selects positions by their scores in training.
    causal: rule for causal routings, which never looks ahead and reads one score per position.
      None leaves these to the causal rules of `rule`.
    residual: "delta" for x + r (f(x) - x), "literal" for x + r f(x), where f is the inner layer and
      r the weight of the position.
    """

    capacity: Share = 0.125
    router: Router = LINEAR
    rule: Rule = TOP_K
    causal: Rule | None = None
    residual: Annotated[str, one_of("delta", "literal")] = "delta"

    def __post_init__(self):
        check(self, "MoD", typed=True)
        accepted = "must be a rule that selects in training, such as TopK()"
        require(self.rule.trains, "MoD.rule", self.rule, accepted)
        causal = self.causal
        able = causal is None or (len(causal.causal_rules()) > 0 and causal.outputs == 1)
        accepted = "must be a rule that never looks ahead, by one score of each position"
        require(able, "MoD.causal", causal, accepted)

    def causal_rules(self) -> tuple[str, ...]:
        """Returns the names of its causal rules, those of `causal` first; see Rule.causal_rules."""
        own = self.causal.causal_rules() if self.causal else ()
        return own if self.router.looks_ahead("causal") else own + self.rule.causal_rules()


@spec
class MoD(MoDConfig, Layer):
    """Mixture-of-Depths: `inner` processes a share of the positions; the others skip it.

    inner: layer that sees the selected positions only.
    The other fields are those of MoDConfig.
    """

    inner: Layer = DENSE

    def cost(self, shape: Shape, load: Load) -> Costs:
        k = selected_tokens(self.rule.slot_share(self.capacity), load.tokens)
        for cost in self.inner.cost(shape, load._replace(tokens=k, keys=k)):
            yield cost._replace(active=cost.active * self.capacity)
        yield from self.router.cost(shape, load, self.rule.outputs)
        yield from self.rule.cost(shape, load)
        if self.causal is not None:
            yield from self.causal.cost(shape, load)

    def looks_ahead(self, routing: str) -> bool:
        if routing == "trained":
            own = not self.rule.causal or self.router.looks_ahead(routing)
        else:
            own = not self.causal_rules()
        return own or self.inner.looks_ahead(routing)

    def routed(self) -> int:
        return 1 + super().routed()

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        slots = cache_slots(self.capacity, length, slack)
        found = self.inner.cache_numbers(shape, slots, slack)
        return found + self.router.cache_numbers(shape._replace(streams=1), length, slack)

    def passes_on(self) -> frozenset[str]:
        return frozenset()  # only the selected positions have such values
