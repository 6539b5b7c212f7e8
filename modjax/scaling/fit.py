"""isoFLOP fits: a parabola per arm and budget, power laws through the optima, gaps between arms.

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

Shapes: J cells of one arm and budget, R bootstrap draws, P points of a power law.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modjax.config import require
from modjax.records import Record
from modjax.scaling.parametric import fit_surface
from modjax.scaling.results import (
    QUANTITIES,
    SIZES,
    Fits,
    Gap,
    Parabola,
    PowerLaw,
    Range,
    quantity_of,
)

LEVEL = 0.95
MIN_SIZES = 4


@dataclass(frozen=True)
class _Cell:
    """One model at one budget: the mean over its seeds."""

    x: float
    loss: float
    sem: float
    seeds: int
    squares: float  # sum of squared deviations between seeds


@dataclass(frozen=True)
class _Vertex:
    """An accepted vertex and its bootstrap draws; NaN where a draw has no minimum."""

    log_x: float
    loss: float
    log_x_R: np.ndarray
    loss_R: np.ndarray


_Vertices = dict[tuple[str, float, str], _Vertex]  # by arm, budget, quantity


def fit_all(
    records: Sequence[Record],
    *,
    size: str = "non_embedding",
    baseline: str | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Fits:
    """Every fit of a sweep. Diverged runs are left out by rule and listed.

    baseline: the arm that others are compared with; None takes "dense", or else the first arm.
    draws: bootstrap draws of every vertex; the parametric surfaces, which are slower, take 1/20.
    Raises InputError for no records, an unknown size or baseline, or runs that were not scored
    on the same validation data.
    """
    require(len(records) > 0, "records", 0, "no run has finished; run the sweep first")
    require(size in SIZES, "size", size, f"must be one of {', '.join(SIZES)}")
    arms = list(dict.fromkeys(r.variant for r in records))
    baseline = baseline or ("dense" if "dense" in arms else arms[0])
    require(baseline in arms, "baseline", baseline, f"must be one of {', '.join(arms)}")
    arms.sort(key=lambda arm: arm != baseline)
    finished = [r for r in records if r.status == "finished" and r.eval_loss is not None]
    scored = {(r.data_fingerprint, r.eval_tokens) for r in finished}
    require(len(scored) <= 1, "records", sorted(scored), "runs were scored on different "
            "validation data (fingerprint, tokens); fit them apart")  # fmt: skip

    rng = np.random.default_rng(seed)
    shared_R = rng.standard_normal(draws)
    budgets = sorted({r.budget_flops for r in records})
    parabolas, vertices = [], {}
    for budget, quantity in itertools.product(budgets, QUANTITIES):
        present = [a for a in arms if any((r.variant, r.budget_flops) == (a, budget)
                                          for r in records)]  # fmt: skip
        cells = {
            arm: _cells([r for r in finished if (r.variant, r.budget_flops) == (arm, budget)],
                        quantity, size)
            for arm in present
        }  # fmt: skip
        for parabola, vertex in _fit_budget(cells, budget, quantity, shared_R, rng):
            parabolas.append(parabola)
            if vertex is not None:
                vertices[parabola.arm, budget, quantity] = vertex
    laws = [_power_law(arm, quantity, budgets, vertices)
            for arm in arms for quantity in (*QUANTITIES, "loss")]  # fmt: skip
    kept = {(p.arm, p.budget_flops): p for p in parabolas if p.quantity == "parameters"}
    gaps = [_gap(arm, baseline, budget, kept, vertices)
            for budget in budgets for arm in arms[1:] if (arm, budget) in kept]  # fmt: skip
    surfaces = []
    for arm in arms:
        runs = [r for r in finished if r.variant == arm]
        n = np.array([quantity_of(r, "parameters", size) for r in runs], dtype=float)
        d = np.array([r.tokens for r in runs], dtype=float)
        loss = np.array([r.eval_loss for r in runs], dtype=float)
        surfaces.append(fit_surface(arm, n, d, loss, draws=draws // 20, seed=seed))
    order = {arm: i for i, arm in enumerate(arms)}
    return Fits(
        size=size,
        baseline=baseline,
        arms=tuple(arms),
        budgets=tuple(budgets),
        seeds_per_cell=_most_seeds(finished),
        draws=draws,
        parabolas=tuple(sorted(parabolas, key=lambda p: (order[p.arm], p.budget_flops))),
        laws=tuple(laws),
        gaps=tuple(gaps),
        surfaces=tuple(surfaces),
        diverged=tuple(r.run_id for r in records if r.status == "diverged"),
    )


def _same_but_seed(record: Record) -> tuple[Any, ...]:
    r = record
    return (r.variant, r.budget_flops, r.d_model, r.num_layers, r.params_total,
            r.forward_flops_per_token, r.batch_size, r.steps, r.learning_rate)  # fmt: skip


def _by_cell(runs: Iterable[Record]) -> list[list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for run in runs:
        groups.setdefault(_same_but_seed(run), []).append(run)
    return list(groups.values())


def _most_seeds(runs: Iterable[Record]) -> int:
    return max((len(group) for group in _by_cell(runs)), default=0)


def _cells(runs: Iterable[Record], quantity: str, size: str) -> list[_Cell]:
    cells = []
    for group in _by_cell(runs):
        losses = np.array([r.eval_loss for r in group], dtype=float)
        sems = np.array([r.eval_loss_sem or 0.0 for r in group])
        cells.append(
            _Cell(
                x=float(quantity_of(group[0], quantity, size)),
                loss=float(losses.mean()),
                sem=float(sems.mean()),
                seeds=len(group),
                squares=float(((losses - losses.mean()) ** 2).sum()),
            )
        )
    return sorted(cells, key=lambda cell: cell.x)


@dataclass(frozen=True)
class _Solved:
    """Weighted least squares of one arm: coefficients = solve_3J @ loss_J."""

    centre: float
    half: float
    design_J3: np.ndarray
    solve_3J: np.ndarray
    coefficients_3: np.ndarray
    squares: float  # weighted residual sum of squares


def _solve(cells: Sequence[_Cell]) -> _Solved:
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


def _fit_budget(
    cells: dict[str, list[_Cell]],
    budget: float,
    quantity: str,
    shared_R: np.ndarray,
    rng: np.random.Generator,
) -> list[tuple[Parabola, _Vertex | None]]:
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
    cells: Sequence[_Cell],
    solved: _Solved | None,
    sigma_R: np.ndarray,
    shared_R: np.ndarray,
    rng: np.random.Generator,
) -> tuple[Parabola, _Vertex | None]:
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
    found = _Vertex(
        log_x=solved.centre + vertex,
        loss=c0 - c1**2 / (4 * c2),
        log_x_R=solved.centre - c1_R / (2 * c2_R),
        loss_R=c0_R - c1_R**2 / (4 * c2_R),
    )
    accepted = dataclasses.replace(
        parabola,
        optimum=10**found.log_x,
        optimum_interval=_power_of_ten(interval(found.log_x_R)),
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


def _power_of_ten(ends: Range) -> Range:
    return 10.0 ** ends[0], 10.0 ** ends[1] if ends[1] < 300 else math.inf


def _power_law(
    arm: str,
    quantity: str,
    budgets: Sequence[float],
    vertices: _Vertices,
) -> PowerLaw:
    """Least squares in log10 through one arm's accepted vertices."""
    source = "parameters" if quantity == "loss" else quantity
    found = {b: vertices[arm, b, source] for b in budgets if (arm, b, source) in vertices}
    points = len(found)
    if points < 2:
        refusal = f"a power law needs at least 2 accepted optima, and there are {points}"
        return PowerLaw(arm, quantity, points, points - 2, None, None, None, refusal)
    x_P = np.log10(list(found))
    slope_P = (x_P - x_P.mean()) / ((x_P - x_P.mean()) ** 2).sum()
    if quantity == "loss":
        y_P = np.log10([vertex.loss for vertex in found.values()])
        # A drawn loss below 0 has no logarithm: it counts as a draw without an answer.
        loss_RP = np.stack([vertex.loss_R for vertex in found.values()], -1)
        y_RP = np.log10(np.where(loss_RP > 0, loss_RP, np.nan))
    else:
        y_P = np.array([vertex.log_x for vertex in found.values()])
        y_RP = np.stack([vertex.log_x_R for vertex in found.values()], -1)
    exponent = float(y_P @ slope_P)
    return PowerLaw(
        arm=arm,
        quantity=quantity,
        points=points,
        freedom=points - 2,
        coefficient=float(10 ** (y_P.mean() - exponent * x_P.mean())),
        exponent=exponent,
        exponent_interval=interval(y_RP @ slope_P),
        refusal=None,
    )


