"""An engine of schedulers that start each run as a process of its own. News comes by files.

WORKDIR/tasks/NAME/ has what one submission needs and leaves, see workers/task.py. The scheduler
knows the submission by the same NAME, so a launcher that is started again finds its tasks there.
Two launchers on one folder that follow the same task see it end alike.
"""

import errno
import secrets
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modjax import bucket
from modjax.backend import last_line
from modjax.errors import MOST_SAID, InputError, one_line, require
from modjax.files import entries, is_copy, read, read_json, reason, remove
from modjax.metrics_file import last_step
from modjax.records import run_dir, write_json
from modjax.scaling.engines.engine import Event, raise_for_all
from modjax.scaling.workers.task import Tasks, read_tasks
from modjax.scaling.workers.worker import Settings, environment
from modjax.specs import RunSpec, to_dict

UNDER_WAY = WAITING, RUNNING = "waiting", "running"
MOST_AT_ONCE = 1000  # tasks of a submission: Slurm's usual limit
SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_OF_LAG = 60.0  # until a file that another machine wrote is seen, as NFS has it
SECONDS_TO_ANSWER = 60.0  # of a scheduler's program
SECONDS_BETWEEN_METRICS = 60.0
States = Mapping[tuple[str, int], tuple[str, str]]


@dataclass
class Task:
    """A run under way, or the check of all, which has no run id.

    folder, number: where it is described, as in workers/task.py.
    state: WAITING or RUNNING, or "" if it is not yet known.
    step: the last one that the run has logged.
    gone: when the scheduler was first seen without it, as time.monotonic; its event; and why.
    pulled: when its metrics were last fetched from a bucket.
    """

    run_id: str
    folder: Path
    number: int
    state: str = WAITING
    step: int = 0
    gone: tuple[float, str, str] | None = None
    pulled: float = float("-inf")

    @property
    def file(self) -> Path:
        return self.folder / f"{self.number}.json"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.number}.log"


