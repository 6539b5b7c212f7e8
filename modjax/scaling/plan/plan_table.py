"""Plan table: the size and cost of every run of a sweep, and flags for what is wrong with it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from modjax.flops import parameters, run_flops, stream_bytes
from modjax.records import RunRecord
from modjax.scaling.plan.config import SweepConfig
from modjax.scaling.plan.grid import forward_per_token, forward_ratio, non_embedding
from modjax.scaling.plan.prediction import NOISE, Prediction, predict
from modjax.specs import RunSpec

BUDGET_TOLERANCE = 0.01
CENTRE_TOLERANCE_DECADES = 0.15
# FLOP/s of a CPU core or two, to estimate the time of a run that no sweep's config estimates.
UNMEASURED = 3e10


@dataclass(frozen=True)
class PlannedRun:
    """Row of the plan table.

    epochs: None while the token cache is not prepared.
    train_flops, achieved: what the run spends, and its ratio to budget_flops.
    bytes_per_chip, step_seconds: memory and estimated time of a train step on the topology that the
      plan was asked for, or None.
    """

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
    prediction: Prediction
    bytes_per_chip: int | None = None
    step_seconds: float | None = None


def cells(
    specs: Sequence[RunSpec],
    sweep: SweepConfig,
    epochs: Callable[[RunSpec], float | None],
    flops_per_second: float,
    noise: float = NOISE,
) -> list[PlannedRun]:
    """Returns the plan table, one row per run.

    epochs: returns how often a run reads its data, or None if that is not known.
    flops_per_second: of one worker.
    noise: standard deviation of a run's loss, in nats, for the predictions.

    The flags of a row:
      off-budget: the achieved FLOPs differ from the budget by more than 1%. A sweep refuses it.
      off-centre: the grid's centre misses the predicted optimum by more than 0.15 decades.
      can't tell: the predicted interval of the optimum is wider than the sampled range. A grid of
        one size seeks no optimum.
      repeats data: more than one epoch.
      too many epochs: more than data.max_epochs. A sweep refuses it.
    """
    off_centre = _off_centre(specs, sweep)
    sizes = ((spec.variant, spec.budget_flops, non_embedding(spec.model)) for spec in specs)
    predictions = predict(sizes, noise)
    table = []
    for spec in specs:
        group = spec.variant, spec.budget_flops
        centred = group not in off_centre
        table.append(_cell(spec, epochs(spec), flops_per_second, centred, predictions[group]))
    return table


def flops_per_second(config: dict[str, Any], records: Sequence[RunRecord]) -> float:
    """Returns FLOP/s of one worker: measured by the records, or else expected by the config."""
    seconds = sum(record.wall_seconds for record in records)
    if seconds > 0:
        return sum(record.train_flops for record in records) / seconds
    return config["sweep"]["flops_per_second"] if "sweep" in config else UNMEASURED


def _cell(
    spec: RunSpec, epochs: float | None, rate: float, centred: bool, prediction: Prediction
) -> PlannedRun:
    model, train = spec.model, spec.train
    counts = parameters(model)
    spent = run_flops(model, train, train.steps)
    achieved = spent / spec.budget_flops
    limit = spec.data.max_epochs
    flags = {
        "off-budget": abs(achieved - 1) > BUDGET_TOLERANCE,
        "off-centre": not centred,
        "can't tell": prediction.sizes > 1 and not prediction.resolves,
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
        flags=tuple(name for name, raised in flags.items() if raised),
        prediction=prediction,
    )


def _off_centre(specs: Sequence[RunSpec], sweep: SweepConfig) -> set[tuple[str, float]]:
    """Returns every (arm, budget) whose grid is off its centre.

    The baseline's centre is N*(budget). An arm's is forward_ratio times the forward FLOPs at the
    baseline's centre.
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
            expected = centre(baseline, budget, forward) + math.log10(forward_ratio(sweep, arm))
            offsets[arm] = centre(arm, budget, forward) - expected
        found |= {(a, budget) for a, o in offsets.items() if abs(o) > CENTRE_TOLERANCE_DECADES}
    return found
