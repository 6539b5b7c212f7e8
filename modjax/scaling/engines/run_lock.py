"""One run in its folder: the process that does it holds the lock runs/<run_id>/lock."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from modjax.records import RunRecord, read_record, run_dir
from modjax.specs import RunSpec


@contextlib.contextmanager
def lock(path: Path, *, patience: float = 0.0, shared: bool = False) -> Iterator[bool]:
    """Locks the file `path` for the `with` block; yields False if another process has locked it.

    patience: seconds to keep trying.
    shared: takes a read lock, to see whether the file is locked. Raises FileNotFoundError if there
      is no file.
    The kernel releases the lock when the process ends, however it ends.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + patience
    locked = False
    # Looking must not need the right to write: a sweep may be someone else's.
    file = os.open(path, os.O_RDONLY if shared else os.O_CREAT | os.O_RDWR, 0o666)
    try:
        while not locked:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.02)
        yield locked
    finally:
        os.close(file)


def is_running(folder: Path) -> bool:
    """Returns whether a living process works on the run in `folder`."""
    try:
        with lock(folder / "lock", shared=True) as locked:
            return not locked
    except (FileNotFoundError, NotADirectoryError):  # it has not begun, or was deleted
        return False


def run(
    spec: RunSpec, workdir: Path, train: Callable[[Path], RunRecord]
) -> tuple[RunRecord, bool] | None:
    """Trains a run in its folder, or reads the result that is already there.

    train: trains the run in the folder that it is given, and returns the record.
    Returns the record and whether it was trained here, or None if another process is doing the
    run. Raises what `train` raises.
    """
    folder = run_dir(workdir, spec.run_id)
    # `is_running` locks the file for an instant, which does not mean that a process is at work.
    with lock(folder / "lock", patience=1.0) as locked:
        if not locked:
            return None
        record = read_record(folder, spec.run_id)
        if record is not None:
            return record, False
        record = train(folder)
        (folder / "failure.json").unlink(missing_ok=True)
        return record, True
