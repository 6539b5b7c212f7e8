"""isoFLOP fits: a parabola per arm and budget, power laws through the optima, gaps between arms.

Noise and its bootstrap are those of parabola.py: every result is computed once per draw. Power
laws weigh each optimum by its own variance, see power_law.py.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from modjax.errors import require
from modjax.records import RunRecord, causal_routing
from modjax.scaling.fit.cells import by_cell, make_cells, repeats
from modjax.scaling.fit.parabola import Vertex, fit_budget, interval, power_of_ten
from modjax.scaling.fit.parametric import fit_surface
from modjax.scaling.fit.power_law import log10_of, power_law
from modjax.scaling.fit.results import (
    QUANTITIES,
    SIZES,
    Fits,
    Gap,
    NoCausalLoss,
    Parabola,
    PowerLaw,
    quantity_of,
    under,
)

Vertices = dict[tuple[str, float, str], Vertex]  # by arm, budget, quantity


def fit_all(
    records: Sequence[RunRecord],
    *,
    size: str = "non_embedding",
    loss: str = "causal",
    baseline: str | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Fits:
    """Returns every fit of a sweep. Diverged runs are left out by rule and listed.

    loss: "causal" or "trained", see results.under. Runs that have no causal loss are left out run
      by run and listed: an arm is compared by those of its runs that have one.
    baseline: the arm that others are compared with; None takes "dense", or else the first arm.
    draws: bootstrap draws of every vertex; the parametric surfaces, which are slower, take 1/20.
    Raises InputError for no records, or none with this loss, an unknown size or baseline, or runs
    that were not scored on the same validation data.
    """
    require(len(records) > 0, "records", 0, "no run has finished; run the sweep first")
    whole = [r for r in records if r.status == "finished"]
    records, without = under(records, loss)
    require(size in SIZES, "size", size, f"must be one of {', '.join(SIZES)}")
    arms = list(dict.fromkeys(r.variant for r in records))
    baseline = baseline or ("dense" if "dense" in arms else arms[0])
    require(baseline in arms, "baseline", baseline, f"must be one of {', '.join(arms)}")
    arms.sort(key=lambda arm: arm != baseline)
    finished = [r for r in records if r.status == "finished" and r.eval_loss is not None]
    scored = {(r.data_fingerprint, r.eval_tokens) for r in finished}
    require(
        len(scored) <= 1,
        "records",
        sorted(scored),
        "runs were scored on different validation data (fingerprint, tokens); fit them apart",
    )

    rng = np.random.default_rng(seed)
    shared_R = rng.standard_normal(draws)
    budgets = sorted({r.budget_flops for r in records})
    planned = {(r.variant, r.budget_flops) for r in records}
    cells = by_cell(finished)
    parabolas: list[Parabola] = []
    vertices: Vertices = {}
    for budget, quantity in itertools.product(budgets, QUANTITIES):
        of_arms = {
            arm: make_cells(cells.get((arm, budget), []), quantity, size)
            for arm in arms
            if (arm, budget) in planned
        }
        for parabola, vertex in fit_budget(of_arms, budget, quantity, shared_R, rng):
            parabolas.append(parabola)
            if vertex is not None:
                vertices[parabola.arm, budget, quantity] = vertex
    kept = {(p.arm, p.budget_flops): p for p in parabolas if p.quantity == "parameters"}
    gaps = [
        _gap(arm, baseline, budget, kept, vertices)
        for budget in budgets
        for arm in arms[1:]
        if (arm, budget) in kept
    ]
    surfaces = []
    for arm in arms:
        runs = [r for r in finished if r.variant == arm]
        n = np.array([quantity_of(r, "parameters", size) for r in runs], dtype=float)
        d = np.array([r.tokens for r in runs], dtype=float)
        losses = np.array([r.eval_loss for r in runs], dtype=float)
        surfaces.append(fit_surface(arm, n, d, losses, draws=draws // 20, seed=seed))
    order = {arm: i for i, arm in enumerate(arms)}
    repeated = [runs for of_arm in cells.values() for runs in of_arm]
    return Fits(
        size=size,
        loss=loss,
        baseline=baseline,
        arms=tuple(arms),
        budgets=tuple(budgets),
        seeds_per_cell=max(map(len, repeated), default=0),
        draws=draws,
        parabolas=tuple(sorted(parabolas, key=lambda p: (order[p.arm], p.budget_flops))),
        laws=tuple(power_laws(arms, budgets, vertices)),
        gaps=tuple(gaps),
        surfaces=tuple(surfaces),
        repeats=tuple(repeats(repeated, size)),
        diverged=tuple(r.run_id for r in records if r.status == "diverged"),
        routings=_routings(finished),
        no_causal_loss=tuple(_no_causal_loss(whole, without, size)),
    )


def _routings(finished: Sequence[RunRecord]) -> dict[str, tuple[str, ...]]:
    """Returns the arms whose causal loss was taken under each routing, those as trained first."""
    found: dict[str, list[str]] = {"trained": []}
    for routing, arm in dict.fromkeys((causal_routing(r), r.variant) for r in finished):
        if routing is not None:
            found.setdefault(routing, []).append(arm)
    return {routing: tuple(arms) for routing, arms in found.items() if arms}


def _no_causal_loss(
    finished: Sequence[RunRecord], without: Sequence[RunRecord], size: str
) -> Iterator[NoCausalLoss]:
    """Yields, for each arm that has runs without a causal loss, how many, why, and their losses."""
    for arm in dict.fromkeys(r.variant for r in without):
        runs = [r for r in without if r.variant == arm]
        why = "their layers look ahead and have learned no way that does not"
        if any(r.causal_routing is None for r in runs):
            why = "records of an earlier modjax do not tell one"
        cells = [cell for of_arm in by_cell(runs).values() for cell in of_arm]
        total = sum(r.variant == arm for r in finished)
        yield NoCausalLoss(arm, len(runs), total, why, tuple(repeats(cells, size, seeds=1)))


def power_laws(arms: Sequence[str], budgets: Sequence[float], vertices: Vertices) -> list[PowerLaw]:
    """Every arm's laws of parameters, forward FLOPs and loss through its accepted optima."""
    laws = []
    for arm in arms:
        for quantity in QUANTITIES:
            found = {
                b: vertices[arm, b, quantity] for b in budgets if (arm, b, quantity) in vertices
            }
            laws.append(power_law(arm, quantity, {b: v.log_x for b, v in found.items()}))
        found = {
            b: vertices[arm, b, "parameters"] for b in budgets if (arm, b, "parameters") in vertices
        }
        laws.append(power_law(arm, "loss", {b: log10_of(v.loss) for b, v in found.items()}))
    return laws


