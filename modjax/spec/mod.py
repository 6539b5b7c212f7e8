"""Mixture-of-Depths: a layer that processes only a share of the positions (arXiv 2404.02258)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from modjax.errors import require, require_one_of
from modjax.spec.layer import Cost, Layer, Load, Shape, check_types, named
from modjax.spec.layers import DENSE
from modjax.spec.routers import Linear, Router, Rule, TopK

RESIDUALS = ("delta", "literal")
LINEAR, TOP_K = Linear(), TopK()


def selected_tokens(capacity: float, seq_len: int) -> int:
    """Returns k, how many of a sequence's positions a routed layer processes.

    k = max(1, round(capacity * S)). seq_len: S, without padding.
    """
    return max(1, round(capacity * seq_len))


def cache_slots(capacity: float, length: int, slack: float | None) -> int:
    """Returns how many positions a routed layer's cache holds of at most `length`.

    slack: None has a slot for every position; else slack * capacity of them have one.
    """
    if slack is None:
        return length
    return min(length, max(1, math.ceil(slack * capacity * length)))


@dataclass(frozen=True, kw_only=True)
class MoDConfig:
    """How a routed layer selects positions and adds its update (arXiv 2404.02258, Eq. 1).

    capacity: share of each sequence's positions that are processed, in (0, 1]; padding not counted.
    router: scores the positions. rule: selects by the scores in training.
    causal: selects without the future; None leaves that to `rule`.
    residual: what is scaled, with f the inner layer and r its weight: `delta` x + r (f(x) - x),
      or `literal` x + r f(x).
    """

    capacity: float = 0.125
    router: Router = LINEAR
    rule: Rule = TOP_K
    causal: Rule | None = None
    residual: str = "delta"

    def __post_init__(self):
        check_types(self, "MoD")
        require(0 < self.capacity <= 1, "MoD.capacity", self.capacity, "must be in (0, 1]")
        require_one_of("MoD.residual", self.residual, RESIDUALS)
        able = self.causal is None or len(self.causal.names()) > 0
        require(able, "MoD.causal", self.causal, "must be a rule that never looks ahead")

    def names(self) -> tuple[str, ...]:
        """Returns the names of its ways to select without the future; the first is its own."""
        own = self.causal.names() if self.causal else ()
        return own if self.router.looks_ahead("causal") else own + self.rule.names()


@named
@dataclass(frozen=True)
class MoD(MoDConfig, Layer):
    """Routes a share of the positions through `inner`; the others pass it by."""

    inner: Layer = DENSE

    def inside(self) -> tuple[Layer, ...]:
        return (self.inner,)

    def check(self, shape: Shape) -> None:
        super().check(shape)
        self.router.check(shape._replace(streams=1))

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        k = selected_tokens(self.rule.room(self.capacity), load.tokens)
        for cost in self.inner.cost(shape, Load(k, k)):
            yield cost._replace(active=cost.active * self.capacity)
        yield from self.router.cost(shape, load, self.rule.outputs)
        yield from self.rule.cost(shape, load)
        if self.causal is not None:
            yield from self.causal.cost(shape, load)

    def looks_ahead(self, routing: str) -> bool:
        if routing == "trained":
            own = not self.rule.causal or self.router.looks_ahead(routing)
        else:
            own = not self.names()
        return own or super().looks_ahead(routing)

    def rules(self) -> frozenset[str]:
        return super().rules() | set(self.names())

    def own_rules(self) -> frozenset[str]:
        return super().own_rules() | set(self.names()[:1])

    def routed(self) -> int:
        return 1 + super().routed()

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        slots = cache_slots(self.capacity, length, slack)
        found = self.inner.cache_numbers(shape, slots, slack)
        return found + self.router.cache_numbers(shape._replace(streams=1), length, slack)

    def ropes(self) -> frozenset[float]:
        return super().ropes() | self.router.ropes()

    def hands_on(self) -> frozenset[str]:
        return frozenset()  # some positions only would have it

    def needs(self) -> frozenset[str]:
        return super().needs() | self.router.needs()
