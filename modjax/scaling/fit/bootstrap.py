"""Bootstrap of the losses at one budget: a noise estimate shared by all arms, and intervals.

One parametric bootstrap gives every interval. A draw replaces the loss of each cell by its fitted
value plus two terms:

* Evaluation noise: z * eval_loss_sem, with one z per draw for all runs. Every run is scored on the
  same validation sequences, so the error of that sample moves all losses together. It widens the
  interval of a loss and nearly cancels in a gap.
* Noise between runs, of standard deviation sigma / sqrt(seeds). If cells have several seeds,
  sigma^2 is the variance between seeds. It is the variance about the parabolas of all arms at the
  budget if every cell has one seed, or if an F test at level CHANCE finds that variance larger.
  Always taking the larger of the two would be biased: its intervals cover 99%. Each draw takes
  sigma^2 from its scaled inverse chi-squared distribution, so few degrees of freedom widen the
  interval as Student's t does.

Legend: J cells of one arm and budget, R bootstrap draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modjax.scaling.fit.cells import Cell, degrees_of_freedom
from modjax.scaling.fit.results import Range

LEVEL = 0.95
# Scatter about the parabolas that chance explains less often than this is taken to be real.
CHANCE = 0.05


@dataclass(frozen=True)
class Estimate:
    """A value and its variance, as estimated and in every draw.

    A draw that does not determine the value has value NaN and variance inf.
    """

    value: float
    variance: float
    value_R: np.ndarray
    variance_R: np.ndarray


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one run's loss, in nats.

    sigma: the estimate; None if the runs do not determine it.
    sigma_R: the true value that each draw assumes.
    found_R: a simulated estimate of sigma_R, of the same degrees of freedom as sigma. It sets the
      weights of each draw.
    """

    sigma: float | None
    sigma_R: np.ndarray
    found_R: np.ndarray


def noise_variance(cells: Mapping[str, Sequence[Cell]], about: float) -> tuple[float, int]:
    """Returns the variance of one run's loss and its degrees of freedom, 0 if undetermined.

    cells: the cells of each arm.
    about: the weighted sum of squares about the parabolas of all arms.
    """
    freedom, about_freedom = degrees_of_freedom(cells)
    between = sum(c.squares for of_arm in cells.values() for c in of_arm)
    if about_freedom == 0 or (freedom > 0 and about / about_freedom <= between / freedom):
        return between / max(freedom, 1), freedom
    if freedom > 0:
        from scipy.special import fdtrc  # takes longer to import than a plan takes

        ratio = about / about_freedom / max(between / freedom, 1e-300)
        if fdtrc(about_freedom, freedom, ratio) > CHANCE:
            return between / freedom, freedom
    return about / about_freedom, about_freedom


def draw_noise(variance: float, freedom: int, draws: int, rng: np.random.Generator) -> Noise:
    """Draws the standard deviation of one run's loss; zeros if `freedom` is 0."""
    if freedom == 0:
        return Noise(None, np.zeros(draws), np.zeros(draws))
    sigma_R = np.sqrt(variance * freedom / rng.chisquare(freedom, size=draws))
    (other,) = rng.spawn(1)
    found_R = sigma_R * np.sqrt(other.chisquare(freedom, size=draws) / freedom)
    return Noise(math.sqrt(variance), sigma_R, found_R)


def draw_losses(
    fitted_J: np.ndarray,
    cells: Sequence[Cell],
    noise: Noise,
    shared_R: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws the losses of an arm's cells about their fitted values, shape (R, J).

    shared_R: the evaluation noise of every draw, in standard errors.
    """
    sem_J = np.array([cell.sem for cell in cells])
    seeds_J = np.array([cell.seeds for cell in cells])
    noise_RJ = rng.standard_normal((len(shared_R), len(cells))) * noise.sigma_R[:, None]
    return fitted_J + (noise_RJ / np.sqrt(seeds_J) + shared_R[:, None] * sem_J)


def interval(draws_R: np.ndarray) -> Range:
    """Returns the central 95% of the draws. A NaN draw is undetermined and counts in both tails."""
    missing_R = np.isnan(draws_R)
    tail = (1 - LEVEL) / 2
    low = np.quantile(np.where(missing_R, -np.inf, draws_R), tail, method="lower")
    high = np.quantile(np.where(missing_R, np.inf, draws_R), 1 - tail, method="higher")
    return float(low), float(high)


def power_of_ten(ends: Range) -> Range:
    """Returns 10 to the power of both ends; an end that would overflow becomes infinite."""
    return 10.0 ** ends[0], 10.0 ** ends[1] if ends[1] < 300 else math.inf
