"""An engine of worker processes that do one run after another, and so import jax only once."""

import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from modjax.backend import last_line
from modjax.errors import InputError
from modjax.scaling.engines.engine import Event, describe_exit, raise_for_all
from modjax.scaling.workers.worker import Settings
from modjax.specs import RunSpec, to_dict

MAX_FAILED_STARTS = 3
SECONDS_OF_CHECKING = 5.0  # after which one line says what the sweep waits for
# JAX keeps some 1.5 MB of every run that a process has traced; starting another takes seconds.
RUNS_OF_A_WORKER = 24
# A signal that ends the workers may have been sent to this process, too: wait for it.
SECONDS_TO_RESTART = 0.2
SECONDS_TO_STOP = 90.0


class Worker(ABC):
    """Worker slot, whose process is replaced when it dies.

    living: whether it has a process.
    ready: whether the process has imported what it needs.
    spec: the run under way.
    error: the exception that the process reported before it ended.
    runs: the number of runs assigned to this process.
    heard, ended: when the last message arrived, and when the last process ended, in seconds of
      time.monotonic.
    """

    def __init__(self):
        self.spec: RunSpec | None = None
        self.living = self.ready = self.begun = False
        self.error: str | None = None
        self.runs, self.heard, self.ended = 0, 0.0, float("-inf")

    @abstractmethod
    def start(self, settings: Settings) -> None:
        """Starts a process, and sends it the settings."""

    @abstractmethod
    def send(self, message: dict[str, Any]) -> None:
        """Sends a message, unless the process has died."""

    @abstractmethod
    def close(self) -> None:
        """Asks the process to save the state of its run and to end."""

    @abstractmethod
    def kill(self) -> None: ...

    @abstractmethod
    def has_ended(self) -> bool: ...

    @abstractmethod
    def end(self) -> tuple[int | None, str]:
        """Waits for the end. Returns the exit code, and what was printed outside of runs.

        A process whose machine has gone has no exit code, and the text says what is known.
        """


class Pool(ABC):
    """Engine whose workers talk as workers/worker.py says. A subclass says where they are."""

    def __init__(self, workers: Sequence[Worker], settings: Settings):
        self.workers, self.settings, self.slots = list(workers), settings, len(workers)
        self.queue: deque[RunSpec] = deque()
        self.unchecked: list[RunSpec] = []
        self.checker: Worker | None = None
        self.failed_starts, self.said_checking = 0, False
        self.last_words = ""
        try:
            for worker in self.workers:
                self._start(worker)
        except BaseException:
            self.stop(())
            raise

    @abstractmethod
    def receive(self, seconds: float) -> Iterator[tuple[Worker, dict[str, Any]]]:
        """Yields messages of the workers; {"event": "died"} when a worker has ended."""

    def settings_of(self, worker: Worker) -> Settings:
        """Returns the settings of one worker."""
        return self.settings

    def check(self, specs: Sequence[RunSpec]) -> None:
        self.unchecked = list(specs)

    def room(self) -> int:
        busy = sum(worker.spec is not None for worker in self.workers)
        return len(self.workers) - busy - len(self.queue)

    def start(self, specs: Sequence[RunSpec]) -> None:
        self.queue.extend(specs)

    def events(self, seconds: float) -> Iterator[Event]:
        for worker in self.workers:
            rested = time.monotonic() - worker.ended > SECONDS_TO_RESTART
            if not worker.living and rested and (self.queue or self.unchecked):
                self._start(worker)
            if worker.ready and self.unchecked and self.checker is None:
                self.checker = worker
                worker.send({"check": [to_dict(spec) for spec in self.unchecked]})
            if worker.ready and worker.spec is None and self.queue:
                if worker.runs >= RUNS_OF_A_WORKER:
                    worker.close()  # it ends, and another takes its place
                else:
                    yield self._assign(worker)
        for worker, message in self.receive(seconds):
            worker.heard = time.monotonic()
            yield from self._heard(worker, message)
        checker = None if self.said_checking else self.checker
        if checker is not None and time.monotonic() - checker.heard > SECONDS_OF_CHECKING:
            self.said_checking = True
            yield Event("note", why="checking what the layers claim: seconds for each new one")

    def stop(self, received: Sequence[int]) -> bool:
        living = [worker for worker in self.workers if worker.living]
        for worker in living:
            worker.close()
        deadline = time.monotonic() + SECONDS_TO_STOP
        while not all([worker.has_ended() for worker in living]):
            if time.monotonic() > deadline or len(received) > 1:
                for worker in living:
                    worker.kill()
            time.sleep(0.02)
        return all([_lost_nothing(worker, self._end(worker)) for worker in living])

    def _start(self, worker: Worker) -> None:
        worker.error, worker.runs, worker.ready = None, 0, False
        worker.start(self.settings_of(worker))
        worker.living = True

    def _end(self, worker: Worker) -> int | None:
        code, self.last_words = worker.end()
        worker.living, worker.ready, worker.ended = False, False, time.monotonic()
        return code

    def _assign(self, worker: Worker) -> Event:
        worker.spec, worker.begun = self.queue.popleft(), False
        worker.runs += 1
        worker.send({"spec": to_dict(worker.spec)})
        return Event("started", worker.spec.run_id)

    def _heard(self, worker: Worker, message: dict[str, Any]) -> Iterator[Event]:
        event, why = message["event"], message.get("error", "")
        if event == "ready":
            worker.ready = True
        elif event == "checked":
            self.unchecked, self.checker = [], None
            yield Event("checked")
        elif event == "broken":
            worker.error = why
        elif event == "died":
            yield from self._died(worker)
        else:
            run_id = worker.spec.run_id if worker.spec else ""
            raise_for_all(event, why, run_id, self.settings.workdir)
            if event == "progress":
                worker.begun = True
                yield Event(event, run_id, why, message["step"], message["loss"])
            else:
                worker.spec, self.failed_starts = None, 0
                yield Event(event, run_id, why)

    def _died(self, worker: Worker) -> Iterator[Event]:
        """Yields how the run of a worker ended. Raises if workers cannot start."""
        was_ready, was_checker = worker.ready, worker is self.checker
        code = self._end(worker)
        how = worker.error or (self.last_words if code is None else describe_exit(code))
        asked_to = code == -signal.SIGTERM  # by whoever runs this machine: no fault of the run
        if was_checker:
            self.checker = None
        if (was_checker or not was_ready) and not asked_to and code is not None:
            self.failed_starts += 1
            if self.failed_starts >= MAX_FAILED_STARTS:
                raise self._cannot_start(worker, how)
        if worker.spec is not None:
            spec, worker.spec = worker.spec, None
            kind = "preempted" if asked_to else "node lost" if code is None else "died"
            yield Event(kind, spec.run_id, how)

    def _cannot_start(self, worker: Worker, how: str) -> Exception:
        """Returns the error for failed starts: RuntimeError if a worker raised, else InputError."""
        if worker.error is not None:
            fault = RuntimeError(f"workers cannot start: {how}")
            fault.add_note(self.last_words)
            return fault
        said = f"died {self.failed_starts} times before it had a run: {last_line(self.last_words)}"
        return InputError("worker", how, said)


def _lost_nothing(worker: Worker, code: int | None) -> bool:
    """Returns whether a worker that ended with `code` saved its run, or had nothing to save."""
    # SIGTERM ends a worker by itself only until its training listens for it.
    unbegun = code == -signal.SIGTERM and not worker.begun
    return code == 0 or worker.spec is None or unbegun
