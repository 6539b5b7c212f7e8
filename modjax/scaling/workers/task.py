"""One run, or the check of all, in a process of its own: `python -P -m THIS_MODULE FOLDER NUMBER`.

The process does task NUMBER of FOLDER/tasks.json, which holds Tasks. FOLDER may be in a bucket.
FOLDER/NUMBER.json then says how it ended: {"kind": KIND, "why": LINE}, with the events of
workers/worker.py, or "died". After SIGTERM or SIGUSR2, training saves its state. After SIGUSR2, the
task asks to be started again.

Exit codes: 0 finished, checked, or done by another process; 75 stopped by a signal; 1 other ends.
"""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from modjax.bucket import get, local
from modjax.errors import InputError, Preempted, describe
from modjax.files import remove
from modjax.records import read_as, write_json
from modjax.scaling.workers.run_lock import run
from modjax.scaling.workers.worker import Settings, do, prepare, send_log
from modjax.specs import from_dict

STOPPED = 75
CODES = {"done": 0, "found": 0, "busy": 0, "checked": 0, "preempted": STOPPED}


@dataclass(frozen=True)
class Tasks:
    """Content of tasks.json.

    orders: the {"spec": spec} or {"check": specs} of each number, as workers/worker.py does them.
    runs: the run id of each number, "" for a check.
    together: whether several processes do each, see workers/distributed.py.
    again: shell command by which a task asks to be started again; "" if its exit code says so.
    """

    settings: Settings
    orders: tuple[dict[str, Any], ...]
    runs: tuple[str, ...]
    together: bool = False
    again: str = ""


def read_tasks(folder: Path) -> Tasks:
    return read_as(lambda values: from_dict(Tasks, values), folder / "tasks.json", "start anew")


def main(folder: Path, number: int) -> NoReturn:
    faulthandler.enable()
    get(folder, ["tasks.json", f"{number}.json"])
    tasks, file, rank = read_tasks(folder), folder / f"{number}.json", 0
    asked: list[int] = []  # SIGUSR2: to make room, and be started again; SIGTERM may be a cancel

    def end(kind: str, why: str) -> NoReturn:
        for number_of_signal in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number_of_signal, signal.SIG_IGN)
        stopped = kind == "preempted"
        # A failure of one process stops the others, which must not hide it.
        if (rank == 0 and not (stopped and file.exists())) or kind not in CODES:
            # The exit code says that it was stopped, if a bucket does not answer.
            with contextlib.suppress(*([OSError] if stopped else [])):
                write_json(file, {"kind": kind, "why": why})
        if rank == 0 and stopped and tasks.again and asked:
            subprocess.run(tasks.again, shell=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(CODES.get(kind, 1))

    # Training replaces it while there is something to save.
    signal.signal(signal.SIGTERM, lambda *_: end("preempted", "stopped before it began"))

    def make_room(number_of_signal: int, frame: Any) -> None:
        asked.append(number_of_signal)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGUSR2, make_room)
    in_its_folder = run
    try:
        if tasks.together:
            from modjax.scaling.workers.distributed import join, run_together

            try:
                rank, in_its_folder = join(), run_together
            except InputError as error:  # a fault of this job, but not of all others
                end("died", str(error))
        if rank == 0:
            remove(file)  # of the time before it was stopped
        settings = tasks.settings
        job = prepare(settings)
        end(*do(tasks.orders[number], settings, job, lambda **_: None, in_its_folder))
    except Preempted as error:
        end("preempted", str(error))
    except InputError as error:
        end("fault", str(error))
    except BaseException as error:
        traceback.print_exc()
        send_log()
        end("died", describe(error))


if __name__ == "__main__":
    main(local(sys.argv[1]), int(sys.argv[2]))
