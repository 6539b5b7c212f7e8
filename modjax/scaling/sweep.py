"""A whole sweep in its folder: checks its plan, does its runs, and logs the time spent."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modjax.bucket import url, url_of
from modjax.errors import InputError, require
from modjax.files import is_copy
from modjax.provenance import require_same, source_code
from modjax.records import RunRecord, read_records, run_dir
from modjax.scaling.engines.engine import Options
from modjax.scaling.plan.experiment import Experiment
from modjax.scaling.plan.plan_table import BUDGET_TOLERANCE, PlannedRun, cells, flops_per_second
from modjax.scaling.plan.prediction import NOISE
from modjax.scaling.session import Session
from modjax.scaling.workdir import check_claim, claim, log_session
from modjax.scaling.workers.worker import Settings
from modjax.specs import RunSpec

if TYPE_CHECKING:
    from modjax.data.token_cache import TokenCache

SHORTEST_LEASE = 1.0  # seconds
LEASE_OF_A_BUCKET = 120.0  # unless another one is given
# Workers call its `check` once before the plan is claimed, and its `train` for every run.
JOB = "modjax.scaling.workers.job"


def open_data(experiment: Experiment, data_dir: Path) -> "TokenCache":
    """Returns the experiment's token cache. Raises InputError if it is missing or damaged."""
    from modjax.data.token_cache import cache_dir, open_cache

    return open_cache(cache_dir(data_dir, experiment.specs[0].data))


def plan_table(
    experiment: Experiment,
    cache: "TokenCache | None",
    records: Sequence[RunRecord] = (),
    noise: float = NOISE,
) -> list[PlannedRun]:
    """Returns the plan table of a sweep. Without a cache its epochs are unknown.

    records: finished runs, which measure the speed of a worker.
    noise: standard deviation of a run's loss, in nats, for the predicted intervals.
    Raises InputError if the cache has more tokens than the model has embeddings.
    """
    from modjax.data.token_cache import check_vocab, epochs

    if cache is not None:
        check_vocab(cache, experiment.specs[0].model)

    def read(spec: RunSpec) -> float | None:
        sequences = spec.train.steps * spec.train.batch_size
        return None if cache is None else epochs(cache, spec.train.seq_len, sequences)

    assert experiment.sweep is not None
    rate = flops_per_second(experiment.config, records)
    return cells(experiment.specs, experiment.sweep, read, rate, noise)


def check(experiment: Experiment, cache: "TokenCache") -> None:
    """Raises InputError for a run that a sweep refuses: off its budget, or too many epochs."""
    limit = experiment.specs[0].data.max_epochs
    for cell in plan_table(experiment, cache):
        off_budget = (
            f"{cell.run_id} can't spend it within {BUDGET_TOLERANCE:.0%} in {cell.steps} whole "
            "steps: raise the budget, or lower sweep.recipe.batch_size or sweep.optimum.params"
        )
        require("off-budget" not in cell.flags, "sweep.budgets", cell.budget_flops, off_budget)
        if "too many epochs" in cell.flags:
            accepted = (
                f"too large for the data: {cell.run_id} would read it {cell.epochs:.2f} times, and "
                f"data.max_epochs is {limit:g}: lower the budget, prepare more text, or raise it"
            )
            raise InputError("sweep.budgets", cell.budget_flops, accepted)


@dataclass(frozen=True)
class Outcome:
    """Result of a sweep.

    records: the records of the runs that were asked for and have finished.
    failures: run id -> why the run was given up.
    """

    records: list[RunRecord]
    failures: dict[str, str]


def sweep(
    experiment: Experiment,
    *,
    workdir: Path,
    data_dir: Path,
    engine: Options,
    data_fingerprint: str,
    only: RunSpec | None = None,
    other_code: bool = False,
    lease: float = 0.0,
) -> Outcome:
    """Does the unfinished runs of the plan.

    Call `check` first. After an error, the same call resumes the sweep and repeats no finished run.

    engine: what does them, see modjax.scaling.engines.engine.
    only: the single run of the plan to do; None does all.
    other_code: whether to resume runs that other code, or another environment, began.
    workdir: a folder, or the copy of a bucket, as bucket.open_copy returns it.
    lease: seconds after which a run counts as dropped whose process is silent; 0 relies on locks,
      or in a bucket on LEASE_OF_A_BUCKET.
    Raises InputError for bad input, OSError for a full disk and Stopped after a signal.
    """
    accepted = f"must be 0, for locks, or at least {SHORTEST_LEASE:g} seconds"
    require(lease == 0 or lease >= SHORTEST_LEASE, "--lease", lease, accepted)
    if is_copy(workdir.absolute()):
        lease = lease or LEASE_OF_A_BUCKET
    check_claim(experiment, workdir, data_fingerprint)
    started, began = time.time(), time.monotonic()
    specs = experiment.specs if only is None else [only]
    if not other_code:
        require_same(workdir, specs)
    begun = {s.run_id for s in specs if (run_dir(workdir, s.run_id) / "metrics.jsonl").exists()}
    settings = Settings(
        job=JOB,
        # Workers elsewhere have another current folder.
        workdir=url_of(workdir.absolute()) or str(workdir.absolute()),
        data_dir=str(data_dir if url(data_dir) else data_dir.absolute()),
        fingerprint=data_fingerprint,
        execution=experiment.execution,
        imports=experiment.imports,
        code=source_code(),
        other_code=other_code,
        lease=lease,
    )
    rate = flops_per_second(experiment.config, read_records(workdir))
    session = Session(specs, settings, engine, rate)
    try:
        session.run(lambda: claim(experiment, workdir, data_fingerprint))
    finally:
        if session.home is not None and session.home.is_there():
            wall = time.monotonic() - began
            log_session(
                workdir, {"started": started} | _session_entry(workdir, wall, session, begun)
            )
    assert session.home is not None
    session.home.check()
    planned = {spec.run_id for spec in specs}
    records = [record for record in read_records(workdir) if record.run_id in planned]
    return Outcome(records, session.failures)


def _session_entry(workdir: Path, wall: float, session: Session, begun: set[str]) -> dict[str, Any]:
    """Returns the seconds spent by a session of `wall` seconds, on the runs that it finished.

    overhead: the share of the workers' wall time that was neither training nor compilation. None
      if a run was left unfinished, or if a finished run is in `begun`: the record of a run that an
      earlier session began counts the seconds of both.
    found: the runs that another session finished meanwhile, which add no seconds.
    """
    finished = set(session.finished)
    records = [record for record in read_records(workdir) if record.run_id in finished]

    def total(field: str) -> float:
        return sum(getattr(record, field) for record in records)

    used = total("train_seconds") + total("compile_seconds")
    partial = begun & finished or bool(session.running)
    overhead = 1 - used / (wall * max(1, session.slots))
    seconds = ("train_seconds", "compile_seconds", "eval_seconds", "data_wait_seconds")
    return {
        "wall_seconds": wall,
        "jobs": session.slots,
        "busy_seconds": session.busy_seconds,
        **{field: total(field) for field in seconds},
        "overhead": None if partial else overhead,
        "finished": list(session.finished),
        "found": list(session.found),
        "failed": list(session.failures),
    }
