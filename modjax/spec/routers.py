"""Routers score positions; rules turn the scores into a selection.

Mixture-of-Depths (arXiv 2404.02258) selects positions by these; spec/experts.py has the rules that
select experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from modjax.errors import require, require_one_of
from modjax.spec.layer import Cost, Layer, Load, Shape, Spec, named

WEIGHTS = ("linear", "sigmoid", "two_sigmoid", "one_plus_tanh", "one")


class Router(Layer):
    """Base class of routers: layers that make some scores of every position."""

    def cost(self, shape: Shape, load: Load, outputs: int = 1) -> Iterator[Cost]:
        """Yields the costs of a router that makes `outputs` scores of each position."""
        numbers = shape.d_model * outputs
        yield Cost("router", 2.0 * load.tokens * numbers, numbers, role="router")


@named
@dataclass(frozen=True)
class Linear(Router):
    """A linear map of the residual stream, r = w . x (arXiv 2404.02258, Eq. 1)."""


@named
@dataclass(frozen=True)
class Sinusoids(Router):
    """A control: a linear map of sinusoids of the position, whatever the position holds.

    r = w . phi(p), with phi the encoding of arXiv 1706.03762, section 3.5.
    """


@named
@dataclass(frozen=True)
class Received(Router):
    """The attention that an earlier Attention(received=True) gave each position (arXiv 2412.20875).

    The layer has no parameters. Later positions give attention too, so the score looks ahead.
    """

    def cost(self, shape: Shape, load: Load, outputs: int = 1) -> Iterator[Cost]:
        yield Cost("router", role="router")

    def looks_ahead(self, routing: str) -> bool:
        return True

    def needs(self) -> frozenset[str]:
        return frozenset({"received"})


class Rule(Spec):
    """Base class of rules: each selects positions by the scores of a router.

    outputs: scores of each position that the rule reads.
    causal: the selection of training never looks ahead.
    """

    outputs = 1
    causal = False

    def names(self) -> tuple[str, ...]:
        """Returns the names of the ways in which the rule selects without the future.

        A call may ask for one by name; the first is the rule's own.
        """
        return ()

    def room(self, capacity: float) -> float:
        """Returns the share of positions that training has slots for, and computes."""
        return capacity

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        yield from ()


@dataclass(frozen=True)
class Weighed(Rule):
    """Base class of rules that weigh an update by the raw score r of its position.

    weight: "linear" r, "sigmoid", "two_sigmoid" 2 sigmoid(r), "one_plus_tanh" 1 + tanh(r), "one" 1.
    """

    weight: str = "linear"

    def __post_init__(self):
        super().__post_init__()
        require_one_of(f"{type(self).__name__}.weight", self.weight, WEIGHTS)


@named
@dataclass(frozen=True)
class TopK(Weighed):
    """Training takes the k best positions of a sequence, which looks ahead.

    Without the future, positions are taken that score above a running mean of the k-th best score
    ("threshold"). auxiliary: the weight of a loss that teaches the scores to be above 0 where a
    position is taken (section 3.5 of the paper); they then select by that ("auxiliary").
    """

    auxiliary: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(self.auxiliary >= 0, "TopK.auxiliary", self.auxiliary, "must be 0 or more")

    def names(self) -> tuple[str, ...]:
        return ("auxiliary", "threshold") if self.auxiliary else ("threshold",)


@named
@dataclass(frozen=True)
class Random(Weighed):
    """The paper's control: training takes k positions at random; the score weighs them."""

    def names(self) -> tuple[str, ...]:
        return ("threshold",)


@named
@dataclass(frozen=True)
class Positional(Weighed):
    """A control: positions spread evenly, whatever they hold."""

    causal = True

    def names(self) -> tuple[str, ...]:
        return ("positional",)


@named
@dataclass(frozen=True)
class Threshold(Weighed):
    """Positions that score above a running mean of the k-th best score, in training too.

    After arXiv 2603.11535. slack: training has slots for slack * capacity of the positions.
    """

    slack: float = 1.5
    causal = True

    def __post_init__(self):
        super().__post_init__()
        require(self.slack >= 1, "Threshold.slack", self.slack, "must be 1 or more")

    def names(self) -> tuple[str, ...]:
        return ("threshold",)

    def room(self, capacity: float) -> float:
        return min(1.0, self.slack * capacity)


@named
@dataclass(frozen=True)
class Binary(Rule):
    """Token choice between passing a layer by and running through it, by a softmax over both.

    balance, z: weights of the two losses, see nn/rules.py.
    """

    balance: float = 0.01
    z: float = 0.001
    outputs = 2
    causal = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("balance", "z"):
            value = getattr(self, name)
            require(value >= 0, f"Binary.{name}", value, "must be 0 or more")

    def names(self) -> tuple[str, ...]:
        return ("binary",)


@named
@dataclass(frozen=True)
class Predictor(Rule):
    """A small network beside the router that predicts what training selects (section 3.5).

    Without the future, positions are taken for which it predicts so ("predictor"), or that pass a
    threshold which rises as their row runs ahead of its capacity ("paced").
    weight: of its loss, whose gradient reaches nothing but the predictor.
    """

    weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(self.weight > 0, "Predictor.weight", self.weight, "must be greater than 0")

    def names(self) -> tuple[str, ...]:
        return ("predictor", "paced")

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        d, hidden = shape.d_model, predictor_width(shape.d_model)
        flops, numbers = 2.0 * load.tokens * (d + 1) * hidden, d * hidden + hidden + 2
        yield Cost("predictor", flops, numbers, backward=1.0, role="predictor")


def predictor_width(d_model: int) -> int:
    """Returns the hidden width of the predictor (arXiv 2404.02258 leaves it open)."""
    return max(1, d_model // 4)
