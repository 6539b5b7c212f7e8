"""Parabolas of loss against log size, of all arms at one budget, with the noise they share.

Noise. One parametric bootstrap carries everything. A draw replaces the loss of every cell by
its fitted value plus two terms:

* evaluation noise, z * eval_loss_sem with one z per draw for all runs: every run is scored on
  the same validation sequences, so the error of that sample moves all losses together (it
  widens the interval of a loss and nearly cancels in a gap);
* what differs between runs, sigma / sqrt(seeds): sigma^2 is the variance about the parabolas of
  all arms at the budget. Where cells repeat with other seeds it is the variance between seeds,
  unless that about the parabolas is larger than an F test at CHANCE allows (the larger of the
  two whatever they are would be biased: its intervals cover 99%). It is itself drawn from its
  scaled inverse chi-squared distribution, so that few degrees of freedom widen the interval as
  Student's t does.

In the interval of an optimum a draw whose parabola has no minimum counts in both tails; the
interval can be unbounded (inf). power_law.py weighs every optimum by its variance, which
is that of the delta method for a ratio: finite where the ratio's own moments are not, growing
without bound as the curvature goes to 0, so that a draw without a minimum is the limit of one that
says nothing.

Shapes: J cells of one arm and budget, R bootstrap draws, 3 coefficients of a parabola.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modjax.scaling.fit.cells import Cell, freedoms
from modjax.scaling.fit.results import Parabola, Range

LEVEL = 0.95
MIN_SIZES = 4
# Scatter about the parabolas that chance brings about less often than this is taken to be real.
CHANCE = 0.05


@dataclass(frozen=True)
class Estimate:
    """A value and its variance, as found and in every draw: NaN and inf where a draw has none."""

    value: float
    variance: float
    value_R: np.ndarray
    variance_R: np.ndarray


@dataclass(frozen=True)
class Vertex:
    """An accepted vertex: log10 of the size, and the loss there.

    The variances leave out the evaluation noise, which moves the optima of all budgets together.
    """

    log_x: Estimate
    loss: Estimate


@dataclass(frozen=True)
class Noise:
    """The standard deviation of one run's loss, None where nothing tells it, and in every draw.

    found_R: what a draw would find it to be, from as many degrees of freedom.
    """

    sigma: float | None
    sigma_R: np.ndarray
    found_R: np.ndarray


@dataclass(frozen=True)
class _Solved:
    """Weighted least squares of one arm: coefficients = solve_3J @ loss_J."""

    centre: float
    half: float
    design_J3: np.ndarray
    solve_3J: np.ndarray
    coefficients_3: np.ndarray
    squares: float  # weighted residual sum of squares


def _solve(cells: Sequence[Cell]) -> _Solved:
    log_x_J = np.log10([cell.x for cell in cells])
    loss_J = np.array([cell.loss for cell in cells])
    weight_J = np.array([cell.seeds for cell in cells], dtype=float)
    centre = float(log_x_J.min() + log_x_J.max()) / 2
    half = float(log_x_J.max() - log_x_J.min()) / 2
    design_J3 = np.vander(log_x_J - centre, 3, increasing=True)
    root_J = np.sqrt(weight_J)
    solve_3J = np.linalg.pinv(design_J3 * root_J[:, None]) * root_J
    coefficients_3 = solve_3J @ loss_J
    squares = float((weight_J * (loss_J - design_J3 @ coefficients_3) ** 2).sum())
    return _Solved(centre, half, design_J3, solve_3J, coefficients_3, squares)


def fit_budget(
    cells: dict[str, list[Cell]],
    budget: float,
    quantity: str,
    shared_R: np.ndarray,
    rng: np.random.Generator,
    noise: float | None = None,
) -> list[tuple[Parabola, Vertex | None]]:
    """The parabolas of all arms at one budget, which share their estimate of the noise.

    noise: the standard deviation of a run's loss, in nats, to be taken for what the runs show.
    """
    solved = {arm: _solve(of) for arm, of in cells.items() if len({c.x for c in of}) >= 3}
    if noise is None:
        variance, freedom = _variance(cells, solved)
    else:
        variance, freedom = noise**2, next((f for f in freedoms(cells) if f), 0)
    shared_noise = _draw_noise(variance, freedom, len(shared_R), rng)
    results = []
    for arm, of in cells.items():
        x = [cell.x for cell in of]
        parabola = Parabola(
            arm=arm,
            budget_flops=budget,
            quantity=quantity,
            runs=sum(c.seeds for c in of),
            sizes=len(set(x)),
            low=min(x, default=None),
            high=max(x, default=None),
            coefficients=None,
            noise=shared_noise.sigma,
            optimum=None,
            optimum_interval=None,
            loss=None,
            loss_interval=None,
            off_centre=None,
            refusal=None,
        )
        results.append(_fit_arm(parabola, of, solved.get(arm), shared_noise, shared_R, rng))
    return results


def _variance(cells: dict[str, list[Cell]], solved: dict[str, _Solved]) -> tuple[float, int]:
    """The variance of one run's loss and its degrees of freedom, 0 where nothing tells it."""
    freedom, about_freedom = freedoms(cells)
    about = sum(s.squares for s in solved.values())
    between = sum(c.squares for of in cells.values() for c in of)
    if about_freedom == 0 or (freedom > 0 and about / about_freedom <= between / freedom):
        return between / max(freedom, 1), freedom
    if freedom > 0:
        from scipy.special import fdtrc  # takes longer to import than a plan takes

        ratio = about / about_freedom / max(between / freedom, 1e-300)
        if fdtrc(about_freedom, freedom, ratio) > CHANCE:
            return between / freedom, freedom
    return about / about_freedom, about_freedom


