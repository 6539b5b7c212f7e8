"""isoFLOP fits: a parabola per arm and budget, power laws through the optima, gaps between arms.

Noise and its bootstrap are those of parabola.py: every result is computed once per draw.
Shapes: R bootstrap draws, P points of a power law.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from modjax.config import require
from modjax.records import Record
from modjax.scaling.parabola import (
    Vertex,
    fit_budget,
    interval,
    make_cells,
    most_seeds,
    power_of_ten,
    repeats,
)
from modjax.scaling.parametric import fit_surface
from modjax.scaling.results import (
    QUANTITIES,
    SIZES,
    Fits,
    Gap,
    Parabola,
    PowerLaw,
    quantity_of,
    under,
)

_Vertices = dict[tuple[str, float, str], Vertex]  # by arm, budget, quantity


def fit_all(
    records: Sequence[Record],
    *,
    size: str = "non_embedding",
    loss: str = "top_k",
    baseline: str | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Fits:
    """Every fit of a sweep. Diverged runs are left out by rule and listed.

    loss: "top_k" or "causal", see results.under.
    baseline: the arm that others are compared with; None takes "dense", or else the first arm.
    draws: bootstrap draws of every vertex; the parametric surfaces, which are slower, take 1/20.
    Raises InputError for no records, an unknown size or baseline, or runs that were not scored
    on the same validation data.
    """
    require(len(records) > 0, "records", 0, "no run has finished; run the sweep first")
    records = under(records, loss)
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
            arm: make_cells([r for r in finished if (r.variant, r.budget_flops) == (arm, budget)],
                        quantity, size)
            for arm in present
        }  # fmt: skip
        for parabola, vertex in fit_budget(cells, budget, quantity, shared_R, rng):
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
        losses = np.array([r.eval_loss for r in runs], dtype=float)
        surfaces.append(fit_surface(arm, n, d, losses, draws=draws // 20, seed=seed))
    order = {arm: i for i, arm in enumerate(arms)}
    return Fits(
        size=size,
        loss=loss,
        baseline=baseline,
        arms=tuple(arms),
        budgets=tuple(budgets),
        seeds_per_cell=most_seeds(finished),
        draws=draws,
        parabolas=tuple(sorted(parabolas, key=lambda p: (order[p.arm], p.budget_flops))),
        laws=tuple(laws),
        gaps=tuple(gaps),
        surfaces=tuple(surfaces),
        repeats=tuple(repeats(finished, size)),
        diverged=tuple(r.run_id for r in records if r.status == "diverged"),
    )


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
        ratio_interval = power_of_ten(interval(x.log_x_R - y.log_x_R))
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
