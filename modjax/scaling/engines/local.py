"""Scheduler of a sweep on local worker processes: assigns runs, retries them, and shuts down.

A worker does many runs, so that it imports jax only once. Each worker has its own cores, so that
the workers' XLA threads do not compete. All state is in the folders: a run is done when its
result.json exists, and in progress while a process holds its lock.
"""

import contextlib
import errno
import os
import selectors
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modjax.errors import InputError
from modjax.files import WatchedFolder, read
from modjax.records import read_record, run_dir, write_json
from modjax.scaling.engines.progress import Display
from modjax.scaling.engines.run_lock import is_running
from modjax.scaling.engines.worker import Settings
from modjax.scaling.engines.worker_handle import (
    Refused,
    Worker,
    cannot_start,
    describe_exit,
    end_all,
    share_of_cores,
    signals,
)
from modjax.scaling.formatting import clock
from modjax.specs import RunSpec, to_dict

MAX_ATTEMPTS = 2
MAX_FAILED_STARTS = 3
SECONDS_OF_SILENCE = 300.0
SECONDS_OF_CHECKING = 5.0  # after which one line says what the sweep waits for
# JAX keeps some 1.5 MB of every run that a process has traced; starting another takes seconds.
RUNS_OF_A_WORKER = 24
# A signal that ends the workers may have been sent to this process, too: wait for it.
SECONDS_TO_RESTART = 0.2
LOG_LINES, LOG_BYTES = 20, 65_536  # of the end of a log