def _gap(
    arm: str,
    baseline: str,
    budget: float,
    parabolas: dict[tuple[str, float], Parabola],
    vertices: _Vertices,
) -> Gap:
    """Loss and forward FLOPs of an arm's optimum against the baseline's at one budget."""
    refused = [name for name in (baseline, arm) if (name, budget, "parameters") not in vertices]
    reasons = [f"{name}: {parabolas[name, budget].refusal}" if (name, budget) in parabolas
               else f"{name}: no runs at this budget" for name in refused]  # fmt: skip
    if reasons:
        return Gap(arm, baseline, budget, *[None] * 6, refusal="; ".join(reasons))
    ours, theirs = (vertices[name, budget, "parameters"] for name in (arm, baseline))
    ratio = ratio_interval = None
    if all((name, budget, "forward_flops") in vertices for name in (arm, baseline)):
        x, y = (vertices[name, budget, "forward_flops"] for name in (arm, baseline))
        ratio = 10 ** (x.log_x - y.log_x)
        ratio_interval = _power_of_ten(interval(x.log_x_R - y.log_x_R))
    return Gap(
        arm=arm,
        baseline=baseline,
        budget_flops=budget,
        loss=ours.loss - theirs.loss,
        loss_interval=interval(ours.loss_R - theirs.loss_R),
        percent=100 * (ours.loss / theirs.loss - 1),
        percent_interval=interval(100 * (ours.loss_R / theirs.loss_R - 1)),
        flops_ratio=ratio,
        flops_ratio_interval=ratio_interval,
        refusal=None,
    )
