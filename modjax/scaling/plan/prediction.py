"""What a planned grid can tell: the intervals that `modjax fit` would print, before any training.

Every run gets the loss of a planted parabola whose minimum lies at the centre of its arm's grid, on
the power law through these centres; the fit's own code makes the intervals, for a stated noise.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from modjax.errors import require
from modjax.scaling.fit.bootstrap import Estimate
from modjax.scaling.fit.cells import Cell, freedoms
from modjax.scaling.fit.optimum import fit_budget
from modjax.scaling.fit.power_law import power_law
from modjax.scaling.fit.results import Range

# The medians in experiments/isoflop/fit.json (loss against log10 N, 2e11 to 1.8e12 FLOPs) of nine
# curvatures, 0.25 to 0.57 nats per decade^2, and of the noise of three budgets, 0.023 to 0.027.
CURVATURE = 0.48
NOISE = 0.023
DRAWS = 2000


@dataclass(frozen=True)
class Foretold:
    """What an arm's sizes and seeds at one budget can tell of its optimum.

    sizes: how many. noise: standard deviation of a run's loss, as stated; freedom: degrees of
    freedom with which the runs of the budget will tell it. low, high: sampled non-embedding
    parameters. optimum_interval: the expected 95% interval, None where a fit refuses an optimum;
    exponent_interval: that of the arm's power law over all budgets, None where there is none.
    """

    sizes: int
    noise: float
    freedom: int
    low: float
    high: float
    optimum_interval: Range | None
    exponent_interval: Range | None

    @property
    def tells(self) -> bool:
        """Whether the optimum is expected within less than the sampled range."""
        ends = self.optimum_interval
        return ends is not None and ends[1] * self.low < ends[0] * self.high


def foretell(
    runs: Iterable[tuple[str, float, int]], noise: float = NOISE
) -> dict[tuple[str, float], Foretold]:
    """By arm and budget. runs: arm, budget and non-embedding parameters of every run.

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
        cells = {arm: _planted(of, centres[arm, budget]) for arm, of in of_arms.items()}
        freedom = next((f for f in freedoms(cells) if f), 0)
        for parabola, vertex in fit_budget(cells, budget, "parameters", shared_R, rng, noise):
            fitted.append((parabola, freedom))
            if vertex is not None:
                optima.setdefault(parabola.arm, {})[budget] = vertex.log_x
    exponents = {
        arm: power_law(arm, "parameters", of).exponent_interval for arm, of in optima.items()
    }
    return {
        (p.arm, p.budget_flops): Foretold(
            p.sizes,
            noise,
            freedom,
            p.low or 0.0,
            p.high or 0.0,
            p.optimum_interval,
            exponents.get(p.arm),
        )
        for p, freedom in fitted
    }


def _centres(sizes: dict[float, dict[str, Counter[int]]]) -> dict[tuple[str, float], float]:
    """log10 of every grid's middle, moved to the line through all those of its arm."""
    found = {}
    for arm in {arm for of_arms in sizes.values() for arm in of_arms}:
        budgets = sorted(budget for budget, of_arms in sizes.items() if arm in of_arms)
        middles = [np.log10([min(sizes[b][arm]), max(sizes[b][arm])]).mean() for b in budgets]
        line = np.polyfit(np.log10(budgets), middles, min(1, len(budgets) - 1))
        found |= {(arm, b): float(np.polyval(line, np.log10(b))) for b in budgets}
    return found


def _planted(sizes: Counter[int], centre: float) -> list[Cell]:
    return [
        Cell(float(x), float(CURVATURE * (np.log10(x) - centre) ** 2), 0.0, count, 0.0)
        for x, count in sorted(sizes.items())
    ]
