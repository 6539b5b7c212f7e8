"""A small sweep, run twice: its time outside training and compilation, and its waits for data.

The sweep is configs/tiny.py without its largest budget: 2 arms x 5 sizes x 2 budgets (1e11 and 3e11
FLOPs) = 20 runs on 2 worker processes. Its data are prepared before timing starts. Nothing that
the user has prepared, compiled or trained is used.
"""

import sys
import tempfile
import time
from pathlib import Path

from modjax.bench import Row, call, fill, fresh_environment, progress
from modjax.records import RunRecord, read_records

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny.py"
BUDGETS = "1e11,3e11"
JOBS = 2
ROWS = (
    Row("sweep wall time outside training and compilation", "share", 0.15),
    Row("compilation in a repeated sweep / in the first", "ratio", 0.2),
    Row("train steps waiting for data", "share of step time", 0.01),
)
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
    return fill(ROWS, [1 - spent / (JOBS * first_wall), compiled, waited])


def _sweep(workdir: Path, environment: dict[str, str]) -> tuple[list[RunRecord], float]:
    progress(f"bench sweep: the {workdir.name} of two")
    options = [f"--config={CONFIG}", f"--config.sweep.budgets={BUDGETS}", f"--jobs={JOBS}"]
    start = time.perf_counter()
    call([*MODJAX, "sweep", *options, f"--workdir={workdir}"], environment)
    wall = time.perf_counter() - start
    return read_records(workdir), wall
