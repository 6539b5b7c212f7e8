"""A whole sweep in its folder: planned, claimed, run through an engine, and accounted for.

workdir/plan.json               the config, the command and the runs of the sweep
workdir/sweep.json              what every session of the sweep spent its time on
workdir/runs/<run_id>/          lock, spec.json, log.txt, metrics.jsonl, checkpoints/, and at
                                the end result.json, or failure.json where it was given up
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modjax.config import InputError, RunSpec, require, to_dict
from modjax.records import Record, read_record, read_records, run_dir, write_json
from modjax.scaling.cells import BUDGET_TOLERANCE, Cell, cells, flops_per_second
from modjax.scaling.engines.local import Session
from modjax.scaling.experiment import Experiment
from modjax.scaling.foretell import NOISE
from modjax.scaling.run import lock

if TYPE_CHECKING:
    from modjax.data.cache import TokenCache


def open_data(experiment: Experiment, data_dir: Path) -> "TokenCache":
    """The token cache of the experiment. Raises InputError where it is missing or damaged."""
    from modjax.data.cache import cache_dir, open_cache

    return open_cache(cache_dir(data_dir, experiment.specs[0].data))


def plan_table(
    experiment: Experiment, cache: "TokenCache | None", records: Sequence[Record] = (),
    noise: float = NOISE,
) -> list[Cell]:  # fmt: skip
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
                "sweep.budgets", cell.budget_flops,
                f"{cell.run_id} can't spend it within {BUDGET_TOLERANCE:.0%} in {cell.steps} whole "
                "steps: raise the budget, or lower sweep.recipe.batch_size or sweep.optimum.params",
            )  # fmt: skip
        if "too many epochs" in cell.flags:
            limit = experiment.specs[0].data.max_epochs
            raise InputError(
                "sweep.budgets", cell.budget_flops,
                f"too large for the data: {cell.run_id} would read it {cell.epochs:.2f} times, and "
                f"data.max_epochs is {limit:g}: lower the budget, prepare more text, or raise it",
            )  # fmt: skip


def claim(experiment: Experiment, workdir: Path, command: str, data_fingerprint: str) -> None:
    """Writes plan.json and every spec.json; a plan may grow, but not change or shrink.

    command: kept in plan.json until the plan grows; that of a later session is not.
    Raises InputError where `workdir` holds runs that are not part of this plan, or that were
    trained on other data.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    names = [spec.run_id for spec in experiment.specs]
    with lock(workdir / "plan.lock", patience=math.inf):
        path = workdir / "plan.json"
        if path.exists():
            earlier = json.loads(path.read_text())
            others = set(earlier["runs"]) - set(names)
            require(
                not others, "--workdir", str(workdir),
                f"holds another plan ({len(others)} of its runs are not in this one): choose "
                "another folder, or delete this one",
            )  # fmt: skip
            require(
                earlier["data_fingerprint"] == data_fingerprint, "--workdir", str(workdir),
                "holds runs on other data: the token cache was prepared anew since; choose "
                "another folder, or delete this one",
            )  # fmt: skip
            if len(earlier["runs"]) == len(names):
                command = earlier["command"]
        for spec in experiment.specs:
            folder = run_dir(workdir, spec.run_id)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "spec.json").exists():
                write_json(folder / "spec.json", to_dict(spec))
        plan = {
            "config_file": experiment.config_file,
            "command": command,
            "config": experiment.config,
            "data_fingerprint": data_fingerprint,
            "runs": names,
        }
        write_json(path, plan)


@dataclass(frozen=True)
class Outcome:
    """What a sweep ended with: the records of the plan, and run_id -> why it was given up."""

    records: list[Record]
    failures: dict[str, str]


def sweep(
    experiment: Experiment, *, workdir: Path, data_dir: Path, jobs: int, command: str,
    data_fingerprint: str, only: RunSpec | None = None, train: str = "modjax.training.loop:train",
) -> Outcome:  # fmt: skip
    """Runs what is not finished of the plan on `jobs` local processes; see engines/local.py.

    only: the one run of the plan to do.
    train: "module:function" that the workers call for every run.
    Call `check` first. Raises InputError for bad input, OSError for a full disk and
    Stopped after a signal; what is finished is kept, and the same call goes on.
    """
    require(jobs > 0, "--jobs", jobs, "must be greater than 0")
    claim(experiment, workdir, command, data_fingerprint)
    started = time.time()
    specs = experiment.specs if only is None else [only]
    begun = {s.run_id for s in specs if (run_dir(workdir, s.run_id) / "metrics.jsonl").exists()}
    session = Session(
        specs=specs,
        execution=experiment.execution,
        workdir=workdir,
        data_dir=data_dir,
        jobs=jobs,
        train=train,
        flops_per_second=flops_per_second(experiment.config, read_records(workdir)),
    )
    try:
        session.run()
    finally:
        _log_session(workdir, started, session, begun)
    names = {spec.run_id for spec in specs}
    records = [record for record in read_records(workdir) if record.run_id in names]
    return Outcome(records, session.failures)


def _log_session(workdir: Path, started: float, session: Session, begun: set[str]) -> None:
    """Appends to sweep.json what the runs that the session finished spent, in seconds.

    begun: runs that an earlier session had begun. A record counts the seconds of all sessions, so
    `overhead`, the share of the workers' wall time that was neither training nor compilation, is
    null where one of them was finished here, or where a run was left unfinished.
    """
    finished = [read_record(run_dir(workdir, run_id)) for run_id in session.finished]
    records = [record for record in finished if record is not None]
    wall = time.time() - started
    used = sum(record.train_seconds + record.compile_seconds for record in records)
    partial = begun.intersection(session.finished) or any(w.spec for w in session.workers)
    overhead = 1 - used / (wall * max(1, len(session.workers)))
    entry = {
        "started": started,
        "wall_seconds": wall,
        "jobs": len(session.workers),
        "busy_seconds": [worker.busy_seconds for worker in session.workers],
        "train_seconds": sum(record.train_seconds for record in records),
        "compile_seconds": sum(record.compile_seconds for record in records),
        "eval_seconds": sum(record.eval_seconds for record in records),
        "data_wait_seconds": sum(record.data_wait_seconds for record in records),
        "overhead": None if partial else overhead,
        "finished": list(session.finished),
        "failed": list(session.failures),
    }
    with lock(workdir / "plan.lock", patience=math.inf):
        path = workdir / "sweep.json"
        earlier = json.loads(path.read_text()) if path.exists() else []
        write_json(path, [*earlier, entry])
