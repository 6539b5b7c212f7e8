"""The state of a sweep, read from its folder alone."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from modjax.errors import MOST_NUMBER, InputError, require
from modjax.files import Missing, read_json
from modjax.flops import parameters
from modjax.metrics_file import last_step
from modjax.records import WRITTEN_AGAIN, RunRecord, causal_loss, read_spec, run_dir, scan
from modjax.scaling.plan.plan_table import flops_per_second
from modjax.scaling.workdir import read_plan
from modjax.scaling.workers.run_lock import is_running
from modjax.specs import TrainConfig, from_dict
from modjax.specs.text import UnknownName

STATES = ("done", "diverged", "running", "failed", "damaged", "waiting")


@dataclass(frozen=True)
class RunStatus:
    """State of a run, one of STATES.

    step: the steps logged so far.
    steps, budget_flops: 0 if the run's spec is damaged.
    params_total, params_active: 0 if the spec is damaged, or has layers from outside modjax, which
      `status` does not import.
    eval_loss: as trained.
    why: explains a failure.
    causal_loss: under routing that never looks ahead, or None if there is no such routing.
    """

    run_id: str
    state: str
    step: int = 0
    steps: int = 0
    budget_flops: float = 0.0
    params_total: int = 0
    params_active: int = 0
    eval_loss: float | None = None
    why: str = ""
    causal_loss: float | None = None


@dataclass(frozen=True)
class Status:
    """State of every run of the plan.

    remaining_seconds: for waiting and running runs, on as many workers as run now.
    left_out: folder -> why its result counts for no run of the plan; see records.Scan.
    """

    runs: list[RunStatus]
    remaining_seconds: float
    left_out: dict[str, str]

    def count(self, state: str) -> int:
        """Returns how many runs are in `state`."""
        return sum(run.state == state for run in self.runs)


def status(workdir: Path) -> Status:
    """Returns the status of the sweep in `workdir`.

    Raises InputError if `workdir` holds no plan, or one that cannot be read.
    """
    plan = read_plan(workdir)
    if plan is None:
        raise InputError("--workdir", str(workdir), "holds no sweep: `modjax sweep` starts one")
    found = scan(workdir)
    records = {record.run_id: record for record in found.records}
    runs = []
    for run_id in plan.runs:
        folder = run_dir(workdir, run_id)
        if run_id in records:
            runs.append(_finished(folder, records[run_id]))
        elif run_id in found.left_out:
            runs.append(RunStatus(run_id, "damaged", why=found.left_out[run_id]))
        else:
            runs.append(_unfinished(folder, run_id))
    remaining = sum(
        run.budget_flops * (1 - run.step / run.steps)
        for run in runs
        if run.state in ("running", "waiting")
    )
    workers = max(1, sum(run.state == "running" for run in runs))
    rate = flops_per_second(plan.config, found.records) * workers
    planned = set(plan.runs)  # their own rows say what is wrong
    others = {name: why for name, why in found.left_out.items() if name not in planned}
    return Status(runs, remaining / rate, others)


def _finished(folder: Path, record: RunRecord) -> RunStatus:
    state, steps, why = "done", record.steps, ""
    if record.status == "diverged":
        state, why = "diverged", f"loss not finite at step {record.diverged_step}"
        with contextlib.suppress(InputError):  # the record has the last step, not the planned one
            steps = _read(folder, record.run_id)[0]
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
        (steps, budget, sizes), step = _read(folder, run_id), last_step(folder)
    except InputError as error:
        return RunStatus(run_id, "damaged", why=str(error))
    state, why = "waiting", ""
    if is_running(folder):
        state = "running"
    elif failure := _failure(folder / "failure.json"):
        state, why = "failed", failure
    total, active = sizes.get("total", 0), sizes.get("active", 0)
    return RunStatus(run_id, state, step, steps, budget, total, active, None, why)


def _read(folder: Path, run_id: str) -> tuple[int, float, dict[str, int]]:
    """Returns a run's steps, budget and parameter counts, {} if a layer is unknown."""
    try:
        spec = read_spec(folder, run_id)
    except UnknownName:
        values = read_json(folder / "spec.json", WRITTEN_AGAIN)
        train = from_dict(TrainConfig, values.get("train"), "train.")
        budget = values.get("budget_flops")
        usable = type(budget) in (int, float) and 0 < budget <= MOST_NUMBER
        require(usable, str(folder), budget, "must be a budget in FLOPs")
        return train.steps, float(budget), {}
    return spec.train.steps, spec.budget_flops, parameters(spec.model)


def _failure(path: Path) -> str:
    """Returns why a run was given up, or "" if it was not."""
    try:
        values = read_json(path, "the next session of the sweep writes it again")
    except Missing:
        return ""
    except InputError as error:
        return str(error)
    return str(values.get("why")) if isinstance(values, dict) else f"{path} is damaged"
