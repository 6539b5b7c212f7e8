"""Routers, which score positions, and rules, which turn the scores into a selection.

MoD selects positions by these rules. The rules that pick experts are in moe.py.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from modjax.specs.fields import Accepts, NotNegative, Positive, Spec, one_of
from modjax.specs.layer import Cost, Costs, Load, Router, Shape, spec

Weight = Annotated[str, one_of("linear", "sigmoid", "two_sigmoid", "one_plus_tanh", "one")]


@spec
class Linear(Router):
    """Router with a linear score of the residual stream, r = w . x (arXiv 2404.02258, Eq. 1)."""


@spec
class Sinusoids(Router):
    """Control that scores positions only: r = w . phi(p), phi as in arXiv 1706.03762, 3.5."""


@spec
class Received(Router):
    """Router whose score is the attention that a position received (A-MoD, arXiv 2412.20875).

    The score is relative to uniform attention, see modjax.kernels.received_attention. It needs
    an earlier Attention(received=True) in its segment, and looks ahead: later positions attend too.
    """

    def cost(self, shape: Shape, load: Load, outputs: int = 1) -> Costs:
        yield Cost("router", role="router")

    def looks_ahead(self, routing: str) -> bool:
        return True

    def needs(self) -> frozenset[str]:
        return frozenset({"received"})


class Rule(Spec):
    """Base class of rules that select positions by the scores of a router.

    outputs: number of scores per position that the rule reads.
    trains: whether the rule selects in training, as `MoD.rule` must.
    causal: whether the selection in training never looks ahead.
    causal_names: names of its causal rules, which are its selections that never look ahead.
    """

    outputs = 1
    trains = True
    causal = False
    causal_names: ClassVar[tuple[str, ...]] = ()

    def causal_rules(self) -> tuple[str, ...]:
        """Returns its causal rules, for `Call.routing`. The routing "causal" uses the first."""
        return self.causal_names

    def slot_share(self, capacity: float) -> float:
        """Returns the share of positions with slots in training. Empty slots are computed too."""
        return capacity

    def cost(self, shape: Shape, load: Load) -> Costs:
        yield from ()


@dataclass(frozen=True)
class Weighed(Rule):
    """Base class of rules that weigh an update by the raw score r of its position.

    weight: "linear" for r, "sigmoid" for sigmoid(r), "two_sigmoid" for 2 sigmoid(r),
      "one_plus_tanh" for 1 + tanh(r), "one" for 1.
    """

    weight: Weight = "linear"


@spec
class TopK(Weighed):
    """Selects the k best positions of a sequence (arXiv 2404.02258).

    Training looks ahead. The causal rule "threshold" selects the positions that score above a
    running mean of the k-th best score.
    weight: see Weighed.
    auxiliary: weight of a cross-entropy loss that teaches scores to be above 0 exactly at selected
      positions (section 3.5), 0 or more. With it, "auxiliary" selects by the sign of the score.
    """

    auxiliary: NotNegative[float] = 0.0

    def causal_rules(self) -> tuple[str, ...]:
        return ("auxiliary", "threshold") if self.auxiliary else ("threshold",)


@spec
class Random(Weighed):
    """Control of arXiv 2404.02258: training selects k positions at random; scores weigh them."""

    causal_names = ("threshold",)


@spec
class Positional(Weighed):
    """Control that selects evenly spread positions, whatever they contain."""

    causal, causal_names = True, ("positional",)


@spec
class Threshold(Weighed):
    """Selects by TopK's running threshold in training too (after arXiv 2603.11535).

    weight: see Weighed.
    slack: training has slots for a share slack * capacity of the positions, 1 or more.
    """

    slack: Annotated[float, Accepts("must be 1 or more", lambda slack: slack >= 1)] = 1.5
    causal, causal_names = True, ("threshold",)

    def slot_share(self, capacity: float) -> float:
        return min(1.0, self.slack * capacity)


@spec
class Binary(Rule):
    """Token choice between the layer and skipping it, by a softmax over both.

    balance: weight of the balance loss, Eq. 4 of arXiv 2101.03961 with the targets capacity and
      1 - capacity, 0 or more.
    z: weight of the z-loss (arXiv 2202.08906, Eq. 5), 0 or more.
    """

    balance: NotNegative[float] = 0.01
    z: NotNegative[float] = 0.001
    outputs, causal, causal_names = 2, True, ("binary",)


@spec
class Predictor(Rule):
    """Predicts the selection of training by a small network (arXiv 2404.02258, section 3.5).

    It is for `MoD.causal` only. "predictor" selects the predicted positions. "paced" raises the
    threshold for a row that is ahead of its capacity, and lowers it for one that lags.
    weight: weight of its cross-entropy loss, greater than 0. Only the predictor gets its gradient.
    """

    weight: Positive[float] = 1.0
    trains, causal_names = False, ("predictor", "paced")

    def cost(self, shape: Shape, load: Load) -> Costs:
        d, hidden = shape.d_model, predictor_width(shape.d_model)
        flops, numbers = 2.0 * load.tokens * (d + 1) * hidden, d * hidden + hidden + 2
        yield Cost("predictor", flops, numbers, backward=1.0, role="predictor")


def predictor_width(d_model: int) -> int:
    """Returns the hidden width of the predictor, which arXiv 2404.02258 leaves open."""
    return max(1, d_model // 4)