class Stopped(Exception):
    """A signal ended the sweep. saved: whether every worker had saved its state."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.is_interrupt = signum == signal.SIGINT
        self.saved = True


class Session:
    """One invocation of a sweep: `run` returns when every run is finished or given up.

    finished: ids of the runs that this session's workers finished.
    found: ids of the runs that other sessions finished meanwhile.
    failures: run id -> why the run was given up.
    home: the sweep's folder; None until the plan is written there.
    """

    def __init__(
        self, specs: Sequence[RunSpec], settings: Settings, jobs: int, flops_per_second: float
    ):
        self.settings, self.workdir = settings, Path(settings.workdir)
        self.home: WatchedFolder | None = None
        self.finished: list[str] = []
        self.found: list[str] = []
        self.failures: dict[str, str] = {}
        self.attempts: Counter[str] = Counter()
        self.failed_starts = 0
        self.display = Display(specs, jobs, flops_per_second)
        self.elsewhere: list[RunSpec] = []  # runs that another sweep on this folder is doing
        self.waiting = deque(spec for spec in specs if self._is_open(spec))
        self.workers = [Worker(i) for i in range(min(jobs, len(self.waiting)))]
        self.selector = selectors.DefaultSelector()
        self.checker: Worker | None = None
        self.checked = not self.waiting
        self.said_idle = self.said_checking = False

    def run(self, claim: Callable[[], None]) -> None:
        """Does the runs.

        claim: writes the plan. Called once, when a worker has found no run that would be refused.
        """
        with signals() as self.received, self.display:
            try:
                while not self.checked:
                    self._handle_messages()
                claim()
                self.home = WatchedFolder(self.workdir)
                while self.waiting or self.elsewhere or any(w.spec for w in self.workers):
                    self._handle_messages()
                    self._assign()
                    self.display.update(self.workers, len(self.elsewhere))
            except Stopped as stopped:
                stopped.saved = self._stop()
                raise
            finally:
                self._stop()
                self.selector.close()

    # Mechanism: the workers are started, heard and stopped.

    def _handle_messages(self) -> None:
        """Handles the workers' messages, and replaces the workers that have died."""
        if self.received:
            raise Stopped(self.received[0])
        for worker in self.workers:
            rested = time.monotonic() - worker.ended > SECONDS_TO_RESTART
            if worker.process is None and rested and (self.waiting or self.elsewhere):
                self._start(worker)
            if worker.ready and not self.checked and self.checker is None:
                self.checker = worker
                worker.send({"check": [to_dict(spec) for spec in self.waiting]})
        for key, _ in self.selector.select(timeout=0.5 if self.selector.get_map() else 0):
            for message in key.data.receive():
                self._handle(key.data, message)
        self._note_silence()

    def _note_silence(self) -> None:
        now = time.monotonic()
        checker = None if self.checked or self.said_checking else self.checker
        if checker is not None and now - checker.heard > SECONDS_OF_CHECKING:
            self.said_checking = True
            self.display.note("checking what the layers claim: seconds for each new one")
        for worker in self.workers:
            if worker.spec is not None and now - worker.heard > SECONDS_OF_SILENCE:
                worker.heard = now
                said = f"no progress for {clock(SECONDS_OF_SILENCE)}, compiling or stuck"
                log = self._folder(worker.spec) / "log.txt"
                self.display.note(f"{worker.spec.run_id}: {said}; see {log}")

    def _start(self, worker: Worker) -> None:
        cores = share_of_cores(worker.index, len(self.workers))
        worker.start(to_dict(replace(self.settings, cpus=tuple(cores))))
        self.selector.register(worker.output, selectors.EVENT_READ, worker)

    def _handle(self, worker: Worker, message: dict[str, Any]) -> None:
        event = message["event"]
        if event == "ready":
            worker.ready = True
        elif event == "checked":
            self.checked = True
        elif event == "progress":
            if worker.step == 0:
                worker.first_step, worker.first_seen = message["step"], time.monotonic()
            worker.step = message["step"]
            worker.loss = worker.loss if message["loss"] is None else message["loss"]
        elif event == "broken":
            worker.error = message["error"]
        elif event == "died":
            self._worker_died(worker)
        elif event == "fault" or (event == "refused" and worker.spec is None):
            raise Refused(message["error"])
        elif event == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.workdir))
        else:
            self._run_ended(worker.release(), event, message)

    def _stop(self) -> bool:
        """Ends the workers. Returns whether every run under way has saved its state."""
        living = [worker for worker in self.workers if worker.process is not None]
        busy = sum(worker.spec is not None for worker in living)
        if busy and self.received:
            self.display.note(f"stopping: {busy} run(s) save their state; a second signal kills")
        return end_all(living, self.received)

    # Policy: which runs are open, assigned, done once more, finished or given up.

    def _is_open(self, spec: RunSpec) -> bool:
        """Returns whether a run is still to be done. Gives up one whose result cannot be read."""
        try:
            record = read_record(self._folder(spec), spec.run_id)
        except InputError as error:
            self.failures[spec.run_id] = str(error)
            return False
        if record is not None:
            self.display.found(record)
        return record is None

    def _assign(self) -> None:
        """Gives every idle worker a run."""
        for worker in self.workers:
            if not (worker.ready and worker.spec is None and self.waiting):
                continue
            if worker.runs >= RUNS_OF_A_WORKER:
                worker.close_input()  # it ends, and another takes its place
                continue
            self._require_home()
            worker.assign(self.waiting.popleft())
        if not self.waiting:
            self._poll_other_sweeps()

    def _poll_other_sweeps(self) -> None:
        """Records runs that other sweeps on this folder finished; requeues runs they dropped."""
        for spec in list(self.elsewhere):
            if is_running(self._folder(spec)):
                continue
            self.elsewhere.remove(spec)
            if (self._folder(spec) / "result.json").exists():
                self._finish(spec, here=False)
            else:
                self.waiting.append(spec)
        idle = not self.waiting and not any(worker.spec for worker in self.workers)
        if self.elsewhere and idle and not self.said_idle:
            self.said_idle = True
            names = ", ".join(spec.run_id for spec in self.elsewhere)
            self.display.note(f"nothing left to do but to wait for another sweep's {names}")

    def _run_ended(self, spec: RunSpec, event: str, message: dict[str, Any]) -> None:
        """Handles the last event of a run: `event` tells how the run ended."""
        self.failed_starts = 0
        if event == "busy":
            self.elsewhere.append(spec)
        elif event == "preempted":
            self.waiting.appendleft(spec)
            self.display.note(f"{spec.run_id}: stopped by SIGTERM, state saved; once more")
        elif event == "refused":
            if not self.finished:  # most likely all runs would be: say it once and stop
                raise Refused(message["error"])
            self._give_up(spec, message["error"])
        else:
            self._finish(spec, here=event == "done")

    def _worker_died(self, worker: Worker) -> None:
        """Retries or gives up the run of a worker that ended. Raises if workers cannot start."""
        was_ready, was_checker = worker.ready, worker is self.checker and not self.checked
        self.selector.unregister(worker.output)
        code = worker.end()
        how = worker.error or describe_exit(code)
        asked_to = code == -signal.SIGTERM  # by whoever runs this machine: no fault of the run
        if was_checker:
            self.checker = None
        if (was_checker or not was_ready) and not asked_to:
            self.failed_starts += 1
            if self.failed_starts >= MAX_FAILED_STARTS:
                raise cannot_start(worker, how, self.failed_starts)
        if worker.spec is None:
            return
        spec = worker.release()
        self._require_home()
        self.attempts[spec.run_id] += not asked_to
        if (self._folder(spec) / "result.json").exists():
            self._finish(spec, here=True)  # it died between its result and saying so
        elif self.attempts[spec.run_id] < MAX_ATTEMPTS:
            self.display.note(f"{spec.run_id}: {how}; once more")
            self.waiting.appendleft(spec)
        else:
            self._give_up(spec, how)

    def _finish(self, spec: RunSpec, here: bool) -> None:
        self._require_home()
        try:
            record = read_record(self._folder(spec), spec.run_id)
        except InputError as error:
            return self._give_up(spec, str(error))
        if record is None:
            return self._give_up(spec, "its result.json has gone")
        if here:
            self.finished.append(spec.run_id)
            self.display.finished(record)
        else:
            self.found.append(spec.run_id)
            self.display.found(record)

    def _give_up(self, spec: RunSpec, why: str) -> None:
        log, tail = self._folder(spec) / "log.txt", []
        with contextlib.suppress(InputError):
            tail = read(log, "", last=LOG_BYTES).decode(errors="replace").splitlines()[-LOG_LINES:]
        failure = {"run_id": spec.run_id, "why": why, "log": tail}
        write_json(self._folder(spec) / "failure.json", failure)
        self.failures[spec.run_id] = why
        self.display.note(f"{spec.run_id}: given up, {why}; see {log}")

    def _require_home(self) -> None:
        assert self.home is not None
        self.home.check()

    def _folder(self, spec: RunSpec) -> Path:
        return run_dir(self.workdir, spec.run_id)
