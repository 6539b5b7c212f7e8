"""Mixture of experts in an MLP's place; with no-op experts it is integrated MoDE."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from modjax.errors import require, require_one_of
from modjax.spec.layer import ROUTINGS, Cost, Layer, Load, Shape, named
from modjax.spec.layers import ACTIVATIONS, NORMS, matrices, norm_params

ROUTERS = ("token_choice", "expert_choice", "threshold")
SCORES = ("softmax", "sigmoid")


@named
@dataclass(frozen=True)
class MoE(Layer):
    """Each position runs through `top_k` of `experts` MLPs, added to the stream.

    width: of an expert; None, the model's d_ff. activation, norm: as MLP has them.
    capacity_factor: of each sequence of S positions, without padding, an expert takes its first
      C = ceil(capacity_factor top_k S / (experts + no_ops)) at most; the other picks are dropped.
      Reading without looking ahead drops none. None: nor does training.
    router: "token_choice" (arXiv 2101.03961, 2202.08906), each position picks its top_k;
      "expert_choice" (2202.09368), each expert picks its C best, which looks ahead; "threshold"
      (2603.11535), a position goes to every expert whose score for it passes a running mean of
      the score that ranks top_k S / experts there.
    no_ops: rows of the router beside the experts that stand for no expert: what picks one is left
      as it is (arXiv 2404.02258, section 4.3). random_no_ops: the control, where as many picks
      become no-ops by chance.
    scores: of the router, "softmax" over all rows or "sigmoid" of each. A pick's weight is its
      score times `scale`; `renormalise` divides it by the sum over the position's picks, those of
      no-ops among them.
    shared: so many more experts that every position runs through, unweighted.
    balance_weight, z_weight: of the two losses, for token choice. bias_rate: a bias of each row,
      for picking only, moves by it against the row's load at every update (2408.15664).
    """

    experts: int
    top_k: int = 1
    width: int | None = None
    activation: str = "gelu"
    norm: str = "before"
    capacity_factor: float | None = 1.25
    router: str = "token_choice"
    no_ops: int = 0
    random_no_ops: bool = False
    scores: str = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    shared: int = 0
    balance_weight: float = 0.01
    z_weight: float = 0.001
    bias_rate: float = 0.0

    def __post_init__(self):
        super().__post_init__()

        def need(condition: bool, name: str, accepted: str) -> None:
            require(condition, f"MoE.{name}", getattr(self, name), accepted)

        require_one_of("MoE.router", self.router, ROUTERS)
        require_one_of("MoE.scores", self.scores, SCORES)
        require_one_of("MoE.activation", self.activation, ACTIVATIONS)
        require_one_of("MoE.norm", self.norm, NORMS)
        need(self.experts > 0, "experts", "must be greater than 0")
        fits = 0 < self.top_k <= self.experts
        need(fits, "top_k", f"must be between 1 and experts = {self.experts}")
        need(self.width is None or self.width > 0, "width", "must be greater than 0, or None")
        for name in ("no_ops", "shared", "balance_weight", "z_weight", "bias_rate"):
            need(getattr(self, name) >= 0, name, "must be 0 or more")
        need(self.scale > 0, "scale", "must be greater than 0")
        factor = self.capacity_factor
        fits = factor is None or factor > 0
        need(fits, "capacity_factor", "must be greater than 0, or None: it leaves no slot")
        learns = self.top_k > 1 or not self.renormalise
        need(learns, "renormalise", "must be False at top_k = 1: the router would not learn")
        need(not self.random_no_ops or self.no_ops > 0, "random_no_ops", "needs no_ops")
        if self.router != "token_choice":
            for name, only in (("no_ops", 0), ("bias_rate", 0.0), ("renormalise", False)):
                fits = getattr(self, name) == only
                need(fits, name, f"must be {only} where router = {self.router!r}")
        fits = factor is not None or self.router != "expert_choice"
        need(fits, "capacity_factor", f"must be a number where router = {self.router!r}")

    @property
    def rows(self) -> int:
        """Numbers that the router makes of each position."""
        return self.experts + (0 if self.random_no_ops else self.no_ops)

    @property
    def balanced(self) -> bool:
        """Whether training takes a loss of the router's load or logits."""
        return self.router == "token_choice" and self.balance_weight + self.z_weight > 0

    @property
    def real(self) -> float:
        """The share of picks that are of experts, where the load is even."""
        return self.experts / (self.experts + self.no_ops)

    def slots(self, tokens: int) -> int:
        """C, the positions of a sequence of `tokens` that an expert takes at most."""
        if self.capacity_factor is None:
            return tokens
        fair = self.top_k * tokens * self.real / self.experts
        # A share such as 1.1 * 10 should not become 12 by its last bit.
        return min(tokens, max(1, math.ceil(self.capacity_factor * fair - 1e-9)))

    def computed(self, tokens: int) -> float:
        """Positions that the experts compute of a sequence, empty slots among them."""
        if self.capacity_factor is None:
            return self.top_k * tokens * self.real
        return self.experts * self.slots(tokens)

    def expert_width(self, shape: Shape) -> int:
        return self.width or shape.d_ff

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        d = shape.d_model
        one = matrices(self.activation) * d * self.expert_width(shape)
        yield Cost("norm", params=norm_params(self.norm, d))
        yield Cost("router", 2.0 * load.tokens * d * self.rows, d * self.rows, role="router")
        share = self.top_k * self.real / self.experts
        computed = self.computed(load.tokens)
        yield Cost("experts", 2.0 * computed * one, one * self.experts, active=share)
        if self.shared:
            yield Cost("mlp", 2.0 * load.tokens * one * self.shared, one * self.shared)

    def routings(self) -> tuple[str, ...]:
        return ("trained",) if self.router == "expert_choice" else ROUTINGS

    def rules(self) -> frozenset[str]:
        return frozenset() if self.router == "expert_choice" else frozenset({"router"})

    def routed(self) -> int:
        return 1 if self.no_ops else 0
