"""Finished runs as the fits take them: cells of runs that differ in their seed only."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modjax.records import RunRecord
from modjax.scaling.fit.results import SIZES, SeedSpread, quantity_of

Repeated = list[RunRecord]  # runs that differ in their seed only


@dataclass(frozen=True)
class Cell:
    """One model at one budget: the mean over its seeds."""

    x: float
    loss: float
    sem: float
    seeds: int
    squares: float  # sum of squared deviations between seeds


def comparable(records: Sequence[RunRecord]) -> tuple[list[RunRecord], dict[str, str]]:
    """Sets aside the runs that were scored on other validation data than most finished runs.

    Returns the other records, and run id -> how a run that is set aside differs. Keeps all where
    no data scored more than half of the runs.
    """
    finished = (r for r in records if r.eval_loss is not None)
    scored = {r.run_id: (r.data_fingerprint, r.eval_tokens) for r in finished}
    counts = Counter(scored.values())
    most = next((on for on, runs in counts.items() if 2 * runs > len(scored)), None)
    apart = {
        run_id: f"{run_id} was scored on {on[1]} tokens of data {on[0]}, and {counts[most]} other "
        f"runs on {most[1]} tokens of {most[0]}"
        for run_id, on in scored.items()
        if most is not None and on != most
    }
    return [r for r in records if r.run_id not in apart], apart


def by_cell(runs: Iterable[RunRecord]) -> dict[tuple[str, float], list[Repeated]]:
    """The cells of every arm and budget."""
    cells: dict[tuple[Any, ...], Repeated] = {}
    for r in runs:
        same = (
            r.variant,
            r.budget_flops,
            r.d_model,
            r.num_layers,
            r.params_total,
            r.forward_flops_per_token,
            r.batch_size,
            r.steps,
            r.learning_rate,
        )
        cells.setdefault(same, []).append(r)
    grouped: dict[tuple[str, float], list[Repeated]] = {}
    for (arm, budget, *_), cell in cells.items():
        grouped.setdefault((arm, budget), []).append(cell)
    return grouped


def make_cells(cells: Iterable[Repeated], quantity: str, size: str) -> list[Cell]:
    """The cells of one arm and budget, by `quantity`."""
    made = []
    for runs in cells:
        losses = np.array([r.eval_loss for r in runs], dtype=float)
        sems = [r.eval_loss_sem or 0.0 for r in runs]
        made.append(
            Cell(
                x=float(quantity_of(runs[0], quantity, size)),
                loss=float(losses.mean()),
                sem=float(np.mean(sems)),
                seeds=len(runs),
                squares=float(((losses - losses.mean()) ** 2).sum()),
            )
        )
    return sorted(made, key=lambda cell: cell.x)


def repeats(cells: Iterable[Repeated], size: str, seeds: int = 2) -> list[SeedSpread]:
    """Returns every cell that was run with `seeds` seeds or more, by budget and size."""
    found = []
    for runs in cells:
        losses = [r.eval_loss for r in runs if r.eval_loss is not None]
        if len(losses) >= seeds:
            r = runs[0]
            found.append(
                SeedSpread(
                    arm=r.variant,
                    budget_flops=r.budget_flops,
                    d_model=r.d_model,
                    params=getattr(r, SIZES[size]),
                    seeds=len(losses),
                    loss=float(np.mean(losses)),
                    deviation=float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
                )
            )
    return sorted(found, key=lambda cell: (cell.budget_flops, cell.d_model))


def freedoms(cells: Mapping[str, Sequence[Cell]]) -> tuple[int, int]:
    """Degrees of freedom of the noise of a budget: between seeds, and about its parabolas."""
    sizes = (len({c.x for c in of}) for of in cells.values())
    about = sum(len(of) - 3 for of, n in zip(cells.values(), sizes, strict=True) if n >= 3)
    return sum(c.seeds - 1 for of in cells.values() for c in of), about
