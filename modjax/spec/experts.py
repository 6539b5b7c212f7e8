"""Rules that select experts by the scores of a router, for `MoE`."""

from dataclasses import dataclass

from modjax.errors import require, require_one_of
from modjax.spec.layer import Spec, named

SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class ExpertRule(Spec):
    """Base class of rules that give each position some of the experts.

    top_k: experts of a position, on average.
    scores: "softmax" over all rows of the router, or "sigmoid" of each. The weight of an expert is
      its score times `scale`.
    bounded: an expert always has a number of slots, so that MoE needs a capacity_factor.
    """

    bounded = False
    top_k: int = 1
    scores: str = "softmax"
    scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.need(self.top_k > 0, "top_k", "must be greater than 0")
        require_one_of(f"{type(self).__name__}.scores", self.scores, SCORES)
        self.need(self.scale > 0, "scale", "must be greater than 0")

    def need(self, condition: bool, name: str, accepted: str) -> None:
        """Raises InputError unless a field is as it must be."""
        require(condition, f"{type(self).__name__}.{name}", getattr(self, name), accepted)

    def names(self) -> tuple[str, ...]:
        """Returns the names of its ways to select without the future; the first is its own."""
        return ()

    def rows(self, experts: int) -> int:
        """Returns how many scores of each position the rule reads."""
        return experts

    def real(self, experts: int) -> float:
        """Returns the share of choices that are of experts, where the load is even."""
        return 1.0


@named
@dataclass(frozen=True)
class TokenChoice(ExpertRule):
    """Each position picks its top_k best rows (arXiv 2101.03961, 2202.08906).

    renormalise: divides a weight by the sum over the position's picks, no-ops among them.
    no_ops: rows beside the experts that stand for no expert: what picks one is left as it is
      (arXiv 2404.02258, section 4.3). random_no_ops: the control, where as many picks become
      no-ops by chance.
    balance, z: weights of the two losses. bias_rate: a bias of each row, for picking only, moves by
      it against the row's load at every update (2408.15664).
    """

    renormalise: bool = False
    no_ops: int = 0
    random_no_ops: bool = False
    balance: float = 0.01
    z: float = 0.001
    bias_rate: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("no_ops", "balance", "z", "bias_rate"):
            self.need(getattr(self, name) >= 0, name, "must be 0 or more")
        learns = self.top_k > 1 or not self.renormalise
        self.need(learns, "renormalise", "must be False at top_k = 1: the router would not learn")
        self.need(not self.random_no_ops or self.no_ops > 0, "random_no_ops", "needs no_ops")

    def names(self) -> tuple[str, ...]:
        return ("token_choice",)

    def rows(self, experts: int) -> int:
        return experts + (0 if self.random_no_ops else self.no_ops)

    def real(self, experts: int) -> float:
        return experts / (experts + self.no_ops)


@named
@dataclass(frozen=True)
class ExpertChoice(ExpertRule):
    """Each expert picks its best positions of a sequence (arXiv 2202.09368), which looks ahead."""

    bounded = True


@named
@dataclass(frozen=True)
class ExpertThreshold(ExpertRule):
    """Each expert takes the positions whose score for it passes a running mean (arXiv 2603.11535).

    It is the mean of the score that ranks as many positions of a sequence as its fair share.
    """

    def names(self) -> tuple[str, ...]:
        return ("expert_threshold",)
