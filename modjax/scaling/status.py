"""Where a sweep stands, read from its folder alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modjax.config import RunSpec, require
from modjax.records import read_record, read_records, read_spec, run_dir
from modjax.scaling.cells import flops_per_second
from modjax.scaling.run import is_running

STATES = ("done", "diverged", "running", "failed", "waiting")


@dataclass(frozen=True)
class RunStatus:
    """`state` is one of STATES; `step` counts the steps logged so far; `why` explains a failure."""

    run_id: str
    state: str
    step: int
    steps: int
    eval_loss: float | None
    why: str


@dataclass(frozen=True)
class Status:
    """remaining_seconds counts waiting and running runs, on as many workers as run now."""

    runs: list[RunStatus]
    remaining_seconds: float

    def count(self, state: str) -> int:
        return sum(run.state == state for run in self.runs)


def status(workdir: Path) -> Status:
    """Raises InputError where `workdir` holds no plan."""
    path = workdir / "plan.json"
    require(path.exists(), "--workdir", str(workdir), "holds no sweep: `modjax sweep` starts one")
    plan = json.loads(path.read_text())
    specs = {run_id: read_spec(run_dir(workdir, run_id)) for run_id in plan["runs"]}
    runs = [_status(run_dir(workdir, run_id), spec) for run_id, spec in specs.items()]
    remaining = sum(
        specs[run.run_id].budget_flops * (1 - run.step / run.steps)
        for run in runs
        if run.state in ("running", "waiting")
    )
    workers = max(1, sum(run.state == "running" for run in runs))
    rate = flops_per_second(plan["config"], read_records(workdir)) * workers
    return Status(runs, remaining / rate)


def _status(folder: Path, spec: RunSpec) -> RunStatus:
    steps = spec.train.steps
    if (record := read_record(folder)) is not None:
        diverged = record.status == "diverged"
        step = record.diverged_step or 0 if diverged else steps
        why = f"loss not finite at step {record.diverged_step}" if diverged else ""
        state = "diverged" if diverged else "done"
        return RunStatus(spec.run_id, state, step, steps, record.eval_loss, why)
    step = _last_step(folder / "metrics.jsonl")
    if is_running(folder):
        return RunStatus(spec.run_id, "running", step, steps, None, "")
    if (folder / "failure.json").exists():
        why = json.loads((folder / "failure.json").read_text())["why"]
        return RunStatus(spec.run_id, "failed", step, steps, None, why)
    return RunStatus(spec.run_id, "waiting", step, steps, None, "")


def _last_step(metrics: Path) -> int:
    if not metrics.exists():
        return 0
    for line in reversed(_tail(metrics)):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):  # half a line, written just now
            continue
    return 0


def _tail(path: Path, size: int = 8192) -> Sequence[str]:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace").splitlines()
