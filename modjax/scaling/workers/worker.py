"""Worker process of engines/pool.py: imports jax once, then does one run after another.

It reads and writes JSON lines. Input: first the Settings, then {"check": specs} or {"spec": spec}.
The end of the input means that the parent is gone or wants the worker to stop. Output:
{"event": EVENT}, one of

  ready      the worker has imported what it needs
  checked    no spec would be refused
  progress   a line of metrics
  done       the run has finished here
  found      the run had its result already
  busy       another process is doing the run
  preempted  SIGTERM: the state of the run is saved, and the worker ends
  refused    bad input, in one line
  out of memory
  fault      an error that would stop every other run as well, in one line
  disk full
  broken     any other exception; the worker ends, so that no other run is affected

Everything that libraries print goes to the run's log.txt.
"""

import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modjax.backend import compilation_cache, starting
from modjax.bucket import Conflict, local, write
from modjax.errors import InputError, Preempted, SharedFault, describe
from modjax.faults import is_out_of_memory, machine_error_line
from modjax.files import is_copy, is_disk_full
from modjax.provenance import fix_settings, require_unchanged
from modjax.records import RunRecord, run_dir
from modjax.scaling.workers.lease import Guard, Lost
from modjax.scaling.workers.run_lock import run
from modjax.specs import Execution, RunSpec, from_dict
from modjax.specs.imports import import_all

SECONDS_BETWEEN_PROGRESS = 0.25
SECONDS_TO_SAVE = 60.0
_logs: list[Path] = []  # that of the run that this process does, or did last
InItsFolder = Callable[
    [RunSpec, Path, Callable[[Path, Guard], RunRecord], float], tuple[RunRecord, bool] | None
]


@dataclass(frozen=True)
class Settings:
    """Settings of a worker, the same for all of its runs.

    job: the module whose `check` and `train` it calls.
    fingerprint: the fingerprint of the data that the plan was made for.
    imports: import name -> file path or module name, see specs.imports.places.
    code: hashes of the source code that the worker must have, see provenance.source_code.
    other_code: whether to resume runs that other code began, see training.loop.train.
    lease: seconds of the leases on runs, 0 for locks, see workers/lease.py.
    cpus: the cores to use; () for all.
    """

    job: str
    workdir: str
    data_dir: str
    fingerprint: str
    execution: Execution
    imports: dict[str, str]
    code: dict[str, str]
    other_code: bool
    lease: float = 0.0
    cpus: tuple[int, ...] = ()


def environment() -> dict[str, str]:
    """Returns the environment variables of a process that does runs."""
    # Whatever libraries print can be written to log.txt, in every locale.
    return os.environ | compilation_cache() | {"PYTHONIOENCODING": "utf-8:backslashreplace"}


def main() -> None:
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print must not mix with the events
    faulthandler.enable()

    def send(event: str, **values: Any) -> None:
        try:
            events.write(json.dumps({"event": event, **values}) + "\n")
        except BrokenPipeError:
            pass  # the parent is gone; _listen ends this process in good order

    try:
        _serve(send)
    except Preempted:
        send("preempted", error="stopped by SIGTERM, state saved")
    except InputError as error:
        send("fault", error=str(error))
    except BaseException as error:
        send("broken", error=describe(error))
        traceback.print_exc()
        send_log()
        os._exit(1)


def _serve(send: Callable[..., None]) -> None:
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    working = threading.Event()
    threading.Thread(target=_listen, args=(lines, working), daemon=True).start()
    message = _next(lines)
    if message is None:
        return
    settings = from_dict(Settings, message)
    job = prepare(settings)
    send("ready")
    while (message := _next(lines)) is not None:
        working.set()
        event, why = do(message, settings, job, functools.partial(send, "progress"))
        send(event, error=why)
        working.clear()
        _forget()


def _forget() -> None:
    """Frees the memory that the last run has left, about 2 MB."""
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it, and keeps freed memory
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _next(lines: queue.SimpleQueue) -> dict[str, Any] | None:
    line = lines.get()
    return None if line is None else json.loads(line)


