"""What a config file's `sweep` group says: the grid, and the rules that shape its cells."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modjax.errors import require, require_plain_name

# Fields that the sweep's rules decide, and that its `model` and `train` groups must leave out.
SHAPE_FIELDS = ("d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff")
RECIPE_FIELDS = ("batch_size", "steps", "learning_rate", "warmup_steps", "seed")

# No larger grid is planned: what lies beyond is a slip of the pen.
WIDEST = 65_536
MOST_SIZES = 100
MOST_PARAMS, MOST_FLOPS = 1e18, 1e40
MOST_STEPS = 10**9


def _require_at_most(prefix: str, config: object, limits: Mapping[str, float]) -> None:
    for name, limit in limits.items():
        value = getattr(config, name)
        require(
            0 < value <= limit,
            f"{prefix}.{name}",
            value,
            f"must be greater than 0 and at most {limit:g}",
        )


@dataclass(frozen=True)
class Optimum:
    """Predicted optimum of the baseline: N*(C) = params (C / budget)^exponent, non-embedding."""

    budget: float
    params: float
    exponent: float = 0.5

    def __post_init__(self):
        limits = {"budget": MOST_FLOPS, "params": MOST_PARAMS}
        _require_at_most("sweep.optimum", self, limits)
        require(
            abs(self.exponent) <= 10,
            "sweep.optimum.exponent",
            self.exponent,
            "must be in [-10, 10]; it is about 0.5",
        )

    def at(self, budget: float) -> float:
        """N*(C). Raises InputError where that is no number of parameters."""
        decades = math.log10(self.params) + self.exponent * (
            math.log10(budget) - math.log10(self.budget)
        )
        require(
            abs(decades) < 100,
            "sweep.budgets",
            budget,
            f"too far from sweep.optimum.budget = {self.budget:g}: the predicted optimum is "
            f"1e{decades:.0f} parameters",
        )
        return self.params * (budget / self.budget) ** self.exponent


@dataclass(frozen=True)
class ShapeRule:
    """Every shape follows from its width d, a multiple of `width_multiple`.

    As many heads as divide d into even widths of at least `head_dim`; layers d / aspect rounded to
    a multiple of `layer_multiple`, at least one of them; feed-forward width ff_multiple * d.
    `layer_multiple` must be a common multiple of the arms' pattern lengths, so that every arm can
    use every shape.
    """

    width_multiple: int
    head_dim: int
    aspect: float
    layer_multiple: int
    ff_multiple: float = 4.0

    def __post_init__(self):
        _require_at_most(
            "sweep.shape",
            self,
            {
                "width_multiple": WIDEST,
                "head_dim": WIDEST,
                "aspect": WIDEST,
                "layer_multiple": 1000,
                "ff_multiple": 1000,
            },
        )
        require(self.aspect >= 0.01, "sweep.shape.aspect", self.aspect, "must be at least 0.01")
        require(
            self.width_multiple % 2 == 0,
            "sweep.shape.width_multiple",
            self.width_multiple,
            "must be even, for rotary positions",
        )

    def at(self, width: int) -> dict[str, int]:
        groups = max(1, math.floor(width / self.aspect / self.layer_multiple + 0.5))
        most = min(width // 2, width // self.head_dim)
        heads = next((h for h in range(most, 1, -1) if width % (2 * h) == 0), 1)
        values = (
            width,
            groups * self.layer_multiple,
            heads,
            heads,
            round(self.ff_multiple * width),
        )
        return dict(zip(SHAPE_FIELDS, values, strict=True))


@dataclass(frozen=True)
class Recipe:
    """The training recipe that all arms share, by rule of width d and budget C.

    batch B = batch_size (C / optimum.budget)^batch_exponent sequences, rounded to a power of two
    where the exponent is not 0; peak learning rate = learning_rate * sqrt(B) / d; warm-up =
    warmup_fraction of the steps.
    """

    batch_size: int
    learning_rate: float
    warmup_fraction: float
    batch_exponent: float = 0.0

    def __post_init__(self):
        limits = {"batch_size": 2**31 - 1, "learning_rate": 1e6}
        _require_at_most("sweep.recipe", self, limits)
        require(
            abs(self.batch_exponent) <= 10,
            "sweep.recipe.batch_exponent",
            self.batch_exponent,
            "must be in [-10, 10]; it is 0 to 1",
        )
        require(
            0 <= self.warmup_fraction <= 1,
            "sweep.recipe.warmup_fraction",
            self.warmup_fraction,
            "must be in [0, 1]",
        )

    def batch_at(self, ratio: float) -> int:
        """Sequences per step at `ratio` = C / optimum.budget."""
        if self.batch_exponent == 0:
            return self.batch_size
        doublings = math.log2(self.batch_size) + self.batch_exponent * math.log2(ratio)
        require(
            doublings < 30.5,
            "sweep.recipe.batch_exponent",
            self.batch_exponent,
            f"too large: the batch would have 2^{doublings:.0f} sequences",
        )
        return 2 ** max(0, round(doublings))


@dataclass(frozen=True)
class SweepConfig:
    """Arms x budgets x sizes x seeds.

    arms: name -> the model fields in which the arm differs, and up to two more: a group `recipe`
      changes the recipe of one arm, to check that the shared one is fair to all; `forward_ratio`
      centres its grid on that multiple of the baseline's forward FLOPs instead of on 1.
    baseline: the arm that sets the grid, and that the others are compared with.
    budgets: training FLOPs, in the "matmul" convention of modjax.flops.
    sizes, spread: so many sizes per arm and budget, within `spread` decades of non-embedding
      parameters on either side of the predicted optimum. Wide grids bias the fit: 0.6 or less.
    seeds: initialisations; the order of the data is the same for all runs.
    flops_per_second: what one worker is expected to reach, for the estimated time only.
    """

    arms: Mapping[str, Any]
    baseline: str
    budgets: tuple[float, ...]
    sizes: int
    spread: float
    optimum: Optimum
    shape: ShapeRule
    recipe: Recipe
    flops_per_second: float
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self):
        require(isinstance(self.arms, Mapping), "sweep.arms", self.arms, "must be a group of arms")
        for name in ("arms", "budgets", "seeds"):
            value = getattr(self, name)
            require(len(value) > 0, f"sweep.{name}", value, "must name at least one")
        require(
            self.baseline in self.arms,
            "sweep.baseline",
            self.baseline,
            f"must be one of {', '.join(self.arms)}",
        )
        for name in ("budgets", "seeds"):
            value = getattr(self, name)
            require(len(set(value)) == len(value), f"sweep.{name}", value, "must all differ")
        for name in self.arms:
            require_plain_name("sweep.arms", name)
        for budget in self.budgets:
            require(
                0 < budget <= MOST_FLOPS,
                "sweep.budgets",
                budget,
                f"must be greater than 0 and at most {MOST_FLOPS:g}",
            )
        for seed in self.seeds:
            require(0 <= seed < 2**31, "sweep.seeds", seed, "must be 0 or more and below 2**31")
        limits = {"sizes": MOST_SIZES, "spread": 5, "flops_per_second": MOST_FLOPS}
        _require_at_most("sweep", self, limits)
        require(
            self.flops_per_second >= 1,
            "sweep.flops_per_second",
            self.flops_per_second,
            "must be at least 1",
        )
