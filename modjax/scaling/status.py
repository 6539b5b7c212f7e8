"""The state of a sweep, read from its folder alone."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from modjax.errors import InputError
from modjax.files import read_json
from modjax.flops import parameters
from modjax.records import Record, causal_loss, last_step, read_spec, run_dir, scan
from modjax.scaling.cells import flops_per_second
from modjax.scaling.run import is_running
from modjax.scaling.workdir import read_plan

STATES = ("done", "diverged", "running", "failed", "damaged", "waiting")


@dataclass(frozen=True)
class RunStatus:
    """`state` is one of STATES; `step` counts the steps logged so far; `why` explains a failure.

    steps, budget_flops and the parameters are 0 where the run's spec is damaged. eval_loss: as
    trained; causal_loss: under routing that never looks ahead, None where the run has none.
    """

    run_id: str
    state: str
    step: int
    steps: int
    budget_flops: float
    params_total: int
    params_active: int
    eval_loss: float | None
    why: str
    causal_loss: float | None = None


@dataclass(frozen=True)
class Status:
    """remaining_seconds counts waiting and running runs, on as many workers as run now."""

    runs: list[RunStatus]
    remaining_seconds: float

    def count(self, state: str) -> int:
        return sum(run.state == state for run in self.runs)


def status(workdir: Path) -> Status:
    """Raises InputError where `workdir` holds no plan, or one that cannot be read."""
    plan = read_plan(workdir)
    if plan is None:
        raise InputError("--workdir", str(workdir), "holds no sweep: `modjax sweep` starts one")
    found = scan(workdir)
    records = {record.run_id: record for record in found.records}
    runs = list(_statuses(workdir, plan.runs, records, found.unreadable))
    remaining = sum(
        run.budget_flops * (1 - run.step / run.steps)
        for run in runs
        if run.state in ("running", "waiting")
    )
    workers = max(1, sum(run.state == "running" for run in runs))
    rate = flops_per_second(plan.config, found.records) * workers
    return Status(runs, remaining / rate)


def _statuses(
    workdir: Path, run_ids: Iterable[str], records: dict[str, Record], unreadable: dict[str, str]
) -> Iterable[RunStatus]:
    for run_id in run_ids:
        if run_id in records:
            yield _finished(run_dir(workdir, run_id), records[run_id])
        elif run_id in unreadable:
            yield RunStatus(run_id, "damaged", 0, 0, 0.0, 0, 0, None, unreadable[run_id])
        else:
            yield _unfinished(run_dir(workdir, run_id), run_id)


def _finished(folder: Path, record: Record) -> RunStatus:
    state, steps, why = "done", record.steps, ""
    if record.status == "diverged":
        state, why = "diverged", f"loss not finite at step {record.diverged_step}"
        with contextlib.suppress(InputError):  # the record says how far it came, not how far to go
            steps = read_spec(folder).train.steps
    return RunStatus(
        record.run_id,
        state,
        record.steps,
        steps,
        record.budget_flops,
        record.params_total,
        record.params_active,
        record.eval_loss,
        why,
        causal_loss(record),
    )


def _unfinished(folder: Path, run_id: str) -> RunStatus:
    try:
        spec = read_spec(folder)
    except InputError as error:
        return RunStatus(run_id, "damaged", 0, 0, 0.0, 0, 0, None, str(error))
    state, why = "waiting", ""
    if is_running(folder):
        state = "running"
    elif (folder / "failure.json").exists():
        state, why = "failed", _failure(folder / "failure.json")
    step, sizes = last_step(folder), parameters(spec.model)
    return RunStatus(
        run_id,
        state,
        step,
        spec.train.steps,
        spec.budget_flops,
        sizes["total"],
        sizes["active"],
        None,
        why,
    )


def _failure(path: Path) -> str:
    try:
        values = read_json(path, "the next session of the sweep writes it again")
    except InputError as error:
        return str(error)
    return str(values.get("why")) if isinstance(values, dict) else f"{path} is damaged"
