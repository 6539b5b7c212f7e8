"""A worker process of engines/local.py: it imports jax once, then does runs one after another.

It speaks JSON lines. In: first the settings, then one {"spec"} per run; the end of input means
that the parent is gone or wants it to stop. Out: {"event": "ready" | "progress" | "done" | "busy" |
"refused" | "disk full"}. A run that fails in any other way ends the process, so that nothing it
broke reaches the next run. Everything printed goes to the run's log.txt.
"""

import faulthandler
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from modjax.config import Execution, InputError, RunSpec, from_dict
from modjax.files import is_disk_full
from modjax.records import run_dir
from modjax.scaling.run import Train, run

SECONDS_BETWEEN_PROGRESS = 0.25
SECONDS_TO_SAVE = 60.0


def main() -> None:
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not mix with the events
    faulthandler.enable()

    def send(event: str, **values: Any) -> None:
        try:
            events.write(json.dumps({"event": event, **values}) + "\n")
        except BrokenPipeError:
            pass  # the parent is gone; _listen ends this process in good order

    settings = json.loads(sys.stdin.readline())
    if settings["cpus"]:
        os.sched_setaffinity(0, settings["cpus"])
    requests: queue.SimpleQueue[RunSpec | None] = queue.SimpleQueue()
    working = threading.Event()
    threading.Thread(target=_listen, args=(requests, working), daemon=True).start()
    module, _, name = settings["train"].partition(":")
    train = getattr(importlib.import_module(module), name)
    send("ready")
    while (spec := requests.get()) is not None:
        working.set()
        event, values = _run(spec, settings, train, send)
        send(event, **values)
        working.clear()


def _listen(requests: queue.SimpleQueue, working: threading.Event) -> None:
    for line in sys.stdin:
        requests.put(from_dict(RunSpec, json.loads(line)["spec"]))
    requests.put(None)
    if working.is_set():
        os.kill(os.getpid(), signal.SIGTERM)  # training saves its state and stops
    time.sleep(SECONDS_TO_SAVE)
    os._exit(1)


def _run(spec: RunSpec, settings: dict[str, Any], train: Train, send: Any) -> tuple[str, dict]:
    workdir = Path(settings["workdir"])
    last_sent = 0.0

    def progress(line: dict[str, Any]) -> None:
        nonlocal last_sent
        if time.monotonic() - last_sent > SECONDS_BETWEEN_PROGRESS:
            last_sent = time.monotonic()
            send("progress", step=line.get("step"), loss=line.get("loss"))

    try:
        folder = run_dir(workdir, spec.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        _print_to(folder / "log.txt")
        record = run(
            spec,
            from_dict(Execution, settings["execution"]),
            workdir=workdir,
            data_dir=Path(settings["data_dir"]),
            train=train,
            progress=progress,
        )
    except InputError as error:
        return "refused", {"error": str(error)}
    except BaseException as error:
        if is_disk_full(error):
            return "disk full", {}
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    return ("busy" if record is None else "done"), {}


def _print_to(path: Path) -> None:
    sys.stdout.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


if __name__ == "__main__":
    main()
