"""One run in its folder, under its lock: runs/<run_id>/lock belongs to the process that does it."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from modjax.records import RunRecord, read_record, run_dir
from modjax.specs import Execution, RunSpec

Train = Callable[..., RunRecord]


@contextlib.contextmanager
def lock(path: Path, *, patience: float = 0.0, shared: bool = False) -> Iterator[bool]:
    """Holds the lock file `path` while inside; yields False where another process holds it.

    patience: seconds to keep trying. shared: only looks, and makes no file. The kernel drops the
    lock with the process that holds it, however that dies.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + patience
    held = False
    # Looking must not need the right to write: a sweep may be someone else's.
    file = os.open(path, os.O_RDONLY if shared else os.O_CREAT | os.O_RDWR, 0o666)
    try:
        while not held:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.02)
        yield held
    finally:
        os.close(file)


def is_running(folder: Path) -> bool:
    """Returns whether a living process works on the run in `folder`."""
    try:
        with lock(folder / "lock", shared=True) as held:
            return not held
    except (FileNotFoundError, NotADirectoryError):  # it has not begun, or was deleted
        return False


class Done(NamedTuple):
    """A run's record, and whether it was finished here rather than found."""

    record: RunRecord
    here: bool


def run(
    spec: RunSpec,
    execution: Execution,
    *,
    workdir: Path,
    data_dir: Path,
    fingerprint: str,
    train: Train,
    progress: Callable[[dict[str, Any]], None] | None = None,
    other_code: bool = False,
) -> Done | None:
    """Trains `spec` in its folder, or reads the result that is there already.

    fingerprint: of the data that the plan is for. other_code: as `train` takes it.
    Returns None where another process is doing this run. Raises what `train` raises.
    """
    folder = run_dir(workdir, spec.run_id)
    # `is_running` holds the lock for an instant: that is not another process at work.
    with lock(folder / "lock", patience=1.0) as held:
        if not held:
            return None
        record = read_record(folder, spec.run_id)
        if record is not None:
            return Done(record, here=False)
        record = train(
            spec,
            execution,
            run_dir=folder,
            data_dir=data_dir,
            fingerprint=fingerprint,
            progress=progress,
            other_code=other_code,
        )
        (folder / "failure.json").unlink(missing_ok=True)
        return Done(record, here=True)