def _gap(
    arm: str,
    baseline: str,
    budget: float,
    parabolas: dict[tuple[str, float], Parabola],
    vertices: Vertices,
) -> Gap:
    """Loss and forward FLOPs of an arm's optimum against the baseline's at one budget."""
    refused = [name for name in (baseline, arm) if (name, budget, "parameters") not in vertices]
    reasons = [
        f"{name}: {parabolas[name, budget].refusal}"
        if (name, budget) in parabolas
        else f"{name}: no runs at this budget"
        for name in refused
    ]
    if reasons:
        return Gap(arm, baseline, budget, *[None] * 6, refusal="; ".join(reasons))
    ours, theirs = (vertices[name, budget, "parameters"].loss for name in (arm, baseline))
    ratio = ratio_interval = None
    if all((name, budget, "forward_flops") in vertices for name in (arm, baseline)):
        x, y = (vertices[name, budget, "forward_flops"] for name in (arm, baseline))
        ratio = 10 ** (x.log_x.value - y.log_x.value)
        ratio_interval = power_of_ten(interval(x.log_x.value_R - y.log_x.value_R))
    return Gap(
        arm=arm,
        baseline=baseline,
        budget_flops=budget,
        loss=ours.value - theirs.value,
        loss_interval=interval(ours.value_R - theirs.value_R),
        percent=100 * (ours.value / theirs.value - 1),
        percent_interval=interval(100 * (ours.value_R / theirs.value_R - 1)),
        flops_ratio=ratio,
        flops_ratio_interval=ratio_interval,
        refusal=None,
    )
