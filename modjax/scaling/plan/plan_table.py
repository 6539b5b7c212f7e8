"""The plan table: what every run of a sweep is and costs, and what is wrong with it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from modjax.flops import parameters, run_flops, stream_bytes
from modjax.records import RunRecord
from modjax.scaling.plan.config import SweepConfig
from modjax.scaling.plan.grid import forward_per_token, forward_ratio, non_embedding
from modjax.scaling.plan.prediction import NOISE, Foretold, foretell
from modjax.specs import RunSpec

BUDGET_TOLERANCE = 0.01
CENTRE_TOLERANCE_DECADES = 0.15
# FLOP/s of a CPU core or two: for the remaining time of the first run without a sweep's estimate.
UNMEASURED = 3e10


@dataclass(frozen=True)
class PlannedRun:
    """A row of the plan table; `epochs` is None while the token cache is not prepared."""

    run_id: str
    arm: str
    seed: int
    budget_flops: float
    d_model: int
    num_layers: int
    params_total: int
    params_non_embedding: int
    params_active: int
    stream_bytes: int
    tokens: int
    tokens_per_param: float
    steps: int
    batch_size: int
    learning_rate: float
    epochs: float | None
    forward_flops_per_token: float
    train_flops: float
    achieved: float
    seconds: float
    flags: tuple[str, ...]
    foretold: Foretold


def cells(
    specs: Sequence[RunSpec],
    sweep: SweepConfig,
    epochs: Callable[[RunSpec], float | None],
    flops_per_second: float,
    noise: float = NOISE,
) -> list[PlannedRun]:
    """The plan table, with what is wrong in `flags`: "off-budget" where the achieved FLOPs differ
    from the budget by more than 1%, "off-centre" where the grid's centre misses the predicted
    optimum by more than 0.15 decades, "can't tell" where runs of that noise are not expected to
    tell the optimum within the sampled range (a grid of one size seeks none), "repeats data", and
    "too many epochs" beyond data.max_epochs. A sweep refuses cells that are off-budget or have too
    many epochs.
    """
    off_centre = _off_centre(specs, sweep)
    sizes = [parameters(spec.model)["non_embedding"] for spec in specs]
    foretold = foretell(
        ((spec.variant, spec.budget_flops, n) for spec, n in zip(specs, sizes, strict=True)), noise
    )
    table = []
    for spec in specs:
        group = (spec.variant, spec.budget_flops)
        table.append(
            _cell(spec, epochs(spec), flops_per_second, group in off_centre, foretold[group])
        )
    return table


def flops_per_second(config: dict[str, Any], records: Sequence[RunRecord]) -> float:
    """What one worker reaches: measured over the records, or as the sweep's config expects."""
    seconds = sum(record.wall_seconds for record in records)
    if seconds > 0:
        return sum(record.train_flops for record in records) / seconds
    return config["sweep"]["flops_per_second"] if "sweep" in config else UNMEASURED


def _cell(
    spec: RunSpec, epochs: float | None, rate: float, off_centre: bool, foretold: Foretold
) -> PlannedRun:
    model, train = spec.model, spec.train
    counts = parameters(model)
    spent = run_flops(model, train, train.steps)
    achieved = spent / spec.budget_flops
    limit = spec.data.max_epochs
    marks = {
        "off-budget": abs(achieved - 1) > BUDGET_TOLERANCE,
        "off-centre": off_centre,
        "can't tell": foretold.sizes > 1 and not foretold.tells,
        "repeats data": epochs is not None and 1 < epochs <= limit,
        "too many epochs": epochs is not None and epochs > limit,
    }
    return PlannedRun(
        run_id=spec.run_id,
        arm=spec.variant,
        seed=train.seed,
        budget_flops=spec.budget_flops,
        d_model=model.d_model,
        num_layers=model.num_layers,
        params_total=counts["total"],
        params_non_embedding=counts["non_embedding"],
        params_active=counts["active"],
        stream_bytes=stream_bytes(model, train.batch_size * train.seq_len // train.accumulation),
        tokens=train.tokens,
        tokens_per_param=train.tokens / counts["non_embedding"],
        steps=train.steps,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        epochs=epochs,
        forward_flops_per_token=forward_per_token(model, train.seq_len),
        train_flops=spent,
        achieved=achieved,
        seconds=spent / rate,
        flags=tuple(name for name, marked in marks.items() if marked),
        foretold=foretold,
    )


def _off_centre(specs: Sequence[RunSpec], sweep: SweepConfig) -> set[tuple[str, float]]:
    """(arm, budget) whose grid has its centre away from where it should be.

    The baseline's belongs at N*(C); the other arms' at the baseline's forward FLOPs.
    """
    baseline = sweep.baseline

    def centre(arm: str, budget: float, measure: Callable[[RunSpec], float]) -> float:
        chosen = [s for s in specs if (s.variant, s.budget_flops) == (arm, budget)]
        return sum(math.log10(measure(s)) for s in chosen) / len(chosen)

    def forward(spec: RunSpec) -> float:
        return forward_per_token(spec.model, spec.train.seq_len)

    found = set()
    for budget in sweep.budgets:
        size = centre(baseline, budget, lambda s: non_embedding(s.model))
        offsets = {baseline: size - math.log10(sweep.optimum.at(budget))}
        for arm in sweep.arms.keys() - {baseline}:
            wanted = centre(baseline, budget, forward) + math.log10(forward_ratio(sweep, arm))
            offsets[arm] = centre(arm, budget, forward) - wanted
        found |= {(a, budget) for a, o in offsets.items() if abs(o) > CENTRE_TOLERANCE_DECADES}
    return found
