"""Predicted confidence intervals of a planned grid: those that `modjax fit` would print.

Every run gets the loss of an assumed parabola, and the code of the fit computes the intervals for a
given noise. Each parabola's minimum lies on the power law through the centres of the arm's grids.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from modjax.errors import require
from modjax.scaling.fit.bootstrap import Estimate
from modjax.scaling.fit.cells import Cell, degrees_of_freedom
from modjax.scaling.fit.optimum import fit_budget
from modjax.scaling.fit.power_law import power_law
from modjax.scaling.fit.results import Range

# The medians in experiments/isoflop/fit.json (loss against log10 N, 2e11 to 1.8e12 FLOPs) of nine
# curvatures, 0.25 to 0.57 nats per decade^2, and of the noise of three budgets, 0.023 to 0.027.
CURVATURE = 0.48
NOISE = 0.023
DRAWS = 2000


@dataclass(frozen=True)
class Prediction:
    """Predicted intervals of an arm at one budget.

    sizes: the number of sizes.
    noise: the assumed standard deviation of a run's loss, in nats.
    freedom: degrees of freedom with which the budget's runs estimate the noise.
    low, high: the smallest and the largest size, in non-embedding parameters.
    optimum_interval: the expected 95% interval of the optimum, or None if the fit refuses it.
    exponent_interval: the same for the exponent of the arm's power law over all budgets, or None
      if there is no power law.
    """

    sizes: int
    noise: float
    freedom: int
    low: float
    high: float
    optimum_interval: Range | None
    exponent_interval: Range | None

    @property
    def resolves(self) -> bool:
        """True if the interval of the optimum is narrower than the sampled range."""
        ends = self.optimum_interval
        return ends is not None and ends[1] * self.low < ends[0] * self.high


def predict(
    runs: Iterable[tuple[str, float, int]], noise: float = NOISE
) -> dict[tuple[str, float], Prediction]:
    """Returns the prediction of every (arm, budget).

    runs: arm, budget and non-embedding parameters of every run.
    Raises InputError for a noise that is not greater than 0.
    """
    require(0 < noise < np.inf, "--noise", noise, "must be greater than 0, in nats")
    sizes: dict[float, dict[str, Counter[int]]] = {}
    for arm, budget, size in runs:
        sizes.setdefault(budget, {}).setdefault(arm, Counter())[size] += 1
    centres = _centres(sizes)
    rng = np.random.default_rng(0)
    shared_R = np.zeros(DRAWS)  # the error of the validation text moves no optimum
    optima: dict[str, dict[float, Estimate]] = {}
    fitted = []
    for budget, of_arms in sorted(sizes.items()):
        cells = {arm: _assumed(counts, centres[arm, budget]) for arm, counts in of_arms.items()}
        freedom = next((f for f in degrees_of_freedom(cells) if f), 0)
        for parabola, vertex in fit_budget(cells, budget, "parameters", shared_R, rng, noise):
            fitted.append((parabola, freedom))
            if vertex is not None:
                optima.setdefault(parabola.arm, {})[budget] = vertex.log_x
    exponents = {
        arm: power_law(arm, "parameters", of).exponent_interval for arm, of in optima.items()
    }
    predictions = {}
    for p, freedom in fitted:
        low, high, exponent = p.low or 0.0, p.high or 0.0, exponents.get(p.arm)
        found = Prediction(p.sizes, noise, freedom, low, high, p.optimum_interval, exponent)
        predictions[p.arm, p.budget_flops] = found
    return predictions


def _centres(sizes: dict[float, dict[str, Counter[int]]]) -> dict[tuple[str, float], float]:
    """Returns log10 of each grid's centre, moved to the line through the centres of its arm."""
    found = {}
    for arm in {arm for of_arms in sizes.values() for arm in of_arms}:
        budgets = sorted(budget for budget, of_arms in sizes.items() if arm in of_arms)
        middles = [np.log10([min(sizes[b][arm]), max(sizes[b][arm])]).mean() for b in budgets]
        line = np.polyfit(np.log10(budgets), middles, min(1, len(budgets) - 1))
        found |= {(arm, b): float(np.polyval(line, np.log10(b))) for b in budgets}
    return found


def _assumed(sizes: Counter[int], centre: float) -> list[Cell]:
    """Returns the cells of one arm and budget, on the assumed parabola."""
    return [
        Cell(float(x), float(CURVATURE * (np.log10(x) - centre) ** 2), 0.0, count, 0.0)
        for x, count in sorted(sizes.items())
    ]
