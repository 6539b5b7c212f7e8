"""Orders to a sweep from other processes, by files in its folder: any engine obeys them."""

import uuid
from pathlib import Path

from modjax.bucket import get
from modjax.errors import require
from modjax.files import read, remove, write_atomically
from modjax.records import run_dir
from modjax.scaling.status import RunStatus, status

STOP = "stop"
MOST_LOG = 1_000_000  # bytes


def stop(workdir: Path) -> None:
    """Stops every launcher of the sweep, once the runs under way have saved their state."""
    status(workdir)  # raises InputError for another folder
    write_atomically(workdir / STOP, uuid.uuid4().hex)


def last_stop(workdir: Path) -> str:
    """Returns what the last `stop` wrote, "" if that is unknown. Launchers stop when it changes."""
    try:
        get(workdir, [STOP])
        return (workdir / STOP).read_text(encoding="utf-8")
    except OSError:
        return ""


def retry(workdir: Path, run_id: str) -> None:
    """Opens a run again that was given up, for launchers that still run, and for later ones."""
    state = _find(workdir, run_id).state
    accepted = f"is {state}: only runs that were given up can be tried again"
    require(state == "failed", "RUN", run_id, accepted)
    remove(run_dir(workdir, run_id) / "failure.json")


def log(workdir: Path, run_id: str) -> str:
    """Returns the end of what a run has printed."""
    _find(workdir, run_id)
    file = run_dir(workdir, run_id) / "log.txt"
    return read(file, "", last=MOST_LOG).decode(errors="replace") if file.exists() else ""


def _find(workdir: Path, run_id: str) -> RunStatus:
    runs = {run.run_id: run for run in status(workdir).runs}
    accepted = f"must be one of the plan's {len(runs)} runs, such as {next(iter(runs), None)}"
    require(run_id in runs, "RUN", run_id, accepted)
    return runs[run_id]
