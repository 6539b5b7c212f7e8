"""isoFLOP fits: a parabola per arm and budget, power laws through the optima, gaps between arms."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from modjax.errors import require
from modjax.records import RunRecord, Scan, causal_routing, scan, warn_left_out
from modjax.scaling.fit.cells import Repeated, by_cell, make_cells, quantity_of, seed_spreads
from modjax.scaling.fit.comparable_runs import comparable, lenient_plan, under
from modjax.scaling.fit.gaps import fit_gaps
from modjax.scaling.fit.optimum import Vertices, fit_budget
from modjax.scaling.fit.parametric import fit_surface
from modjax.scaling.fit.power_law import fit_laws
from modjax.scaling.fit.results import QUANTITIES, SIZES, Fits, NoCausalLoss, Parabola, Surface


def fit_workdir(
    workdir: Path, loss: str = "causal", size: str = "non_embedding"
) -> tuple[Scan, Fits]:
    """Returns the comparable runs of a sweep's folder and their fits. Warns of runs left out.

    loss: "causal" or "trained", see comparable_runs.under.
    size: see results.SIZES.
    The baseline is the plan's, or the default of `fit_all` if none of its runs can be compared.
    Raises InputError if no readable run has finished or diverged, or none has this loss.
    """
    found = scan(workdir)
    accepted = "holds no finished run; `modjax sweep` makes them"
    if found.left_out:
        accepted += f"; left out: {next(iter(found.left_out.values()))}"
    require(len(found.records) > 0, "--workdir", str(workdir), accepted)
    records, apart = comparable(found.records)
    found = Scan(records, found.left_out | apart)
    warn_left_out(found.left_out)
    config = lenient_plan(workdir).get("config")
    sweep = config.get("sweep") if isinstance(config, dict) else None
    planned = sweep.get("baseline") if isinstance(sweep, dict) else None
    compared = under(records, loss).records
    baseline = planned if any(r.variant == planned for r in compared) else None
    return found, fit_all(records, size=size, loss=loss, baseline=baseline)


def fit_all(
    records: Sequence[RunRecord],
    *,
    size: str = "non_embedding",
    loss: str = "causal",
    baseline: str | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Fits:
    """Returns every fit of a sweep. Diverged runs are left out and listed.

    loss: "causal" or "trained", see comparable_runs.under. Runs without a causal loss are left out
      one by one and listed; an arm is compared by its other runs.
    baseline: the arm that others are compared with. None takes "dense", or else the first arm.
    draws: bootstrap draws of every vertex. The slower parametric surfaces take a twentieth.
    Raises InputError for no records, no record with this loss, an unknown size or baseline, and
    runs that were scored on different validation data.
    """
    require(len(records) > 0, "records", 0, "no run has finished; run the sweep first")
    whole = [r for r in records if r.status == "finished"]
    records, without = under(records, loss)
    require(size in SIZES, "size", size, f"must be one of {', '.join(SIZES)}")
    arms = _arms(records, baseline)
    budgets = sorted({r.budget_flops for r in records})
    finished = _scored_alike(records)
    cells = by_cell(finished)
    unfinished: dict[tuple[str, float], list[Repeated]]
    unfinished = {(r.variant, r.budget_flops): [] for r in records}
    parabolas, vertices = _fit_optima(arms, budgets, unfinished | cells, size, draws, seed)
    repeated = [runs for of_arm in cells.values() for runs in of_arm]
    return Fits(
        size=size,
        loss=loss,
        baseline=arms[0],
        arms=tuple(arms),
        budgets=tuple(budgets),
        seeds_per_cell=max(map(len, repeated), default=0),
        draws=draws,
        parabolas=tuple(sorted(parabolas, key=lambda p: (arms.index(p.arm), p.budget_flops))),
        laws=tuple(fit_laws(arms, vertices)),
        gaps=tuple(fit_gaps(arms, budgets, parabolas, vertices)),
        surfaces=tuple(_surface(arm, finished, size, draws // 20, seed) for arm in arms),
        repeats=tuple(seed_spreads(repeated, size)),
        diverged=tuple(r.run_id for r in records if r.status == "diverged"),
        routings=_routings(finished),
        no_causal_loss=tuple(_no_causal_loss(whole, without, size)),
    )


def _arms(records: Sequence[RunRecord], baseline: str | None) -> list[str]:
    """Returns the arms, the baseline first."""
    arms = list(dict.fromkeys(r.variant for r in records))
    baseline = baseline or ("dense" if "dense" in arms else arms[0])
    require(baseline in arms, "baseline", baseline, f"must be one of {', '.join(arms)}")
    return sorted(arms, key=lambda arm: arm != baseline)


def _scored_alike(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns the finished runs. Raises InputError if their validation data differ."""
    finished = [r for r in records if r.status == "finished" and r.eval_loss is not None]
    scored = sorted({(r.data_fingerprint, r.eval_tokens) for r in finished})
    accepted = "runs were scored on different validation data (fingerprint, tokens); fit them apart"
    require(len(scored) <= 1, "records", scored, accepted)
    return finished


