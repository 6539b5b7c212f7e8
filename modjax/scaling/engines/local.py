"""Runs a plan on local worker processes: it assigns, watches, retries, and stops in good order.

Workers live as long as the sweep, so that jax is imported once per worker and not once per run;
each has its own share of the cores, so that XLA's threads fit. The folders hold the truth: a run
is done when its result.json is there, and belongs to whoever holds its lock.
"""

import errno
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from modjax.config import Execution, InputError, RunSpec, to_dict
from modjax.records import read_record, run_dir, write_json
from modjax.scaling.display import Display
from modjax.scaling.run import compilation_cache, is_running

MAX_ATTEMPTS = 2
MAX_FAILED_STARTS = 3
SECONDS_TO_STOP = 90.0
LOG_LINES = 20


class Stopped(Exception):
    """A signal ended the sweep; the workers saved their state."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.is_interrupt = signum == signal.SIGINT


class Refused(InputError):
    """A worker refused its run as bad input, in the worker's own words."""

    def __init__(self, line: str):
        ValueError.__init__(self, line)


@dataclass
class Worker:
    """A place for a process; the process in it changes when one dies."""

    index: int
    process: subprocess.Popen | None = None
    errors: IO[bytes] | None = None
    unread: bytes = b""
    ready: bool = False
    spec: RunSpec | None = None
    began: float = 0.0
    step: int = 0
    loss: float | None = None
    first_step: int = 0  # the first step reported, and when: what comes before is compilation
    first_seen: float = 0.0
    busy_seconds: float = 0.0


