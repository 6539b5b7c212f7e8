"""Results of the fits, each a frozen dataclass, and their JSON form.

A fit that is refused says why in `refusal`; its results are then None.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

# How parameters are counted -> the field of a record.
SIZES = {
    "non_embedding": "params_non_embedding",
    "total": "params_total",
    "active": "params_active",
}
QUANTITIES = ("parameters", "forward_flops")
SURFACE_NAMES: tuple[str, ...] = ("E", "A", "B", "alpha", "beta")

Range = tuple[float, float]


@dataclass(frozen=True)
class Parabola:
    """loss = c0 + c1 u + c2 u^2 with u = log10(x) - log10(sqrt(low * high)), of one arm and budget.

    quantity: what x is, "parameters" or "forward_flops" per token.
    low, high: the sampled range of x.
    noise: standard deviation of one run's loss at this budget, in nats.
    optimum, loss: the vertex.
    off_centre: place of the vertex in the sampled range of log10(x), from -1 to 1.
    """

    arm: str
    budget_flops: float
    quantity: str
    runs: int
    sizes: int
    low: float | None
    high: float | None
    coefficients: tuple[float, ...] | None
    noise: float | None
    optimum: float | None = None
    optimum_interval: Range | None = None
    loss: float | None = None
    loss_interval: Range | None = None
    off_centre: float | None = None
    refusal: str | None = None

    def at(self, x: np.ndarray) -> np.ndarray:
        """Returns the fitted loss at `x`; only for a parabola that was accepted."""
        assert self.coefficients is not None and self.low is not None and self.high is not None
        u = np.log10(x) - (math.log10(self.low) + math.log10(self.high)) / 2
        return np.polynomial.polynomial.polyval(u, self.coefficients)


@dataclass(frozen=True)
class PowerLaw:
    """`quantity` at the optimum = coefficient * budget_flops ** exponent, of one arm.

    quantity: "parameters", "forward_flops" or "loss".
    freedom: points less 2; 0 is an exact fit.
    """

    arm: str
    quantity: str
    points: int
    freedom: int
    coefficient: float | None = None
    exponent: float | None = None
    exponent_interval: Range | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Gap:
    """An arm against the baseline at one budget, each at its own optimum.

    loss: difference in nats, negative if the arm is better.
    percent: the same difference, in percent of the baseline's loss.
    flops_ratio: forward FLOPs per token of the arm's optimum over the baseline's.
    """

    arm: str
    baseline: str
    budget_flops: float
    loss: float | None = None
    loss_interval: Range | None = None
    percent: float | None = None
    percent_interval: Range | None = None
    flops_ratio: float | None = None
    flops_ratio_interval: Range | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Surface:
    """L = E + A / N^alpha + B / D^beta for one arm: N parameters, D tokens, L nats per token.

    objective: sum of Huber losses.
    optimality: largest gradient component over the sum of the absolute values of its terms; 0 at a
      minimum.
    intervals: central 95% over resampled runs, by SURFACE_NAMES.
    """

    arm: str
    runs: int
    E: float | None = None
    A: float | None = None
    B: float | None = None
    alpha: float | None = None
    beta: float | None = None
    objective: float | None = None
    optimality: float | None = None
    intervals: dict[str, Range] | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class SeedSpread:
    """Mean and standard deviation of the loss of finished runs that differ in their seed only.

    deviation: None for a single seed.
    """

    arm: str
    budget_flops: float
    d_model: int
    params: int
    seeds: int
    loss: float
    deviation: float | None


@dataclass(frozen=True)
class NoCausalLoss:
    """Finished runs of one arm that have no causal loss.

    runs, finished: how many they are, and how many runs of the arm finished.
    as_trained: their loss as trained, by cell.
    """

    arm: str
    runs: int
    finished: int
    why: str
    as_trained: tuple[SeedSpread, ...]


@dataclass(frozen=True)
class Fits:
    """Every result of `fit_all`.

    size: how parameters are counted, see `SIZES`.
    loss: "causal" or "trained", see comparable_runs.under.
    routings: the routings of the causal losses, each with its arms.
    no_causal_loss: runs that have none. Fits of the causal loss leave them out; fits of the loss as
      trained include them.
    """

    size: str
    loss: str
    baseline: str
    arms: tuple[str, ...]
    budgets: tuple[float, ...]
    seeds_per_cell: int
    draws: int
    parabolas: tuple[Parabola, ...]
    laws: tuple[PowerLaw, ...]
    gaps: tuple[Gap, ...]
    surfaces: tuple[Surface, ...]
    repeats: tuple[SeedSpread, ...]
    diverged: tuple[str, ...]
    routings: dict[str, tuple[str, ...]]
    no_causal_loss: tuple[NoCausalLoss, ...]

    def parabola(self, arm: str, budget_flops: float, quantity: str) -> Parabola | None:
        wanted = (arm, budget_flops, quantity)
        found = (p for p in self.parabolas if (p.arm, p.budget_flops, p.quantity) == wanted)
        return next(found, None)


def to_json(value: Any) -> Any:
    """Returns a result as plain JSON values; an infinite end of an interval becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
