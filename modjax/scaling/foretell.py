"""What a planned grid can tell: the intervals that `modjax fit` would print, before any training.

Every cell gets the loss of a planted parabola whose minimum lies at the centre of its arm's grid;
the fit's own code then makes the intervals, for a noise that is stated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modjax.config import RunSpec, require
from modjax.flops import parameters
from modjax.scaling.laws import power_law
from modjax.scaling.parabola import Cell, Estimate, fit_budget, freedoms
from modjax.scaling.results import Range

# experiments/isoflop/fit.json, 2e11 to 1.8e12 FLOPs: nine parabolas of loss against log10 N with
# a median curvature of 0.48 nats per decade^2 (0.25 to 0.57), and 0.023 to 0.027 nats of noise.
CURVATURE = 0.48
NOISE = 0.025
DRAWS = 1000


@dataclass(frozen=True)
class Foretold:
    """What an arm's sizes and seeds at one budget tell of its optimum.

    noise: standard deviation of a run's loss, as stated; freedom: degrees of freedom with which
    the budget's runs estimate it. low, high: the sampled non-embedding parameters.
    optimum_interval: the expected 95% interval of the optimum, None where the fit refuses one;
    exponent_interval: that of the arm's power law over all budgets, None where there is none.
    tells: whether the interval of the optimum is narrower than the sampled range.
    """

    sizes: int
    noise: float
    freedom: int
    low: float
    high: float
    optimum_interval: Range | None
    exponent_interval: Range | None
    tells: bool


def foretell(specs: Sequence[RunSpec], noise: float = NOISE) -> dict[tuple[str, float], Foretold]:
    """By arm and budget. Raises InputError for a noise that is not greater than 0."""
    require(0 < noise < np.inf, "--noise", noise, "must be greater than 0, in nats")
    seeds: dict[float, dict[str, dict[int, int]]] = {}
    for spec in specs:
        sizes = seeds.setdefault(spec.budget_flops, {}).setdefault(spec.variant, {})
        size = parameters(spec.model)["non_embedding"]
        sizes[size] = sizes.get(size, 0) + 1
    rng = np.random.default_rng(0)
    shared_R = np.zeros(DRAWS)  # the error of the validation text moves no optimum
    optima: dict[str, dict[float, Estimate]] = {}
    fitted = []
    for budget, arms in sorted(seeds.items()):
        cells = {arm: _planted(sizes) for arm, sizes in arms.items()}
        freedom = next((f for f in freedoms(cells) if f), 0)
        for parabola, vertex in fit_budget(cells, budget, "parameters", shared_R, rng, noise):
            fitted.append((parabola, freedom))
            if vertex is not None:
                optima.setdefault(parabola.arm, {})[budget] = vertex.log_x
    exponents = {arm: power_law(arm, "parameters", of).exponent_interval
                 for arm, of in optima.items()}  # fmt: skip
    found = {}
    for p, freedom in fitted:
        ends, low, high = p.optimum_interval, float(p.low or 0), float(p.high or 0)
        tells = ends is not None and ends[1] * low < ends[0] * high
        found[p.arm, p.budget_flops] = Foretold(
            p.sizes, noise, freedom, low, high, ends, exponents.get(p.arm), tells
        )
    return found


def _planted(sizes: dict[int, int]) -> list[Cell]:
    centre = (np.log10(min(sizes)) + np.log10(max(sizes))) / 2
    return [
        Cell(float(x), float(CURVATURE * (np.log10(x) - centre) ** 2), 0.0, count, 0.0)
        for x, count in sorted(sizes.items())
    ]
