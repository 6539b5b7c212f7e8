"""Routers score positions; rules turn the scores into a selection.

Mixture-of-Depths (arXiv 2404.02258) selects positions by these. The rules of experts are in moe.py.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from modjax.specs.fields import Accepts, NotNegative, Positive, Spec, one_of
from modjax.specs.layer import Cost, Costs, Load, Router, Shape, spec

Weight = Annotated[str, one_of("linear", "sigmoid", "two_sigmoid", "one_plus_tanh", "one")]


@spec
class Linear(Router):
    """A linear map of the residual stream, r = w . x (arXiv 2404.02258, Eq. 1)."""


@spec
class Sinusoids(Router):
    """A control: r = w . phi(p), with phi the sinusoids of position p (arXiv 1706.03762, 3.5)."""


@spec
class Received(Router):
    """The attention that each position received in Attention(received=True) (arXiv 2412.20875).

    Later positions give attention too, so the score looks ahead.
    """

    def cost(self, shape: Shape, load: Load, outputs: int = 1) -> Costs:
        yield Cost("router", role="router")

    def looks_ahead(self, routing: str) -> bool:
        return True

    def needs(self) -> frozenset[str]:
        return frozenset({"received"})


class Rule(Spec):
    """Base class of rules: each selects positions by the scores of a router.

    outputs: scores of each position that the rule reads.
    causal: the selection of training never looks ahead.
    ways: names of the ways in which it selects without the future, see `names`.
    """

    outputs = 1
    causal = False
    ways: ClassVar[tuple[str, ...]] = ()

    def names(self) -> tuple[str, ...]:
        """Returns the ways that a call may ask for by name; the first is the rule's own."""
        return self.ways

    def room(self, capacity: float) -> float:
        """Returns the share of positions that training has slots for, and computes."""
        return capacity

    def cost(self, shape: Shape, load: Load) -> Costs:
        yield from ()


@dataclass(frozen=True)
class Weighed(Rule):
    """Base class of rules that weigh an update by the raw score r of its position.

    weight: "linear" r, "sigmoid", "two_sigmoid" 2 sigmoid(r), "one_plus_tanh" 1 + tanh(r), "one" 1.
    """

    weight: Weight = "linear"


@spec
class TopK(Weighed):
    """Selects the k best positions of a sequence, which looks ahead.

    Without the future, positions that score above a running mean of the k-th best ("threshold").
    auxiliary: the weight of a loss that teaches scores to be above 0 where a position is taken
      (section 3.5 of the paper). Without the future, the sign then selects ("auxiliary").
    """

    auxiliary: NotNegative[float] = 0.0

    def names(self) -> tuple[str, ...]:
        return ("auxiliary", "threshold") if self.auxiliary else ("threshold",)


@spec
class Random(Weighed):
    """The paper's control: selects k positions at random in training; the score weighs them."""

    ways = ("threshold",)


@spec
class Positional(Weighed):
    """A control: positions spread evenly, whatever they hold."""

    causal, ways = True, ("positional",)


@spec
class Threshold(Weighed):
    """Selects in training as TopK does without the future (after arXiv 2603.11535).

    slack: training has slots for slack * capacity of the positions.
    """

    slack: Annotated[float, Accepts("must be 1 or more", lambda slack: slack >= 1)] = 1.5
    causal, ways = True, ("threshold",)

    def room(self, capacity: float) -> float:
        return min(1.0, self.slack * capacity)


@spec
class Binary(Rule):
    """Token choice between the layer and passing it by, by a softmax over both.

    balance, z: weights of the two losses, see nn/routing/rules.py.
    """

    balance: NotNegative[float] = 0.01
    z: NotNegative[float] = 0.001
    outputs, causal, ways = 2, True, ("binary",)


@spec
class Predictor(Rule):
    """A small network beside the router that predicts what training selects (section 3.5).

    It takes the positions that it predicts ("predictor"), or those above a threshold that rises as
    their row runs ahead of its capacity ("paced").
    weight: of its loss, whose gradient reaches nothing but the predictor.
    """

    weight: Positive[float] = 1.0
    ways = ("predictor", "paced")

    def cost(self, shape: Shape, load: Load) -> Costs:
        d, hidden = shape.d_model, predictor_width(shape.d_model)
        flops, numbers = 2.0 * load.tokens * (d + 1) * hidden, d * hidden + hidden + 2
        yield Cost("predictor", flops, numbers, backward=1.0, role="predictor")


def predictor_width(d_model: int) -> int:
    """Returns the hidden width of the predictor (arXiv 2404.02258 leaves it open)."""
    return max(1, d_model // 4)
