"""A small sweep, run twice: its time outside training and compilation, and its waits for data.

The sweep is configs/tiny.py without its largest budget: 2 arms x 5 sizes x 2 budgets (1e11 and 3e11
FLOPs) = 20 runs on 2 worker processes. Its data are prepared before timing starts. Nothing that
the user has prepared, compiled or trained is used.

Then sweeps of runs that do nothing, whose time is all overhead: on a worker process, on Ray, and
10,000 runs on an engine that pretends to have 1,000 slots. `check` and `train` are their job.
"""

import contextlib
import dataclasses
import io
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modjax.bench import Row, call, fill, fresh_environment, progress
from modjax.errors import InputError
from modjax.records import RunRecord, read_records, run_dir, write_record
from modjax.scaling import sweep as sweeps
from modjax.scaling.engines.engine import Event, options_of
from modjax.scaling.plan.experiment import load
from modjax.specs import RunSpec

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny.py"
BUDGETS = "1e11,3e11"
JOBS = 2
ROWS = (
    Row("sweep wall time outside training and compilation", "share", 0.15),
    Row("compilation in a repeated sweep / in the first", "ratio", 0.2),
    Row("train steps waiting for data", "share of step time", 0.01),
    Row("local process: from a run that does nothing to the next", "ms", None),
    Row("Ray: the same", "ms", 50),
    Row("launcher of 10,000 runs with 1,000 at a time: processor time per run", "ms", None),
    Row("files that it opens or lists per run", "files", None),
)
SEEDS = {60: 3, 10_000: 500}  # number of runs -> seeds of each of the 20 models
SLOTS = 1000
MODJAX = (sys.executable, "-P", "-m", "modjax.cli")


def measure() -> list[Row]:
    if not CONFIG.exists():
        raise FileNotFoundError(f"configs/{CONFIG.name} is not beside the package: use a clone")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = fresh_environment(folder)
        progress("bench sweep: preparing its text")
        call([*MODJAX, "data", "prepare"], environment)
        first, first_wall = _sweep(folder / "first", environment)
        # The second sweep finds the compiled programs, but no results.
        second, _ = _sweep(folder / "second", environment)
    spent = sum(r.train_seconds + r.compile_seconds for r in first)
    compiled = sum(r.compile_seconds for r in second) / sum(r.compile_seconds for r in first)
    waited = sum(r.data_wait_seconds for r in first) / sum(r.train_seconds for r in first)
    rows = fill(ROWS[:3], [1 - spent / (JOBS * first_wall), compiled, waited])
    for engine, row in zip(("local", "ray"), ROWS[3:5], strict=True):
        try:
            rows += fill([row], [_seconds_between(engine) * 1e3])
        except InputError as error:  # it needs its extra
            rows.append(dataclasses.replace(row, why=str(error)))
    return rows + fill(ROWS[5:], _launcher())


def _sweep(workdir: Path, environment: dict[str, str]) -> tuple[list[RunRecord], float]:
    progress(f"bench sweep: the {workdir.name} of two")
    options = [f"--config={CONFIG}", f"--config.sweep.budgets={BUDGETS}", f"--jobs={JOBS}"]
    start = time.perf_counter()
    call([*MODJAX, "sweep", *options, f"--workdir={workdir}"], environment)
    wall = time.perf_counter() - start
    return read_records(workdir), wall


def check(specs: Sequence[RunSpec], execution: Any, **data: Any) -> None:
    pass


def train(spec: RunSpec, execution: Any, *, run_dir: Path, **options: Any) -> RunRecord:
    """Writes a result without any training."""
    blank = {str: "", int: 0, float: 0.0, dict[str, float]: {}, dict[str, str]: {}}
    values: dict[str, Any] = {f.name: blank.get(f.type) for f in dataclasses.fields(RunRecord)}
    values |= {"outcome": {}, "eval_loss": 2.0, "status": "finished"}
    about = {"run_id": spec.run_id, "variant": spec.variant, "budget_flops": spec.budget_flops}
    record = RunRecord(**values | about)
    write_record(run_dir, record)
    return record


def _do_nothing(workdir: Path, engine: Any, runs: int) -> None:
    progress(f"bench sweep: {runs:,} runs that do nothing, on {type(engine).__name__}")
    seeds = ",".join(map(str, range(SEEDS[runs])))
    size = ("sweep.sizes=10", f"sweep.seeds={seeds}", "sweep.budgets=5e11")
    sweeps.JOB = __name__
    data = {"data_dir": workdir, "data_fingerprint": "none"}
    with contextlib.redirect_stderr(io.StringIO()):  # a line for each run
        sweeps.sweep(load(str(CONFIG), size), workdir=workdir, engine=engine, **data)


def _seconds_between(engine: str) -> float:
    """Returns the median time between the results of runs that one worker does."""
    with tempfile.TemporaryDirectory() as folder:
        _do_nothing(Path(folder), options_of(engine, {}), min(SEEDS))
        files = Path(folder).glob("runs/*/result.json")
        ends = sorted(file.stat().st_mtime for file in files)
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


class Pretended:
    """An engine without processes, which ends one in twenty runs at each look."""

    slots = SLOTS

    def open(self, settings: Any, runs: int) -> "Pretended":
        self.workdir, self.under_way, self.news = Path(settings.workdir), {}, []
        return self

    def check(self, specs: Sequence[RunSpec]) -> None:
        self.news = [Event("checked")]

    def room(self) -> int:
        return SLOTS - len(self.under_way)

    def start(self, specs: Sequence[RunSpec]) -> None:
        self.under_way |= {spec.run_id: spec for spec in specs}
        self.news = [Event("started", spec.run_id) for spec in specs]

    def events(self, seconds: float) -> Iterator[Event]:
        yield from self.news
        self.news = []
        for run_id in random.sample(sorted(self.under_way), -(-len(self.under_way) // 20)):
            spec = self.under_way.pop(run_id)
            train(spec, None, run_dir=run_dir(self.workdir, run_id))
            yield Event("done", run_id)

    def stop(self, received: Sequence[int]) -> bool:
        return True


def _launcher() -> tuple[float, float]:
    """Returns milliseconds of processor time, and files opened or listed, per run."""
    runs, counted = max(SEEDS), [0]

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        counted[0] += event in ("open", "os.listdir", "os.scandir")

    sys.addaudithook(count)
    with tempfile.TemporaryDirectory() as folder:
        began, opened = time.process_time(), counted[0]
        _do_nothing(Path(folder), Pretended(), runs)
        return (time.process_time() - began) * 1e3 / runs, (counted[0] - opened) / runs
