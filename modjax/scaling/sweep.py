"""A whole sweep in its folder: planned, claimed, run through an engine, and accounted for."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modjax.errors import InputError, require
from modjax.provenance import require_same, source_code
from modjax.records import RunRecord, read_records, run_dir
from modjax.scaling.engines.local import Session
from modjax.scaling.plan.experiment import Experiment
from modjax.scaling.plan.plan_table import BUDGET_TOLERANCE, PlannedRun, cells, flops_per_second
from modjax.scaling.plan.prediction import NOISE
from modjax.scaling.workdir import check_claim, claim, log_session
from modjax.specs import RunSpec

if TYPE_CHECKING:
    from modjax.data.cache import TokenCache


def open_data(experiment: Experiment, data_dir: Path) -> "TokenCache":
    """The token cache of the experiment. Raises InputError where it is missing or damaged."""
    from modjax.data.cache import cache_dir, open_cache

    return open_cache(cache_dir(data_dir, experiment.specs[0].data))


def plan_table(
    experiment: Experiment,
    cache: "TokenCache | None",
    records: Sequence[RunRecord] = (),
    noise: float = NOISE,
) -> list[PlannedRun]:
    """The cells of a sweep; without a cache their epochs are unknown.

    noise: of a run's loss, in nats, for what the fits of the plan are expected to tell.
    Raises InputError where the cache has more tokens than the model has embeddings.
    """
    from modjax.data.cache import check_vocab, epochs

    if cache is not None:
        check_vocab(cache, experiment.specs[0].model)

    def read(spec: RunSpec) -> float | None:
        sequences = spec.train.steps * spec.train.batch_size
        return None if cache is None else epochs(cache, spec.train.seq_len, sequences)

    assert experiment.sweep is not None
    rate = flops_per_second(experiment.config, records)
    return cells(experiment.specs, experiment.sweep, read, rate, noise)


def check(experiment: Experiment, cache: "TokenCache") -> None:
    """Raises InputError for a cell that a sweep refuses to start with."""
    for cell in plan_table(experiment, cache):
        if "off-budget" in cell.flags:
            raise InputError(
                "sweep.budgets",
                cell.budget_flops,
                f"{cell.run_id} can't spend it within {BUDGET_TOLERANCE:.0%} in {cell.steps} whole "
                "steps: raise the budget, or lower sweep.recipe.batch_size or sweep.optimum.params",
            )
        if "too many epochs" in cell.flags:
            limit = experiment.specs[0].data.max_epochs
            raise InputError(
                "sweep.budgets",
                cell.budget_flops,
                f"too large for the data: {cell.run_id} would read it {cell.epochs:.2f} times, and "
                f"data.max_epochs is {limit:g}: lower the budget, prepare more text, or raise it",
            )


@dataclass(frozen=True)
class Outcome:
    """What a sweep ended with: the records of the plan, and run_id -> why it was given up."""

    records: list[RunRecord]
    failures: dict[str, str]


def sweep(
    experiment: Experiment,
    *,
    workdir: Path,
    data_dir: Path,
    jobs: int,
    command: str,
    data_fingerprint: str,
    only: RunSpec | None = None,
    job: str = "modjax.training.loop",
    other_code: bool = False,
) -> Outcome:
    """Runs what is not finished of the plan on `jobs` local processes; see engines/local.py.

    only: the one run of the plan to do.
    job: the module whose `check` the workers call before the plan is claimed, for all runs that
    are not finished, and whose `train` they call for each.
    other_code: go on with runs that other code began, or that were begun in another environment.
    Call `check` first. Raises InputError for bad input, OSError for a full disk and
    Stopped after a signal; what is finished is kept, and the same call goes on.
    """
    require(jobs > 0, "--jobs", jobs, "must be greater than 0")
    check_claim(experiment, workdir, data_fingerprint)
    started, began = time.time(), time.monotonic()
    specs = experiment.specs if only is None else [only]
    if not other_code:
        require_same(workdir, specs)
    begun = {s.run_id for s in specs if (run_dir(workdir, s.run_id) / "metrics.jsonl").exists()}
    session = Session(
        specs=specs,
        execution=experiment.execution,
        workdir=workdir,
        data_dir=data_dir,
        fingerprint=data_fingerprint,
        jobs=jobs,
        job=job,
        flops_per_second=flops_per_second(experiment.config, read_records(workdir)),
        imports=experiment.imports,
        code=source_code(),
        other_code=other_code,
    )
    try:
        session.run(lambda: claim(experiment, workdir, command, data_fingerprint))
    finally:
        if session.home is not None and session.home.is_there():
            wall = time.monotonic() - began
            log_session(workdir, {"started": started} | _account(workdir, wall, session, begun))
    assert session.home is not None
    session.home.check()
    names = {spec.run_id for spec in specs}
    records = [record for record in read_records(workdir) if record.run_id in names]
    return Outcome(records, session.failures)


def _account(workdir: Path, wall: float, session: Session, begun: set[str]) -> dict[str, Any]:
    """What the runs that the session finished itself spent, in seconds.

    begun: runs that an earlier session had begun. A record counts the seconds of all sessions, so
    `overhead`, the share of the workers' wall time that was neither training nor compilation, is
    null where one of them was finished here, or where a run was left unfinished. `found`: runs
    that another session finished meanwhile, of which nothing is counted.
    """
    finished = set(session.finished)
    records = [record for record in read_records(workdir) if record.run_id in finished]
    used = sum(record.train_seconds + record.compile_seconds for record in records)
    partial = begun.intersection(session.finished) or any(w.spec for w in session.workers)
    overhead = 1 - used / (wall * max(1, len(session.workers)))
    return {
        "wall_seconds": wall,
        "jobs": len(session.workers),
        "busy_seconds": [worker.busy_seconds for worker in session.workers],
        "train_seconds": sum(record.train_seconds for record in records),
        "compile_seconds": sum(record.compile_seconds for record in records),
        "eval_seconds": sum(record.eval_seconds for record in records),
        "data_wait_seconds": sum(record.data_wait_seconds for record in records),
        "overhead": None if partial else overhead,
        "finished": list(session.finished),
        "found": list(session.found),
        "failed": list(session.failures),
    }
