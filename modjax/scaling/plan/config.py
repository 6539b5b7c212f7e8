"""The `sweep` group of a config file: the grid, and the rules that shape its runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from modjax.errors import require, require_plain_name
from modjax.specs.fields import Accepts, check
from modjax.specs.run import Share

# A sweep's rules decide these fields; its `model` and `train` groups must leave them out.
SHAPE_FIELDS = ("d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff")
RECIPE_FIELDS = ("batch_size", "steps", "learning_rate", "warmup_steps", "seed")

# Limits far beyond any real grid, to catch typing errors.
WIDEST = 65_536
MOST_SIZES = 100
MOST_PARAMS, MOST_FLOPS = 1e18, 1e40
MOST_STEPS = 10**9


def _up_to(limit: float) -> Accepts:
    said = f"must be greater than 0 and at most {limit:g}"
    return Accepts(said, lambda value: 0 < value <= limit)


def _exponent(usual: str) -> Accepts:
    return Accepts(f"must be in [-10, 10]; it is {usual}", lambda value: abs(value) <= 10)


def _at_least(limit: float) -> Accepts:
    return Accepts(f"must be at least {limit:g}", lambda value: value >= limit)


@dataclass(frozen=True)
class Optimum:
    """Predicted optimal size of the baseline: N*(C) = params (C / budget)^exponent.

    params counts non-embedding parameters.
    """

    budget: Annotated[float, _up_to(MOST_FLOPS)]
    params: Annotated[float, _up_to(MOST_PARAMS)]
    exponent: Annotated[float, _exponent("about 0.5")] = 0.5

    def __post_init__(self):
        check(self, "sweep.optimum")

    def at(self, budget: float) -> float:
        """Returns N*(budget). Raises InputError unless it is between 1e-100 and 1e100."""
        decades = math.log10(self.params) + self.exponent * (
            math.log10(budget) - math.log10(self.budget)
        )
        accepted = (
            f"too far from sweep.optimum.budget = {self.budget:g}: the predicted optimum is "
            f"1e{decades:.0f} parameters"
        )
        require(abs(decades) < 100, "sweep.budgets", budget, accepted)
        return self.params * (budget / self.budget) ** self.exponent


@dataclass(frozen=True)
class ShapeRule:
    """Rule that derives a model's shape from its width d, a multiple of `width_multiple`.

    heads: the most that divide d into even widths of at least `head_dim`, or 1.
    layers: d / aspect, rounded to a multiple of `layer_multiple`, and at least one multiple.
      `layer_multiple` must be a common multiple of the arms' pattern lengths, so that every arm can
      use every shape.
    feed-forward width: ff_multiple * d.
    """

    width_multiple: Annotated[
        int, _up_to(WIDEST), Accepts("must be even, for rotary positions", lambda w: w % 2 == 0)
    ]
    head_dim: Annotated[int, _up_to(WIDEST)]
    aspect: Annotated[float, _up_to(WIDEST), _at_least(0.01)]
    layer_multiple: Annotated[int, _up_to(1000)]
    ff_multiple: Annotated[float, _up_to(1000)] = 4.0

    def __post_init__(self):
        check(self, "sweep.shape")

    def at(self, width: int) -> dict[str, int]:
        """Returns SHAPE_FIELDS at a width."""
        groups = max(1, math.floor(width / self.aspect / self.layer_multiple + 0.5))
        most = min(width // 2, width // self.head_dim)
        heads = next((h for h in range(most, 1, -1) if width % (2 * h) == 0), 1)
        return {
            "d_model": width,
            "num_layers": groups * self.layer_multiple,
            "num_heads": heads,
            "num_kv_heads": heads,
            "d_ff": round(self.ff_multiple * width),
        }


@dataclass(frozen=True)
class Recipe:
    """Training recipe of all arms, by rule of width d and budget C.

    batch: B = batch_size (C / optimum.budget)^batch_exponent sequences, rounded to a power of two
      unless the exponent is 0.
    peak learning rate: learning_rate * sqrt(B) / d.
    warm-up: warmup_fraction of the steps.
    """

    batch_size: Annotated[int, _up_to(2**31 - 1)]
    learning_rate: Annotated[float, _up_to(1e6)]
    warmup_fraction: Share
    batch_exponent: Annotated[float, _exponent("0 to 1")] = 0.0

    def __post_init__(self):
        check(self, "sweep.recipe")

    def batch_at(self, ratio: float) -> int:
        """Returns the sequences per step at `ratio` = C / optimum.budget."""
        if self.batch_exponent == 0:
            return self.batch_size
        doublings = math.log2(self.batch_size) + self.batch_exponent * math.log2(ratio)
        accepted = f"too large: the batch would have 2^{doublings:.0f} sequences"
        require(doublings < 30.5, "sweep.recipe.batch_exponent", self.batch_exponent, accepted)
        return 2 ** max(0, round(doublings))


@dataclass(frozen=True)
class SweepConfig:
    """Grid of runs: arms x budgets x sizes x seeds.

    arms: name -> the model fields in which the arm differs, and up to two more:
      recipe: a group of fields that change the recipe of this arm, to check that the shared one is
        fair to all.
      forward_ratio: centres the arm's grid on this multiple of the baseline's forward FLOPs.
        Defaults to 1.
    baseline: the arm that sets the grid, and that the others are compared with.
    budgets: training FLOPs, in the "matmul" convention of modjax.flops.
    sizes: the number of sizes per arm and budget.
    spread: how far the sizes reach on either side of the predicted optimum, in decades of
      non-embedding parameters. Wide grids bias the fit: use 0.6 or less.
    seeds: of the initialisation. All runs read the data in the same order.
    flops_per_second: expected of one worker, for the estimate of the time alone.
    """

    arms: Mapping[str, Any]
    baseline: str
    budgets: tuple[float, ...]
    sizes: Annotated[int, _up_to(MOST_SIZES)]
    spread: Annotated[float, _up_to(5)]
    optimum: Optimum
    shape: ShapeRule
    recipe: Recipe
    flops_per_second: Annotated[float, _up_to(MOST_FLOPS), _at_least(1)]
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self):
        named = isinstance(self.arms, Mapping) and all(isinstance(arm, str) for arm in self.arms)
        require(named, "sweep.arms", self.arms, "must be a group of arms")
        for name in ("arms", "budgets", "seeds"):
            value = getattr(self, name)
            require(len(value) > 0, f"sweep.{name}", value, "must name at least one")
            require(len(set(value)) == len(value), f"sweep.{name}", value, "must all differ")
        accepted = f"must be one of {', '.join(self.arms)}"
        require(self.baseline in self.arms, "sweep.baseline", self.baseline, accepted)
        for name in self.arms:
            require_plain_name("sweep.arms", name)
        limits = _up_to(MOST_FLOPS)
        for budget in self.budgets:
            require(limits.fits(budget), "sweep.budgets", budget, limits.said)
        for seed in self.seeds:
            require(0 <= seed < 2**31, "sweep.seeds", seed, "must be 0 or more and below 2**31")
        check(self, "sweep")
