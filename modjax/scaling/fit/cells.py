"""Finished runs grouped into cells. The runs of a cell differ in their seed only."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from modjax.records import RunRecord
from modjax.scaling.fit.results import SIZES, SeedSpread

Repeated = list[RunRecord]  # runs that differ in their seed only

_cell_of = attrgetter(
    "variant",
    "budget_flops",
    "d_model",
    "num_layers",
    "params_total",
    "forward_flops_per_token",
    "batch_size",
    "steps",
    "learning_rate",
)


@dataclass(frozen=True)
class Cell:
    """One model at one budget, averaged over its seeds.

    x: size, as `quantity_of` returns it.
    loss, sem: mean loss over the seeds, and mean standard error of one evaluation.
    squares: sum of squared deviations between seeds.
    """

    x: float
    loss: float
    sem: float
    seeds: int
    squares: float


def quantity_of(record: RunRecord, quantity: str, size: str) -> float:
    """Returns a run's forward FLOPs per token, or its parameters (counted by `size`, see SIZES)."""
    if quantity == "forward_flops":
        return record.forward_flops_per_token
    return getattr(record, SIZES[size])


def by_cell(runs: Iterable[RunRecord]) -> dict[tuple[str, float], list[Repeated]]:
    """Returns (arm, budget) -> its cells, each a list of runs."""
    cells: dict[tuple, Repeated] = {}
    for r in runs:
        cells.setdefault(_cell_of(r), []).append(r)
    grouped: dict[tuple[str, float], list[Repeated]] = {}
    for (arm, budget, *_), cell in cells.items():
        grouped.setdefault((arm, budget), []).append(cell)
    return grouped


def make_cells(cells: Iterable[Repeated], quantity: str, size: str) -> list[Cell]:
    """Returns the `Cell` of each list of runs of one arm and budget, sorted by `quantity`."""
    made = []
    for runs in cells:
        losses = np.array([r.eval_loss for r in runs], dtype=float)
        made.append(
            Cell(
                x=float(quantity_of(runs[0], quantity, size)),
                loss=float(losses.mean()),
                sem=float(np.mean([r.eval_loss_sem or 0.0 for r in runs])),
                seeds=len(runs),
                squares=float(((losses - losses.mean()) ** 2).sum()),
            )
        )
    return sorted(made, key=attrgetter("x"))


def seed_spreads(cells: Iterable[Repeated], size: str, least: int = 2) -> list[SeedSpread]:
    """Returns the spread of every cell of at least `least` seeds, sorted by budget and width."""
    found = []
    for runs in cells:
        losses = [r.eval_loss for r in runs if r.eval_loss is not None]
        if len(losses) >= least:
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
    return sorted(found, key=attrgetter("budget_flops", "d_model"))


def degrees_of_freedom(cells: Mapping[str, Sequence[Cell]]) -> tuple[int, int]:
    """Returns the noise's degrees of freedom at one budget: between seeds, and about parabolas.

    cells: the cells of each arm.
    """
    between = sum(c.seeds - 1 for of_arm in cells.values() for c in of_arm)
    fitted = [of_arm for of_arm in cells.values() if len({c.x for c in of_arm}) >= 3]
    return between, sum(len(of_arm) - 3 for of_arm in fitted)
