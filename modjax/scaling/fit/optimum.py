"""The optimum of each arm at one budget: the minimum of a parabola of loss against log10 of size.

Each cell is weighted by its number of seeds. bootstrap.py draws the losses again, and every draw
repeats the fit. A draw whose parabola has no minimum counts in both tails of the optimum's
interval, so the interval can be unbounded.

A power law (power_law.py) weights each optimum by its inverse variance. The optimum is a ratio of
coefficients, whose own moments may be infinite; the delta method gives a finite variance. It grows
without bound as the curvature goes to 0, so a draw without a minimum has infinite variance.

Legend: J cells of one arm and budget, R bootstrap draws, 3 coefficients of a parabola.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modjax.scaling.fit.bootstrap import (
    Estimate,
    Noise,
    draw_losses,
    draw_noise,
    interval,
    noise_variance,
    power_of_ten,
)
from modjax.scaling.fit.cells import Cell, degrees_of_freedom
from modjax.scaling.fit.results import Parabola

MIN_SIZES = 4


@dataclass(frozen=True)
class Vertex:
    """Vertex of an accepted parabola: log10 of the optimal size, and the loss there.

    The variances leave out the evaluation noise, which moves the optima of all budgets together.
    """

    log_x: Estimate
    loss: Estimate


Vertices = dict[tuple[str, str], dict[float, Vertex]]  # (arm, quantity) -> budget -> vertex


@dataclass(frozen=True)
class _Solved:
    """Weighted least squares of one arm: coefficients_3 = solve_3J @ loss_J.

    centre, half: centre and half width of the sampled range of log10(x).
    place: the vertex's log10(x) less `centre`; inf for a straight line.
    squares: weighted residual sum of squares.
    """

    centre: float
    half: float
    design_J3: np.ndarray
    solve_3J: np.ndarray
    coefficients_3: np.ndarray
    place: float
    squares: float


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
    _, c1, c2 = coefficients_3.tolist()
    place = -c1 / (2 * c2) if c2 != 0 else math.inf
    squares = float((weight_J * (loss_J - design_J3 @ coefficients_3) ** 2).sum())
    return _Solved(centre, half, design_J3, solve_3J, coefficients_3, place, squares)


def fit_budget(
    cells: dict[str, list[Cell]],
    budget: float,
    quantity: str,
    shared_R: np.ndarray,
    rng: np.random.Generator,
    noise: float | None = None,
) -> list[tuple[Parabola, Vertex | None]]:
    """Returns each arm's parabola at one budget, and its vertex if accepted; all share one noise.

    shared_R: the evaluation noise of every draw, in standard errors.
    noise: standard deviation of a run's loss, in nats, in place of the estimate.
    """
    solved = {arm: _solve(of) for arm, of in cells.items() if len({c.x for c in of}) >= 3}
    if noise is None:
        variance, freedom = noise_variance(cells, sum(s.squares for s in solved.values()))
    else:
        variance, freedom = noise**2, next((f for f in degrees_of_freedom(cells) if f), 0)
    drawn = draw_noise(variance, freedom, len(shared_R), rng)
    results = []
    for arm, of_arm in cells.items():
        sizes = sorted({cell.x for cell in of_arm})
        fit = solved.get(arm)
        parabola = Parabola(
            arm=arm,
            budget_flops=budget,
            quantity=quantity,
            runs=sum(c.seeds for c in of_arm),
            sizes=len(sizes),
            low=sizes[0] if sizes else None,
            high=sizes[-1] if sizes else None,
            coefficients=tuple(fit.coefficients_3.tolist()) if fit else None,
            noise=drawn.sigma,
            refusal=_refusal(len(sizes), fit),
        )
        vertex = None
        if fit is not None and parabola.refusal is None:
            vertex = _vertex(of_arm, fit, drawn, shared_R, rng)
            parabola = dataclasses.replace(
                parabola,
                optimum=10**vertex.log_x.value,
                optimum_interval=power_of_ten(interval(vertex.log_x.value_R)),
                loss=vertex.loss.value,
                loss_interval=interval(vertex.loss.value_R),
                off_centre=fit.place / fit.half,
            )
        results.append((parabola, vertex))
    return results


def _refusal(sizes: int, solved: _Solved | None) -> str | None:
    """Returns why a parabola shows no optimum, or None."""
    if sizes < MIN_SIZES or solved is None:
        return (
            f"{sizes} finished {'size' if sizes == 1 else 'sizes'}; at least {MIN_SIZES} are "
            "needed, because a parabola passes exactly through three points and leaves no residual"
        )
    if solved.coefficients_3[2] <= 0:
        return "the fitted curve is concave: it has a maximum, not a minimum"
    beyond = abs(solved.place) - solved.half
    if beyond <= 0:
        return None
    side, end = ("below", "smallest") if solved.place < 0 else ("above", "largest")
    return (
        f"the minimum lies {side} the sampled range, {beyond:.2f} decades beyond the {end} model; "
        "add sizes there"
    )


def _vertex(
    cells: Sequence[Cell],
    solved: _Solved,
    noise: Noise,
    shared_R: np.ndarray,
    rng: np.random.Generator,
) -> Vertex:
    fitted_J = solved.design_J3 @ solved.coefficients_3
    drawn_R3 = draw_losses(fitted_J, cells, noise, shared_R, rng) @ solved.solve_3J.T
    drawn_R3[drawn_R3[:, 2] <= 0] = np.nan

    seeds_J = np.array([cell.seeds for cell in cells])
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
    """Returns position and value of the minimum of parabolas (..., 3), and variances of both.

    The variances follow from the delta method: with u = -c1 / 2 c2,
    du = -(dc1 + 2 u dc2) / 2 c2 and dL = dc0 + u dc1 + u^2 dc2.
    spread_33: the covariance of the coefficients at unit noise.
    """
    c0, c1, c2 = np.moveaxis(c_3, -1, 0)
    u = -c1 / (2 * c2)
    one = np.ones_like(u)
    slopes = np.stack([0 * one, one, 2 * u], -1) / (2 * c2)[..., None]
    powers = np.stack([one, u, u**2], -1)
    variances = (((g @ spread_33) * g).sum(-1) for g in (slopes, powers))
    return (u, c0 - c1**2 / (4 * c2), *variances)