def _listen(lines: queue.SimpleQueue, working: threading.Event) -> None:
    for line in sys.stdin.buffer:
        lines.put(line)
    lines.put(None)
    if working.is_set():
        os.kill(os.getpid(), signal.SIGTERM)  # training saves its state and stops
    time.sleep(SECONDS_TO_SAVE)
    os._exit(1)


def prepare(settings: Settings) -> Any:
    """Imports what runs need, and returns the job. Raises InputError if something is missing."""
    if settings.cpus:
        os.sched_setaffinity(0, settings.cpus)
    with starting():
        job = importlib.import_module(settings.job)
    import_all(settings.imports, "model.imports")
    require_unchanged(settings.code)
    if "jax" in sys.modules:  # after the imports, which may set something of their own
        fix_settings()
    return job


def do(
    order: Mapping[str, Any],
    settings: Settings,
    job: Any,
    progress: Callable[..., None],
    in_its_folder: InItsFolder = run,
) -> tuple[str, str]:
    """Does {"check": specs} or {"spec": spec}.

    progress: called with `step` and `loss`, at most every SECONDS_BETWEEN_PROGRESS.
    in_its_folder: run_lock.run, or a function like it.
    Returns the event that tells how it ended, and why. Raises what would harm another run.
    """
    try:
        if "check" in order:
            _check(order["check"], settings, job)
            return "checked", ""
        return _run(from_dict(RunSpec, order["spec"]), settings, job, progress, in_its_folder), ""
    except (Lost, Conflict) as error:
        return "busy", str(error)
    except InputError as error:
        return "fault" if isinstance(error, SharedFault) else "refused", str(error)
    except Exception as error:
        line = machine_error_line(error, local(settings.workdir))
        if is_disk_full(error):
            return "disk full", ""
        if "check" in order and line is not None:
            return "fault", line
        if not is_out_of_memory(error):
            raise
        traceback.print_exc()
        return "out of memory", line or ""


def _check(specs: list[Any], settings: Settings, job: Any) -> None:
    job.check(
        [from_dict(RunSpec, spec) for spec in specs],
        settings.execution,
        data_dir=Path(settings.data_dir),
        fingerprint=settings.fingerprint,
    )


def _run(
    spec: RunSpec,
    settings: Settings,
    job: Any,
    progress: Callable[..., None],
    in_its_folder: InItsFolder,
) -> str:
    last_sent = 0.0

    def report(line: dict[str, Any]) -> None:
        nonlocal last_sent
        if "mesh" in line:
            said = f"mesh: {line['mesh']}; remat: {line['remat']}"
            print(f"modjax: {said}", flush=True)  # to its log
            progress(step=0, loss=None, error=said)
        elif time.monotonic() - last_sent > SECONDS_BETWEEN_PROGRESS:
            last_sent = time.monotonic()
            progress(step=line.get("step"), loss=line.get("loss"))

    def train(folder: Path, guard: Guard) -> RunRecord:
        _print_to(folder / "log.txt")  # of an earlier process elsewhere, if it is in a bucket
        _logs[:] = [folder / "log.txt"]
        try:
            return job.train(
                spec,
                settings.execution,
                run_dir=folder,
                data_dir=Path(settings.data_dir),
                fingerprint=settings.fingerprint,
                progress=report,
                other_code=settings.other_code,
                guard=guard,
            )
        except (Lost, Conflict):
            _logs.clear()  # it is another process's now
            raise
        finally:
            send_log()

    workdir = local(settings.workdir)
    if is_copy(workdir):
        run_dir(workdir, spec.run_id).mkdir(parents=True, exist_ok=True)
    _print_to(run_dir(workdir, spec.run_id) / "log.txt")
    done = in_its_folder(spec, workdir, train, settings.lease)
    if done is None:
        return "busy"
    _, here = done
    return "done" if here else "found"


def send_log() -> None:
    """Copies the log of the last run of this process to its bucket, if it has one."""
    sys.stdout.flush()
    sys.stderr.flush()
    for path in filter(is_copy, _logs):
        with contextlib.suppress(OSError):
            write(path, path.read_bytes())


def _print_to(path: Path) -> None:
    sys.stdout.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


if __name__ == "__main__":
    main()
