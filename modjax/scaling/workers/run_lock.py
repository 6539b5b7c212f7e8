"""One run in its folder: the process that does it holds the lock runs/<run_id>/lock, or a lease."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from modjax.bucket import fetch
from modjax.files import is_copy, lock, remove
from modjax.records import RunRecord, read_record, run_dir
from modjax.scaling.workers.lease import Guard, Observer, is_recent
from modjax.specs import RunSpec

SECONDS_OF_A_PULL = 5.0  # which locks a run, too


def is_running(folder: Path, observer: Observer | None = None) -> bool:
    """Returns whether a living process works on the run in `folder`.

    observer: watches leases. Without one, a lease counts if the store says that it is recent.
    """
    if observer is not None:
        with contextlib.suppress(OSError):
            return observer.is_held(folder)
        return True  # the store may answer the next time
    if is_recent(folder):
        return True
    try:
        with lock(folder / "lock", shared=True) as locked:
            return not locked
    except (FileNotFoundError, NotADirectoryError):  # it has not begun, or was deleted
        return False


@contextlib.contextmanager
def held(folder: Path, lease: float) -> Iterator[Guard | None]:
    """Holds a run for the `with` block; yields None if another process holds it.

    lease: seconds of a lease; 0 takes a lock. In the copy of a bucket, a lease; the copy then has
      the small files of the bucket.
    Yields a function to call before each write, which raises an error if the run was lost.
    """
    if lease:
        with contextlib.ExitStack() as stack:
            if is_copy(folder):  # the lock is for the processes of this machine
                folder.mkdir(parents=True, exist_ok=True)
                if not stack.enter_context(lock(folder / "lock", patience=SECONDS_OF_A_PULL)):
                    yield None
                    return
            guard = stack.enter_context(Observer(lease).hold(folder))
            if guard is not None and is_copy(folder):
                fetch(folder)
            yield guard
        return
    if is_recent(folder):  # another sweep of this folder relies on leases
        yield None
        return
    # `is_running` locks the file for an instant, which does not mean that a process is at work.
    with lock(folder / "lock", patience=1.0) as locked:
        yield (lambda: None) if locked else None


def run(
    spec: RunSpec, workdir: Path, train: Callable[[Path, Guard], RunRecord], lease: float = 0.0
) -> tuple[RunRecord, bool] | None:
    """Trains a run in its folder, or reads the result that is already there.

    train: trains the run in the folder that it is given, and returns the record. It is given a
      function, too, to call before each write.
    lease: as `held` takes it.
    Returns the record and whether it was trained here, or None if another process is doing the
    run. Raises what `train` raises.
    """
    folder = run_dir(workdir, spec.run_id)
    with held(folder, lease) as guard:
        if guard is None:
            return None
        record = read_record(folder, spec.run_id)
        if record is not None:
            return record, False
        record = train(folder, guard)
        remove(folder / "failure.json")
        return record, True
