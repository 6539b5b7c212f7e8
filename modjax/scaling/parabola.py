"""Parabolas of loss against log size, of all arms at one budget, with the noise they share.

Noise. One parametric bootstrap carries everything. A draw replaces the loss of every cell by
its fitted value plus two terms:

* evaluation noise, z * eval_loss_sem with one z per draw for all runs: every run is scored on
  the same validation sequences, so the error of that sample moves all losses together (it
  widens the interval of a loss and nearly cancels in a gap);
* what differs between runs, sigma / sqrt(seeds): sigma^2 is the larger of the variance about the
  parabolas of all arms at the budget and, where cells repeat with other seeds, the variance
  between seeds. It is itself drawn from its scaled inverse chi-squared distribution, so that few
  degrees of freedom widen the interval as Student's t does.

A draw whose parabola has no minimum counts in both tails; an interval can be unbounded (inf).

Shapes: J cells of one arm and budget, R bootstrap draws.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modjax.records import Record
from modjax.scaling.results import SIZES, Parabola, Range, Repeat, quantity_of

LEVEL = 0.95
MIN_SIZES = 4


@dataclass(frozen=True)
class Cell:
    """One model at one budget: the mean over its seeds."""

    x: float
    loss: float
    sem: float
    seeds: int
    squares: float  # sum of squared deviations between seeds


@dataclass(frozen=True)
class Vertex:
    """An accepted vertex and its bootstrap draws; NaN where a draw has no minimum."""

    log_x: float
    loss: float
    log_x_R: np.ndarray
    loss_R: np.ndarray


def _same_but_seed(record: Record) -> tuple[Any, ...]:
    r = record
    return (r.variant, r.budget_flops, r.d_model, r.num_layers, r.params_total,
            r.forward_flops_per_token, r.batch_size, r.steps, r.learning_rate)  # fmt: skip


def _by_cell(runs: Iterable[Record]) -> list[list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for run in runs:
        groups.setdefault(_same_but_seed(run), []).append(run)
    return list(groups.values())


def most_seeds(runs: Iterable[Record]) -> int:
    return max((len(group) for group in _by_cell(runs)), default=0)


def make_cells(runs: Iterable[Record], quantity: str, size: str) -> list[Cell]:
    cells = []
    for group in _by_cell(runs):
        losses = np.array([r.eval_loss for r in group], dtype=float)
        sems = np.array([r.eval_loss_sem or 0.0 for r in group])
        cells.append(
            Cell(
                x=float(quantity_of(group[0], quantity, size)),
                loss=float(losses.mean()),
                sem=float(sems.mean()),
                seeds=len(group),
                squares=float(((losses - losses.mean()) ** 2).sum()),
            )
        )
    return sorted(cells, key=lambda cell: cell.x)


def repeats(runs: Iterable[Record], size: str) -> list[Repeat]:
    """Every cell that was run with several seeds, by budget and size."""
    found = []
    for group in _by_cell(runs):
        losses = [r.eval_loss for r in group if r.eval_loss is not None]
        if len(losses) > 1:
            r = group[0]
            found.append(
                Repeat(
                    arm=r.variant,
                    budget_flops=r.budget_flops,
                    d_model=r.d_model,
                    params=getattr(r, SIZES[size]),
                    seeds=len(losses),
                    loss=statistics.mean(losses),
                    deviation=statistics.stdev(losses),
                )
            )
    return sorted(found, key=lambda cell: (cell.budget_flops, cell.d_model))


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
) -> list[tuple[Parabola, Vertex | None]]:
    """The parabolas of all arms at one budget, which share their estimate of the noise."""
    solved = {arm: _solve(of) for arm, of in cells.items() if len({c.x for c in of}) >= 3}
    about = (sum(s.squares for s in solved.values()),
             sum(len(cells[arm]) - 3 for arm in solved))  # fmt: skip
    every = [cell for of in cells.values() for cell in of]
    between = (sum(c.squares for c in every), sum(c.seeds - 1 for c in every))
    estimates = [(squares / freedom, freedom) for squares, freedom in (about, between) if freedom]
    variance, freedom = max(estimates, default=(0.0, 0))
    noise = math.sqrt(variance) if freedom else None
    sigma_R = np.zeros_like(shared_R)
    if freedom:
        sigma_R = np.sqrt(variance * freedom / rng.chisquare(freedom, size=len(shared_R)))

    results = []
    for arm, of in cells.items():
        x = [cell.x for cell in of]
        parabola = Parabola(
            arm=arm, budget_flops=budget, quantity=quantity, runs=sum(c.seeds for c in of),
            sizes=len(set(x)), low=min(x, default=None), high=max(x, default=None),
            coefficients=None, noise=noise, optimum=None, optimum_interval=None, loss=None,
            loss_interval=None, off_centre=None, refusal=None,
        )  # fmt: skip
        results.append(_fit_arm(parabola, of, solved.get(arm), sigma_R, shared_R, rng))
    return results


def _fit_arm(
    parabola: Parabola,
    cells: Sequence[Cell],
    solved: _Solved | None,
    sigma_R: np.ndarray,
    shared_R: np.ndarray,
    rng: np.random.Generator,
) -> tuple[Parabola, Vertex | None]:
    sizes = f"{parabola.sizes} finished size{'s' * (parabola.sizes != 1)}"
    if solved is None:
        refusal = (f"{sizes}; a parabola with a residual needs at least "
                   f"{MIN_SIZES}")  # fmt: skip
        return dataclasses.replace(parabola, refusal=refusal), None
    c0, c1, c2 = (float(c) for c in solved.coefficients_3)
    parabola = dataclasses.replace(parabola, coefficients=(c0, c1, c2))
    vertex = -c1 / (2 * c2) if c2 != 0 else math.inf
    refusal = None
    if parabola.sizes < MIN_SIZES:
        refusal = (f"{sizes}; three points fit a parabola exactly and "
                   f"leave no residual, so at least {MIN_SIZES} are needed")  # fmt: skip
    elif c2 <= 0:
        refusal = "the fitted curve is concave: it has a maximum, not a minimum"
    elif abs(vertex) > solved.half:
        side, end = ("below", "smallest") if vertex < 0 else ("above", "largest")
        refusal = (
            f"the minimum lies {side} the sampled range, {abs(vertex) - solved.half:.2f} decades "
            f"beyond the {end} model; add sizes there"
        )
    if refusal is not None:
        return dataclasses.replace(parabola, refusal=refusal), None

    sem_J = np.array([cell.sem for cell in cells])
    seeds_J = np.array([cell.seeds for cell in cells])
    noise_RJ = rng.standard_normal((len(sigma_R), len(cells))) * sigma_R[:, None]
    noise_RJ = noise_RJ / np.sqrt(seeds_J) + shared_R[:, None] * sem_J
    loss_RJ = solved.design_J3 @ solved.coefficients_3 + noise_RJ
    drawn_R3 = loss_RJ @ solved.solve_3J.T
    c0_R, c1_R, c2_R = drawn_R3.T
    c2_R = np.where(c2_R > 0, c2_R, np.nan)
    found = Vertex(
        log_x=solved.centre + vertex,
        loss=c0 - c1**2 / (4 * c2),
        log_x_R=solved.centre - c1_R / (2 * c2_R),
        loss_R=c0_R - c1_R**2 / (4 * c2_R),
    )
    accepted = dataclasses.replace(
        parabola,
        optimum=10**found.log_x,
        optimum_interval=power_of_ten(interval(found.log_x_R)),
        loss=found.loss,
        loss_interval=interval(found.loss_R),
        off_centre=vertex / solved.half,
    )
    return accepted, found


def interval(draws_R: np.ndarray) -> Range:
    """The central 95% of bootstrap draws; NaN draws (no answer) count in both tails."""
    missing_R = np.isnan(draws_R)
    tail = (1 - LEVEL) / 2
    low = np.quantile(np.where(missing_R, -np.inf, draws_R), tail, method="lower")
    high = np.quantile(np.where(missing_R, np.inf, draws_R), 1 - tail, method="higher")
    return float(low), float(high)


def power_of_ten(ends: Range) -> Range:
    return 10.0 ** ends[0], 10.0 ** ends[1] if ends[1] < 300 else math.inf
