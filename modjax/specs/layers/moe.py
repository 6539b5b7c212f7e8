"""Mixture of experts in place of an MLP, and the rules that pick experts by a router's scores.

With no-op experts it is integrated MoDE (arXiv 2404.02258, section 4.3).
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from modjax.errors import require
from modjax.specs.fields import NotNegative, Positive, Spec, one_of
from modjax.specs.layer import Cost, Costs, Layer, Load, Router, Shape, spec
from modjax.specs.layers.attention import Norm, norm_params
from modjax.specs.layers.dense import Activation, matrices
from modjax.specs.layers.routers import Linear


@dataclass(frozen=True)
class ExpertRule(Spec):
    """Base class of rules that pick experts for each position.

    top_k: average number of experts of a position, greater than 0.
    scores: "softmax" over all outputs of the router, or "sigmoid" of each output.
    scale: factor of the scores, greater than 0; the product is the weight of an expert.

    bounded: whether the rule fills a fixed number of slots, so that MoE needs a capacity_factor.
    causal_names: names of its causal rules, see Rule.causal_rules.
    """

    bounded = False
    causal_names: ClassVar[tuple[str, ...]] = ()
    top_k: Positive[int] = 1
    scores: Annotated[str, one_of("softmax", "sigmoid")] = "softmax"
    scale: Positive[float] = 1.0

    def outputs(self, experts: int) -> int:
        """Returns the number of router outputs that the rule reads."""
        return experts

    def real(self, experts: int) -> float:
        """Returns the share of picks that go to experts, not no-ops, at an even load."""
        return 1.0


@spec
class TokenChoice(ExpertRule):
    """Each position picks its top_k best router outputs (arXiv 2101.03961, 2202.08906).

    renormalise: whether to divide a weight by the sum over the position's picks, no-ops included;
      needs top_k > 1.
    no_ops: further router outputs, whose picks leave a position unchanged (arXiv 2404.02258,
      section 4.3).
    random_no_ops: a control in which as many picks become no-ops at random; needs no_ops.
    balance: weight of the balance loss (arXiv 2101.03961, Eq. 4), 0 or more.
    z: weight of the z-loss (arXiv 2202.08906, Eq. 5), 0 or more.
    bias_rate: step by which every update moves each output's bias against its load. The bias
      affects the ranking, not the weights (arXiv 2408.15664). 0 or more.
    """

    causal_names = ("token_choice",)
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

    def outputs(self, experts: int) -> int:
        return experts + (0 if self.random_no_ops else self.no_ops)

    def real(self, experts: int) -> float:
        return experts / (experts + self.no_ops)


@spec
class ExpertChoice(ExpertRule):
    """Each expert picks its best positions of a sequence (arXiv 2202.09368).

    It looks ahead, and has no causal rule.
    """

    bounded = True


@spec
class ExpertThreshold(ExpertRule):
    """Each expert picks the positions that score above its threshold (arXiv 2603.11535).

    The threshold is the running mean of the score at which the expert gets its fair share.
    """

    causal_names = ("expert_threshold",)


@spec
class MoE(Layer):
    """Mixture of experts: each position runs through some of several MLPs, added to the stream.

    experts: number of experts, at least the rule's top_k.
    rule: picks experts by the scores.
    router: layer that scores the experts, and no-ops if any.
    width: hidden width of an expert; None takes the model's d_ff.
    activation, norm: see MLP.
    capacity_factor: in training, an expert takes at most its first
      C = ceil(capacity_factor top_k L real / experts) positions of a sequence and drops its other
      picks. L excludes padding; `real` is the share of picks that go to experts. Greater than 0;
      None drops none.
    shared: number of further experts that process every position, unweighted.
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
        """The share of picks that go to experts, not no-ops, at an even load."""
        return self.rule.real(self.experts)

    def slots(self, tokens: int) -> int:
        """Returns C, the slots of an expert for a sequence of `tokens` positions."""
        if self.capacity_factor is None:
            return tokens
        fair = self.rule.top_k * tokens * self.real / self.experts
        # A product such as 1.1 * 10 must not become 12 by its last bit.
        return min(tokens, max(1, math.ceil(self.capacity_factor * fair - 1e-9)))

    def computed(self, tokens: int) -> float:
        """Returns the number of positions that all experts together compute, with empty slots."""
        if self.capacity_factor is None:
            return self.rule.top_k * tokens * self.real
        return self.experts * self.slots(tokens)

    def expert_width(self, shape: Shape) -> int:
        return self.width or shape.d_ff

    def cost(self, shape: Shape, load: Load) -> Costs:
        d = shape.d_model
        one = matrices(self.activation) * d * self.expert_width(shape)
        yield Cost("norm", params=norm_params(self.norm, d))
        yield from self.router.cost(shape, load, self.rule.outputs(self.experts))
        share = self.rule.top_k * self.real / self.experts
        computed = self.computed(load.tokens)
        yield Cost("experts", 2.0 * computed * one, one * self.experts, active=share)
        if self.shared:
            yield Cost("mlp", 2.0 * load.tokens * one * self.shared, one * self.shared)

    def looks_ahead(self, routing: str) -> bool:
        # In training, the length of a sequence decides which picks are dropped.
        return (
            routing == "trained" or not self.rule.causal_names or self.router.looks_ahead(routing)
        )

    def causal_rules(self) -> tuple[str, ...]:
        return self.rule.causal_names

    def routed(self) -> int:
        return 1 if self.real < 1 else 0
