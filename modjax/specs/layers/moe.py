"""Mixture of experts in an MLP's place, and the rules that select experts by a router's scores.

With no-op experts it is integrated MoDE.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from modjax.errors import require
from modjax.specs.fields import NotNegative, Positive, Spec, one_of
from modjax.specs.layer import Cost, Costs, Layer, Load, Router, Shape, spec
from modjax.specs.layers.dense import Activation, Norm, matrices, norm_params
from modjax.specs.layers.routers import Linear


@dataclass(frozen=True)
class ExpertRule(Spec):
    """Base class of rules that give each position some of the experts.

    top_k: experts of a position, on average.
    scores: "softmax" over all rows of the router, or "sigmoid" of each. The weight of an expert is
      its score times `scale`.
    bounded: an expert always has a number of slots, so that MoE needs a capacity_factor.
    ways: as Rule has them.
    """

    bounded = False
    ways: ClassVar[tuple[str, ...]] = ()
    top_k: Positive[int] = 1
    scores: Annotated[str, one_of("softmax", "sigmoid")] = "softmax"
    scale: Positive[float] = 1.0

    def names(self) -> tuple[str, ...]:
        return self.ways

    def rows(self, experts: int) -> int:
        """Returns how many scores of each position the rule reads."""
        return experts

    def real(self, experts: int) -> float:
        """Returns the share of choices that are of experts, where the load is even."""
        return 1.0


@spec
class TokenChoice(ExpertRule):
    """Each position picks its top_k best rows (arXiv 2101.03961, 2202.08906).

    renormalise: divides a weight by the sum over the position's picks, no-ops among them.
    no_ops: rows beside the experts, which leave a position as it is (arXiv 2404.02258, section
      4.3). random_no_ops: the control, where as many picks become no-ops by chance.
    balance, z: weights of the two losses. bias_rate: a bias of each row, for picking only, moves by
      it against the row's load at every update (2408.15664).
    """

    ways = ("token_choice",)
    renormalise: bool = False
    no_ops: NotNegative[int] = 0
    random_no_ops: bool = False
    balance: NotNegative[float] = 0.01
    z: NotNegative[float] = 0.001
    bias_rate: NotNegative[float] = 0.0

    def __post_init__(self):
        super().__post_init__()
        learns = self.top_k > 1 or not self.renormalise
        accepted = "must be False at top_k = 1: the router would not learn"
        require(learns, "TokenChoice.renormalise", self.renormalise, accepted)
        fits = not self.random_no_ops or self.no_ops > 0
        require(fits, "TokenChoice.random_no_ops", self.random_no_ops, "needs no_ops")

    def rows(self, experts: int) -> int:
        return experts + (0 if self.random_no_ops else self.no_ops)

    def real(self, experts: int) -> float:
        return experts / (experts + self.no_ops)


@spec
class ExpertChoice(ExpertRule):
    """Each expert picks its best positions of a sequence (arXiv 2202.09368), which looks ahead."""

    bounded = True


@spec
class ExpertThreshold(ExpertRule):
    """Each expert takes the positions that score above a threshold (arXiv 2603.11535).

    The threshold is a running mean of the score that an expert's fair share of positions reaches.
    """

    ways = ("expert_threshold",)


@spec
class MoE(Layer):
    """Each position runs through some of `experts` MLPs, added to the stream.

    router: makes the scores. rule: gives each position its experts by them.
    width: of an expert; None, the model's d_ff. activation, norm: as MLP has them.
    capacity_factor: of each sequence of L positions, without padding, an expert takes its first
      C = ceil(capacity_factor top_k L real / experts) at most, where `real` is the share of picks
      that are of experts. Training drops the other picks; None drops none.
    shared: further experts that every position runs through, unweighted.
    """

    experts: Positive[int]
    rule: ExpertRule = TokenChoice()
    router: Router = Linear()
    width: Positive[int | None] = None
    activation: Activation = "gelu"
    norm: Norm = "before"
    capacity_factor: float | None = 1.25
    shared: NotNegative[int] = 0

    def __post_init__(self):
        super().__post_init__()
        k, factor = self.rule.top_k, self.capacity_factor
        require(k <= self.experts, "MoE.experts", self.experts, f"must be at least top_k = {k}")
        if factor is None:
            fits, accepted = not self.rule.bounded, f"must be a number where rule = {self.rule}"
        else:
            fits, accepted = factor > 0, "must be greater than 0, or None: it leaves no slot"
        require(fits, "MoE.capacity_factor", factor, accepted)

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

    def cost(self, shape: Shape, load: Load) -> Costs:
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

    def names(self) -> tuple[str, ...]:
        return self.rule.names()

    def routed(self) -> int:
        return 1 if self.real < 1 else 0