def _draw_noise(variance: float, freedom: int, draws: int, rng: np.random.Generator) -> Noise:
    if freedom == 0:
        return Noise(None, np.zeros(draws), np.zeros(draws))
    sigma_R = np.sqrt(variance * freedom / rng.chisquare(freedom, size=draws))
    (other,) = rng.spawn(1)
    found_R = sigma_R * np.sqrt(other.chisquare(freedom, size=draws) / freedom)
    return Noise(math.sqrt(variance), sigma_R, found_R)


def _fit_arm(
    parabola: Parabola,
    cells: Sequence[Cell],
    solved: _Solved | None,
    noise: Noise,
    shared_R: np.ndarray,
    rng: np.random.Generator,
) -> tuple[Parabola, Vertex | None]:
    sizes = f"{parabola.sizes} finished size{'s' * (parabola.sizes != 1)}"
    if solved is None:
        refusal = f"{sizes}; a parabola with a residual needs at least {MIN_SIZES}"
        return dataclasses.replace(parabola, refusal=refusal), None
    c0, c1, c2 = (float(c) for c in solved.coefficients_3)
    parabola = dataclasses.replace(parabola, coefficients=(c0, c1, c2))
    place = -c1 / (2 * c2) if c2 != 0 else math.inf
    refusal = None
    if parabola.sizes < MIN_SIZES:
        refusal = (
            f"{sizes}; three points fit a parabola exactly and "
            f"leave no residual, so at least {MIN_SIZES} are needed"
        )
    elif c2 <= 0:
        refusal = "the fitted curve is concave: it has a maximum, not a minimum"
    elif abs(place) > solved.half:
        side, end = ("below", "smallest") if place < 0 else ("above", "largest")
        refusal = (
            f"the minimum lies {side} the sampled range, {abs(place) - solved.half:.2f} decades "
            f"beyond the {end} model; add sizes there"
        )
    if refusal is not None:
        return dataclasses.replace(parabola, refusal=refusal), None

    vertex = _vertex(cells, solved, noise, shared_R, rng)
    accepted = dataclasses.replace(
        parabola,
        optimum=10**vertex.log_x.value,
        optimum_interval=power_of_ten(interval(vertex.log_x.value_R)),
        loss=vertex.loss.value,
        loss_interval=interval(vertex.loss.value_R),
        off_centre=place / solved.half,
    )
    return accepted, vertex


def _vertex(
    cells: Sequence[Cell],
    solved: _Solved,
    noise: Noise,
    shared_R: np.ndarray,
    rng: np.random.Generator,
) -> Vertex:
    sem_J = np.array([cell.sem for cell in cells])
    seeds_J = np.array([cell.seeds for cell in cells])
    noise_RJ = rng.standard_normal((len(shared_R), len(cells))) * noise.sigma_R[:, None]
    noise_RJ = noise_RJ / np.sqrt(seeds_J) + shared_R[:, None] * sem_J
    loss_RJ = solved.design_J3 @ solved.coefficients_3 + noise_RJ
    drawn_R3 = loss_RJ @ solved.solve_3J.T
    drawn_R3[drawn_R3[:, 2] <= 0] = np.nan

    spread_33 = (solved.solve_3J / seeds_J) @ solved.solve_3J.T
    place, loss, *variances = _minimum(solved.coefficients_3, spread_33)
    place_R, loss_R, *variances_R = _minimum(drawn_R3, spread_33)
    place_variance, loss_variance = ((noise.sigma or 0.0) ** 2 * float(v) for v in variances)
    place_variance_R, loss_variance_R = (
        np.where(np.isnan(v_R), np.inf, noise.found_R**2 * v_R) for v_R in variances_R
    )
    log_x = solved.centre + float(place)
    return Vertex(
        Estimate(log_x, place_variance, solved.centre + place_R, place_variance_R),
        Estimate(float(loss), loss_variance, loss_R, loss_variance_R),
    )


def _minimum(c_3: np.ndarray, spread_33: np.ndarray) -> tuple[np.ndarray, ...]:
    """Place and value of the minimum of parabolas (..., 3), and the variances of both.

    By the delta method: with u = -c1 / 2 c2, du = -(dc1 + 2 u dc2) / 2 c2 and
    dL = dc0 + u dc1 + u^2 dc2. spread_33: the covariance of the coefficients at unit noise.
    """
    c0, c1, c2 = np.moveaxis(c_3, -1, 0)
    u = -c1 / (2 * c2)
    one = np.ones_like(u)
    slopes = np.stack([0 * one, one, 2 * u], -1) / (2 * c2)[..., None]
    powers = np.stack([one, u, u**2], -1)
    variances = (((g @ spread_33) * g).sum(-1) for g in (slopes, powers))
    return (u, c0 - c1**2 / (4 * c2), *variances)


def interval(draws_R: np.ndarray) -> Range:
    """The central 95% of bootstrap draws; NaN draws (no answer) count in both tails."""
    missing_R = np.isnan(draws_R)
    tail = (1 - LEVEL) / 2
    low = np.quantile(np.where(missing_R, -np.inf, draws_R), tail, method="lower")
    high = np.quantile(np.where(missing_R, np.inf, draws_R), 1 - tail, method="higher")
    return float(low), float(high)


def power_of_ten(ends: Range) -> Range:
    return 10.0 ** ends[0], 10.0 ** ends[1] if ends[1] < 300 else math.inf