def _fit_optima(
    arms: Sequence[str],
    budgets: Sequence[float],
    cells: Mapping[tuple[str, float], list[Repeated]],
    size: str,
    draws: int,
    seed: int,
) -> tuple[list[Parabola], Vertices]:
    """Returns the parabolas of all planned arms and budgets, and the vertices of those accepted.

    All draws share one evaluation noise, so it cancels between arms and between budgets.
    """
    rng = np.random.default_rng(seed)
    shared_R = rng.standard_normal(draws)
    parabolas: list[Parabola] = []
    vertices: Vertices = {key: {} for key in itertools.product(arms, QUANTITIES)}
    for budget, quantity in itertools.product(budgets, QUANTITIES):
        of_arms = {
            arm: make_cells(cells[arm, budget], quantity, size)
            for arm in arms
            if (arm, budget) in cells
        }
        for parabola, vertex in fit_budget(of_arms, budget, quantity, shared_R, rng):
            parabolas.append(parabola)
            if vertex is not None:
                vertices[parabola.arm, quantity][budget] = vertex
    return parabolas, vertices


def _surface(arm: str, finished: Sequence[RunRecord], size: str, draws: int, seed: int) -> Surface:
    runs = [r for r in finished if r.variant == arm]
    n_M = np.array([quantity_of(r, "parameters", size) for r in runs], dtype=float)
    d_M = np.array([r.tokens for r in runs], dtype=float)
    loss_M = np.array([r.eval_loss for r in runs], dtype=float)
    return fit_surface(arm, n_M, d_M, loss_M, draws=draws, seed=seed)


def _routings(finished: Sequence[RunRecord]) -> dict[str, tuple[str, ...]]:
    """Returns routing -> the arms whose causal loss was taken under it; "trained" comes first."""
    found: dict[str, list[str]] = {"trained": []}
    for routing, arm in dict.fromkeys((causal_routing(r), r.variant) for r in finished):
        if routing is not None:
            found.setdefault(routing, []).append(arm)
    return {routing: tuple(arms) for routing, arms in found.items() if arms}


def _no_causal_loss(
    finished: Sequence[RunRecord], without: Sequence[RunRecord], size: str
) -> Iterator[NoCausalLoss]:
    """Yields one result for each arm that has runs without a causal loss."""
    for arm in dict.fromkeys(r.variant for r in without):
        runs = [r for r in without if r.variant == arm]
        why = "their layers look ahead and have learned no routing that does not"
        if any(r.causal_routing is None for r in runs):
            why = "an earlier modjax wrote their records and recorded none"
        cells = [cell for of_arm in by_cell(runs).values() for cell in of_arm]
        total = sum(r.variant == arm for r in finished)
        yield NoCausalLoss(arm, len(runs), total, why, tuple(seed_spreads(cells, size, least=1)))
