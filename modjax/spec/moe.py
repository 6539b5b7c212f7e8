"""Mixture of experts in an MLP's place; with no-op experts it is integrated MoDE."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from modjax.errors import require, require_one_of
from modjax.spec.experts import ExpertRule, TokenChoice
from modjax.spec.layer import Cost, Layer, Load, Shape, named
from modjax.spec.layers import ACTIVATIONS, NORMS, matrices, norm_params
from modjax.spec.routers import Linear, Router

LINEAR, TOKEN_CHOICE = Linear(), TokenChoice()


@named
@dataclass(frozen=True)
class MoE(Layer):
    """Each position runs through some of `experts` MLPs, added to the stream.

    router: makes the scores. rule: gives each position its experts by them.
    width: of an expert; None, the model's d_ff. activation, norm: as MLP has them.
    capacity_factor: of each sequence of L positions, without padding, an expert takes its first
      C = ceil(capacity_factor top_k L real / experts) at most, where `real` is the share of picks
      that are of experts; the other picks are dropped. Reading without looking ahead drops none.
      None: nor does training.
    shared: so many more experts that every position runs through, unweighted.
    """

    experts: int
    rule: ExpertRule = TOKEN_CHOICE
    router: Router = LINEAR
    width: int | None = None
    activation: str = "gelu"
    norm: str = "before"
    capacity_factor: float | None = 1.25
    shared: int = 0

    def __post_init__(self):
        super().__post_init__()

        def need(condition: bool, name: str, accepted: str) -> None:
            require(condition, f"MoE.{name}", getattr(self, name), accepted)

        require_one_of("MoE.activation", self.activation, ACTIVATIONS)
        require_one_of("MoE.norm", self.norm, NORMS)
        need(self.experts > 0, "experts", "must be greater than 0")
        k = self.rule.top_k
        need(k <= self.experts, "experts", f"must be at least top_k = {k}")
        need(self.width is None or self.width > 0, "width", "must be greater than 0, or None")
        need(self.shared >= 0, "shared", "must be 0 or more")
        factor = self.capacity_factor
        fits = factor is None or factor > 0
        need(fits, "capacity_factor", "must be greater than 0, or None: it leaves no slot")
        fits = factor is not None or not self.rule.bounded
        need(fits, "capacity_factor", f"must be a number where rule = {self.rule}")

    def check(self, shape: Shape) -> None:
        super().check(shape)
        self.router.check(shape)

    @property
    def real(self) -> float:
        """The share of picks that are of experts, where the load is even."""
        return self.rule.real(self.experts)

    def slots(self, tokens: int) -> int:
        """Returns C, the positions of a sequence of `tokens` that an expert takes at most."""
        if self.capacity_factor is None:
            return tokens
        fair = self.rule.top_k * tokens * self.real / self.experts
        # A share such as 1.1 * 10 should not become 12 by its last bit.
        return min(tokens, max(1, math.ceil(self.capacity_factor * fair - 1e-9)))

    def computed(self, tokens: int) -> float:
        """Returns the positions that the experts compute of a sequence, empty slots among them."""
        if self.capacity_factor is None:
            return self.rule.top_k * tokens * self.real
        return self.experts * self.slots(tokens)

    def expert_width(self, shape: Shape) -> int:
        return self.width or shape.d_ff

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        d = shape.d_model
        one = matrices(self.activation) * d * self.expert_width(shape)
        yield Cost("norm", params=norm_params(self.norm, d))
        yield from self.router.cost(shape, load, self.rule.rows(self.experts))
        share = self.rule.top_k * self.real / self.experts
        computed = self.computed(load.tokens)
        yield Cost("experts", 2.0 * computed * one, one * self.experts, active=share)
        if self.shared:
            yield Cost("mlp", 2.0 * load.tokens * one * self.shared, one * self.shared)

    def looks_ahead(self, routing: str) -> bool:
        # As trained, a dropped pick depends on how long its sequence is.
        return routing == "trained" or not self.rule.names() or self.router.looks_ahead(routing)

    def rules(self) -> frozenset[str]:
        return frozenset(self.rule.names())

    def own_rules(self) -> frozenset[str]:
        return frozenset(self.rule.names()[:1])

    def routed(self) -> int:
        return 1 if self.real < 1 else 0

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        return self.router.cache_numbers(shape, length, slack)

    def ropes(self) -> frozenset[float]:
        return self.router.ropes()

    def needs(self) -> frozenset[str]:
        return self.router.needs()
