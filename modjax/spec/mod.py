"""Mixture-of-Depths: a layer that processes only a share of the positions (arXiv 2404.02258)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from modjax.errors import require, require_one_of
from modjax.spec.layer import Cost, Layer, Load, Shape, check_types, named
from modjax.spec.layers import DENSE

WEIGHTS = ("linear", "sigmoid", "two_sigmoid", "one_plus_tanh")
RESIDUALS = ("delta", "literal")


class Router(NamedTuple):
    """What a routing scheme is, apart from how it is computed (nn/routers.py).

    outputs: numbers that it makes of each position. causal: it trains by a rule of its own that
    never looks ahead. content: its score orders positions by what they hold, so that the score
    itself can learn to select. slack: it has room for `slack` times its capacity in training.
    handed: what it needs of an earlier layer, "" for nothing.
    """

    outputs: int = 1
    causal: bool = False
    content: bool = False
    slack: bool = False
    handed: str = ""


ROUTERS = {
    "expert_choice": Router(content=True),
    "stochastic": Router(),
    "positional": Router(causal=True),
    "learned_position": Router(),
    "token_choice": Router(outputs=2, causal=True),
    "received": Router(outputs=0, handed="received"),
    "threshold": Router(slack=True),
}


def selected_tokens(capacity: float, seq_len: int) -> int:
    """Returns k, how many of a sequence's positions a routed layer processes.

    k = max(1, round(capacity * S)). seq_len: S, without padding.
    """
    return max(1, round(capacity * seq_len))


def cache_slots(capacity: float, length: int, slack: float | None) -> int:
    """Positions that a routed layer's cache holds of a sequence of at most `length`.

    slack: None has room for every position; else room for slack * capacity of them.
    """
    if slack is None:
        return length
    return min(length, max(1, math.ceil(slack * capacity * length)))


def predictor_width(d_model: int) -> int:
    """Hidden width of the predictor beside a router (arXiv 2404.02258 leaves it open)."""
    return max(1, d_model // 4)


@dataclass(frozen=True, kw_only=True)
class MoDConfig:
    """How a routed layer selects positions and adds its update (arXiv 2404.02258, Eq. 1).

    capacity: share of each sequence's positions that are processed, in (0, 1]; padding not counted.
    router: one of ROUTERS. "received" needs an Attention(received=True) before it.
    weight: how the raw router score r scales the update: r, sigmoid(r), 2 sigmoid(r), 1 + tanh(r).
    residual: what is scaled, with f the inner layer and r its weight: `delta` x + r (f(x) - x),
      or `literal` x + r f(x).
    auxiliary_weight, predictor_weight: of the losses that teach the router's own score, or a
      predictor beside it, to select without the future (section 3.5); 0 leaves them out.
    balance_weight, z_weight: of the two losses of token choice.
    slack: a "threshold" router has room for slack * capacity of the positions in training.
    """

    capacity: float = 0.125
    router: str = "expert_choice"
    weight: str = "linear"
    residual: str = "delta"
    auxiliary_weight: float = 0.0
    predictor_weight: float = 0.0
    balance_weight: float = 0.01
    z_weight: float = 0.001
    slack: float = 1.5

    def __post_init__(self):
        check_types(self, "MoD")
        require(0 < self.capacity <= 1, "MoD.capacity", self.capacity, "must be in (0, 1]")
        require(self.slack >= 1, "MoD.slack", self.slack, "must be 1 or more")
        for name in ("auxiliary_weight", "predictor_weight", "balance_weight", "z_weight"):
            value = getattr(self, name)
            require(value >= 0, f"MoD.{name}", value, "must be 0 or more")
        require_one_of("MoD.router", self.router, tuple(ROUTERS))
        require_one_of("MoD.weight", self.weight, WEIGHTS)
        require_one_of("MoD.residual", self.residual, RESIDUALS)

    @property
    def facts(self) -> Router:
        return ROUTERS[self.router]

    @property
    def room(self) -> float:
        """The share of positions that training has room for, which is what it computes."""
        return min(1.0, self.slack * self.capacity) if self.facts.slack else self.capacity

    @property
    def teaches_router(self) -> bool:
        """Whether the auxiliary loss is taken."""
        return self.auxiliary_weight > 0 and self.facts.content


@named
@dataclass(frozen=True)
class MoD(MoDConfig, Layer):
    """Routes a share of the positions through `inner`; the others pass it by."""

    inner: Layer = DENSE

    def inside(self) -> tuple[Layer, ...]:
        return (self.inner,)

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        d, tokens = shape.d_model, load.tokens
        k = selected_tokens(self.room, tokens)
        for cost in self.inner.cost(shape, Load(k, k)):
            yield cost._replace(active=cost.active * self.capacity)
        outputs = d * self.facts.outputs
        yield Cost("router", 2.0 * tokens * outputs, outputs, role="router")
        if self.predictor_weight > 0:
            hidden = predictor_width(d)
            yield Cost(
                "predictor",
                2.0 * tokens * (d + 1) * hidden,
                d * hidden + hidden + 2,
                backward=1.0,
                role="predictor",
            )

    def routings(self) -> tuple[str, ...]:
        inside = self.routings_of_some()
        return tuple(r for r in inside if r == "trained" or r in self._own())

    def rules(self) -> frozenset[str]:
        return super().rules() | self._own()

    def _own(self) -> frozenset[str]:
        able = {
            "router": self.facts.causal or self.teaches_router,
            "predictor": self.predictor_weight > 0,
            "paced": self.predictor_weight > 0,
            "threshold": not self.facts.handed,  # what is handed on may know what comes later
        }
        return frozenset(routing for routing in able if able[routing])

    def routed(self) -> int:
        return 1 + super().routed()

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        slots = cache_slots(self.capacity, length, slack)
        return self.inner.cache_numbers(shape, slots, slack)

    def hands_on(self) -> frozenset[str]:
        return frozenset()  # of some positions only

    def needs(self) -> frozenset[str]:
        return super().needs() | ({self.facts.handed} if self.facts.handed else frozenset())