@dataclass
class Session:
    """One call of a sweep: `run` returns when every run is finished or given up.

    finished: run ids that this session's workers finished. failures: run_id -> why it was given
    up after `MAX_ATTEMPTS`.
    """

    specs: Sequence[RunSpec]
    execution: Execution
    workdir: Path
    data_dir: Path
    jobs: int
    train: str
    flops_per_second: float
    finished: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)

    def run(self) -> None:
        self.waiting = deque(s for s in self.specs if self._record(s) is None)
        self.elsewhere: list[RunSpec] = []  # another sweep on this folder is doing these
        self.attempts: Counter[str] = Counter()
        self.failed_starts = 0
        self.selector = selectors.DefaultSelector()
        self.display = Display(self.specs, self.jobs, self.flops_per_second)
        for spec in self.specs:
            if (record := self._record(spec)) is not None:
                self.display.finished(record, announce=False)
        self.workers = [Worker(i) for i in range(min(self.jobs, len(self.waiting)))]
        with _signals() as received, self.display:
            try:
                for worker in self.workers:
                    self._start(worker)
                while self._is_unfinished():
                    if received:
                        raise Stopped(received[0])
                    self._step()
            finally:
                self._stop(received)

    def _is_unfinished(self) -> bool:
        return bool(self.waiting or self.elsewhere or any(w.spec for w in self.workers))

    def _record(self, spec: RunSpec) -> Any:
        return read_record(run_dir(self.workdir, spec.run_id))

    def _step(self) -> None:
        for worker in self.workers:
            if worker.ready and worker.spec is None and self.waiting:
                self._assign(worker, self.waiting.popleft())
        if not self.waiting:
            self._look_elsewhere()
        for key, _ in self.selector.select(timeout=0.5):
            self._receive(key.data)
        self.display.update(self.workers, len(self.elsewhere))

    def _start(self, worker: Worker) -> None:
        worker.errors = tempfile.TemporaryFile()
        worker.process = subprocess.Popen(
            [sys.executable, "-m", "modjax.scaling.engines.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=worker.errors,
            env={**os.environ, **compilation_cache()},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which stops the workers
        )
        worker.unread, worker.ready, worker.spec = b"", False, None
        self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        self._send(
            worker,
            {
                "cpus": _share_of_cores(worker.index, len(self.workers)),
                "train": self.train,
                "workdir": str(self.workdir),
                "data_dir": str(self.data_dir),
                "execution": to_dict(self.execution),
            },
        )

    def _send(self, worker: Worker, message: dict[str, Any]) -> None:
        assert worker.process is not None and worker.process.stdin is not None
        try:
            worker.process.stdin.write((json.dumps(message) + "\n").encode())
            worker.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; the end of its output says so

    def _assign(self, worker: Worker, spec: RunSpec) -> None:
        worker.spec, worker.began, worker.step, worker.loss = spec, time.monotonic(), 0, None
        self._send(worker, {"spec": to_dict(spec)})

    def _receive(self, worker: Worker) -> None:
        assert worker.process is not None and worker.process.stdout is not None
        chunk = os.read(worker.process.stdout.fileno(), 1 << 16)
        *lines, worker.unread = (worker.unread + chunk).split(b"\n")
        for line in lines:
            self._handle(worker, json.loads(line))
        if not chunk:
            self._died(worker)

    def _handle(self, worker: Worker, message: dict[str, Any]) -> None:
        event, spec = message["event"], worker.spec
        if event == "ready":
            worker.ready, self.failed_starts = True, 0
            return
        if event == "progress":
            if worker.step == 0:
                worker.first_step, worker.first_seen = message["step"], time.monotonic()
            worker.step = message["step"]
            worker.loss = worker.loss if message["loss"] is None else message["loss"]
            return
        assert spec is not None
        worker.spec = None
        worker.busy_seconds += time.monotonic() - worker.began
        if event == "done":
            self.finished.append(spec.run_id)
            self.display.finished(self._record(spec))
        elif event == "busy":
            self.elsewhere.append(spec)
        elif event == "refused":
            if not self.finished:  # most likely all runs would be: say it once and stop
                raise Refused(message["error"])
            self._give_up(spec, message["error"])
        elif event == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.workdir))

    def _died(self, worker: Worker) -> None:
        assert worker.process is not None and worker.errors is not None
        self.selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
        self._close(worker)
        code, spec = worker.process.wait(), worker.spec
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= MAX_FAILED_STARTS:
                worker.errors.seek(0)
                tail = worker.errors.read().decode(errors="replace")[-4000:]
                raise RuntimeError(f"workers can't start ({how}):\n{tail}")
        if spec is not None:
            worker.busy_seconds += time.monotonic() - worker.began
            self.attempts[spec.run_id] += 1
            if self._record(spec) is not None:  # it died between its result and saying so
                self.finished.append(spec.run_id)
                self.display.finished(self._record(spec))
            elif self.attempts[spec.run_id] < MAX_ATTEMPTS:
                self.display.note(f"{spec.run_id}: {how}; once more")
                self.waiting.appendleft(spec)
            else:
                self._give_up(spec, how)
        worker.spec = None
        worker.errors.close()
        worker.ready = False
        if self.waiting or self.elsewhere:
            self._start(worker)

    def _give_up(self, spec: RunSpec, why: str) -> None:
        folder = run_dir(self.workdir, spec.run_id)
        log = folder / "log.txt"
        tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
        failure = {"run_id": spec.run_id, "why": why, "log": tail}
        write_json(folder / "failure.json", failure)
        self.failures[spec.run_id] = why
        self.display.note(f"{spec.run_id}: given up, {why}; see {log}")

    def _look_elsewhere(self) -> None:
        """Takes back what other sweeps on this folder have finished or dropped."""
        for spec in list(self.elsewhere):
            if (record := self._record(spec)) is not None:
                self.elsewhere.remove(spec)
                self.display.finished(record)
            elif not is_running(run_dir(self.workdir, spec.run_id)):
                self.elsewhere.remove(spec)
                self.waiting.append(spec)

    def _close(self, worker: Worker) -> None:
        assert worker.process is not None
        for pipe in (worker.process.stdin, worker.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass

    def _stop(self, received: Sequence[int]) -> None:
        """Ends the workers: the end of their input lets them save; a second signal kills them."""
        processes = [w.process for w in self.workers if w.process is not None]
        for process in processes:
            assert process.stdin is not None
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass
        deadline = time.monotonic() + SECONDS_TO_STOP
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or len(received) > 1:
                for process in processes:
                    process.kill()
            time.sleep(0.02)
        self.selector.close()
        for worker in self.workers:
            if worker.process is not None:
                self._close(worker)
            if worker.errors is not None:
                worker.errors.close()


def _share_of_cores(index: int, jobs: int) -> list[int]:
    """The cores of worker `index`; [] where the workers cannot or need not be kept apart."""
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        return [cores[index % len(cores)]]
    return cores[index * len(cores) // jobs : (index + 1) * len(cores) // jobs]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda signum, frame: received.append(signum))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