class Batch(ABC):
    """Engine that submits runs to a scheduler.

    jobs: how many it does at a time; 0 leaves it to the scheduler.
    together, again: as in Tasks.
    """

    seconds_to_stop = 90.0
    runs_there = "python", sys.executable  # named when it does not

    def __init__(self, settings: Settings, runs: int, jobs: int, together: bool, again: str):
        self.settings, self.workdir = settings, bucket.local(settings.workdir)
        accepted = "must be a folder that all hosts of a run share, no bucket"
        require(not (together and is_copy(self.workdir)), "--workdir", settings.workdir, accepted)
        self.makes_workdir, self.home = not self.workdir.exists(), self.workdir / "tasks"
        self.jobs, self.slots = jobs, min(jobs or runs, runs)
        self.runs, self.together, self.again = runs, together, again
        self.tasks: dict[str, Task] = {}  # by run id
        self.earlier: dict[str, Task] = {}  # of earlier launchers
        self.unsent: dict[Path, int] = {}  # folder -> its number of tasks
        self.checked, self.looked = False, float("-inf")
        self.said: set[str] = set()

    @abstractmethod
    def submit(self, folder: Path, numbers: Sequence[int]) -> None:
        """Submits tasks of a folder, under its name.

        Raises OSError, after which those that the scheduler lacks are submitted again.
        """

    @abstractmethod
    def look(self) -> States:
        """Returns the states of the tasks that the scheduler knows, by folder's name and number.

        A state is WAITING, RUNNING, or the kind of an Event, each with an explanation. Raises
        OSError if the scheduler does not answer.
        """

    @abstractmethod
    def cancel(self, names: Sequence[str], save: bool) -> None:
        """Cancels the waiting tasks of submissions, and stops those that run.

        save: whether they get the time to save their state. Raises OSError.
        """

    def where_to_read(self, task: Task) -> str:
        """Returns where the user finds what the process of a task has printed."""
        return f"see {task.log}"

    def check(self, specs: Sequence[RunSpec]) -> None:
        self.earlier = self._earlier()
        new = [to_dict(spec) for spec in specs if spec.run_id not in self.earlier]
        self.checked = not new  # the earlier ones have been
        if new:
            self._plan([{"check": new}], [""])

    def room(self) -> int:
        return min(self.jobs - len(self.tasks), MOST_AT_ONCE) if self.jobs else MOST_AT_ONCE

    def start(self, specs: Sequence[RunSpec]) -> None:
        new = [spec for spec in specs if spec.run_id not in self.earlier]
        for spec in specs:
            if task := self.earlier.pop(spec.run_id, None):
                self.tasks[spec.run_id] = task
        if new:
            self._plan([{"spec": to_dict(spec)} for spec in new], [spec.run_id for spec in new])

    def events(self, seconds: float) -> Iterator[Event]:
        time.sleep(seconds)
        if self.checked:
            self.checked = False
            yield Event("checked")
        if time.monotonic() - self.looked > SECONDS_BETWEEN_LOOKS:
            try:
                yield from self._compare(self.look())
                self._pull(self.tasks.values())
            except OSError as error:
                yield from self._note(f"{reason(error)}; trying again")
            self.looked = time.monotonic()
        folders = {task.folder for task in self.tasks.values()}
        there = {file for folder in folders for file in entries(folder)}
        for task in list(self.tasks.values()):
            if event := self._end(task, task.file in there):
                del self.tasks[task.run_id]
                yield event

    def stop(self, received: Sequence[int]) -> bool:
        running, began = list(self.tasks.values()), time.monotonic()
        if not received:  # no order, but an error: another launcher finds them
            return not running
        self.tasks = {}
        names, save = {task.folder.name for task in running}, True
        while names and save:
            save = len(received) < 2 and time.monotonic() - began < self.seconds_to_stop
            with suppress(OSError):
                self.cancel(sorted(names), save)
            with suppress(OSError):
                living = {name for (name, _), (kind, _) in self.look().items() if kind in UNDER_WAY}
                names &= living
            time.sleep(1.0 if names and save else 0.0)
        with suppress(OSError):
            self._pull(running)
        return all(task.state == WAITING or task.file.exists() for task in running)

    def _pull(self, tasks: Iterable[Task]) -> None:
        """Fetches how tasks have ended, if the workdir is a bucket. Raises OSError."""
        files = {f"{task.folder.name}/{task.file.name}": task.file for task in tasks}
        if files and is_copy(self.home):
            there = set(bucket.names(self.home))
            there |= {name for name, file in files.items() if file.exists()}
            bucket.get(self.home, there.intersection(files))

    def _plan(self, orders: list[dict[str, Any]], runs: list[str]) -> None:
        """Writes tasks into a folder, which is submitted after the next look."""
        folder = self.home / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder.mkdir(parents=True)
        tasks = Tasks(self.settings, tuple(orders), tuple(runs), self.together, self.again)
        write_json(folder / "tasks.json", to_dict(tasks))
        self.unsent[folder] = len(runs)
        self.tasks |= {run_id: Task(run_id, folder, i) for i, run_id in enumerate(runs)}

    def _earlier(self) -> dict[str, Task]:
        """Returns the runs that wait or run already, by their ids."""
        states, found = self.look(), {}
        for folder in {name: self.home / name for name, _ in states}.values():
            with suppress(InputError):  # it belongs to another workdir
                bucket.get(folder, ["tasks.json"])
                tasks = read_tasks(folder)
                if tasks.settings != self.settings:
                    continue
                for number, run_id in enumerate(tasks.runs):
                    kind, _ = states.get((folder.name, number), ("", ""))
                    if run_id and kind in UNDER_WAY:
                        found[run_id] = Task(run_id, folder, number, state="")
        return found

    def _compare(self, states: States) -> Iterator[Event]:
        """Compares the tasks with what the scheduler knows, and submits those that it lacks."""
        for task in self.tasks.values():
            if task.folder in self.unsent and (task.folder.name, task.number) not in states:
                continue
            gone = "node lost", "the scheduler has forgotten its task"
            kind, why = states.get((task.folder.name, task.number), gone)
            if kind not in UNDER_WAY:
                task.gone = task.gone or (time.monotonic(), kind, why)
                continue
            task.gone = None
            if task.run_id and (kind == RUNNING) != (task.state == RUNNING):
                yield Event("started" if kind == RUNNING else "waiting", task.run_id)
            task.state = kind
            if kind == WAITING and not task.run_id:
                yield from self._note("the task that checks the runs waits for its turn")
            if kind == WAITING and why:
                yield from self._note(f"a task waits: {why}")
            if kind == RUNNING and time.monotonic() - task.pulled > SECONDS_BETWEEN_METRICS:
                task.pulled = time.monotonic()
                bucket.get(self._folder(task), ["metrics.jsonl"])
            with suppress(InputError):
                step = last_step(self._folder(task))
                if kind == RUNNING and step > task.step:
                    task.step = step
                    yield Event("progress", task.run_id, step=step)
        for folder, count in list(self.unsent.items()):
            missing = [n for n in range(count) if (folder.name, n) not in states]
            if missing:  # else an error answered a submission that was done
                self.submit(folder, missing)
            del self.unsent[folder]

    def _end(self, task: Task, ended: bool) -> Event | None:
        """Returns how a task has ended, or None if it has not."""
        values = None
        with suppress(InputError):  # it has been started again, and has removed the file
            values = read_json(task.file, "") if ended else None
        since, kind, why = task.gone or (float("inf"), "", "")
        stays = values is not None and values["kind"] != "preempted"  # else it may start again
        if not stays and time.monotonic() - since < SECONDS_OF_LAG:
            return None
        if values is not None:
            kind, why = values["kind"], values["why"]
        elif task.run_id and kind == "died" and not (self._folder(task) / "log.txt").exists():
            why = f"{why}; {self.where_to_read(task)}"  # it ended before the run had a log
        if not task.run_id:
            if kind in ("preempted", "node lost"):
                self._plan(list(read_tasks(task.folder).orders), [""])
                return None
            if kind not in ("checked", "refused", "fault", "disk full"):
                raise self._cannot_run(task, why)
            for name in ("tasks.json", task.file.name):
                remove(task.folder / name)
            shutil.rmtree(task.folder)
            with suppress(OSError):  # unless there is more
                self.home.rmdir()
                if self.makes_workdir:
                    self.home.parent.rmdir()
        raise_for_all(kind, why, task.run_id, self.settings.workdir)
        return Event(kind, task.run_id, why)

    def _cannot_run(self, task: Task, why: str) -> InputError:
        """Returns the error for a check that did not even begin, or met a fault of the program."""
        if task.log.exists():
            why = f"{why}; {last_line(read(task.log, '').decode(errors='replace'))}"
        elif not is_copy(self.home):
            return InputError("--workdir", self.settings.workdir, f"a node does not see it: {why}")
        accepted = f"does no runs there: {why}; {self.where_to_read(task)}"
        return InputError(*self.runs_there, accepted)

    def _folder(self, task: Task) -> Path:
        return run_dir(self.workdir, task.run_id)

    def _note(self, line: str) -> Iterator[Event]:
        if line not in self.said:
            self.said.add(line)
            yield Event("note", why=line)


def call(*command: str, text: str = "") -> str:
    """Returns what a scheduler's program prints. Raises OSError with its last line if it fails."""
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_ANSWER,
            env=environment(),
            start_new_session=True,  # Ctrl-C reaches the launcher alone
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.EIO, f"{command[0]} does not answer") from error
    if done.returncode != 0:
        raise OSError(errno.EIO, one_line(done.stderr, MOST_SAID))
    return done.stdout
