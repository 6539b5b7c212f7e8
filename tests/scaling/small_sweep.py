"""A sweep of six short runs with a stand-in for training, and helpers of its tests."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from modjax.records import read_record
from modjax.scaling import sweep as sweeps
from modjax.scaling.engines.local import Local
from modjax.scaling.plan.experiment import load

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "tiny.py"
LOCAL = Local()
# Six runs: 3 sizes x 2 arms.
SMALL = ("sweep.sizes=3", "sweep.budgets=5e11")
DRIVER = """
import sys
from pathlib import Path
from modjax.bucket import open_copy
from modjax.scaling import sweep
from modjax.scaling.engines.local import Local
from modjax.scaling.session import Stopped
from modjax.scaling.plan.experiment import load
sweep.JOB = "stand_in"
config, workdir, data_dir, jobs, lease = sys.argv[1:6]
try:
    outcome = sweep.sweep(load(config, sys.argv[6:]), workdir=open_copy(workdir, writes=True),
                          data_dir=Path(data_dir), engine=Local(int(jobs)), data_fingerprint="f",
                          lease=float(lease))
except Stopped as stopped:
    print(f"{stopped.saved=}", file=sys.stderr)
    raise
print(len(outcome.records), len(outcome.failures))
"""


def sweep(folders, *overrides: str, jobs: int = 2, fingerprint: str = "f"):
    return run(folders, load(str(CONFIG), [*SMALL, *overrides]), Local(jobs), fingerprint)


def run(folders, experiment, engine=LOCAL, fingerprint: str = "f", **options):
    """Runs an experiment in `folders`, which make the stand-in the job."""
    workdir, data_dir = folders
    return sweeps.sweep(
        experiment,
        workdir=workdir,
        data_dir=data_dir,
        engine=engine,
        data_fingerprint=fingerprint,
        **options,
    )


def start(folders, jobs: int = 2, lease: float = 0.0) -> subprocess.Popen:
    """Starts the same sweep in a process of its own, to be killed."""
    arguments = [str(CONFIG), str(folders[0]), str(folders[1]), str(jobs), str(lease), *SMALL]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run_ids() -> list[str]:
    return [spec.run_id for spec in load(str(CONFIG), SMALL).specs]


def lines(folders, name: str) -> dict[str, list[str]]:
    paths = {run_id: folders[0] / "runs" / run_id / name for run_id in run_ids()}
    return {i: p.read_text().split() if p.exists() else [] for i, p in paths.items()}


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def assert_one_result_per_run(folders) -> None:
    assert all(len(finishes) == 1 for finishes in lines(folders, "finishes").values())
    for run_id in run_ids():
        record = read_record(folders[0] / "runs" / run_id)
        assert record is not None and record.run_id == run_id


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
