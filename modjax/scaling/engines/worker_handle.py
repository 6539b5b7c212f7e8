"""Worker processes as their launcher sees them, and the signals that the launcher receives."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from modjax.backend import compilation_cache, last_line
from modjax.errors import InputError
from modjax.specs import RunSpec, to_dict

SECONDS_TO_STOP = 90.0


class Refused(InputError):
    """Bad input, with the message of the worker that found it."""

    def __init__(self, line: str):
        ValueError.__init__(self, line)


@dataclass
class Worker:
    """Worker slot, whose process is replaced when it dies.

    error: the exception that the process reported before it ended.
    last_words: the end of what the last ended process printed outside its runs.
    heard, ended: when the last message arrived, and when the last process ended.
    began, first_seen: when the run was assigned, and when it reported its first step, `first_step`.
      The time between is compilation.
    runs: the number of runs assigned to this process.

    Times are those of time.monotonic, in seconds.
    """

    index: int
    process: subprocess.Popen | None = None
    errors: IO[bytes] | None = None
    unread: bytes = b""
    ready: bool = False
    error: str | None = None
    last_words: str = ""
    heard: float = 0.0
    ended: float = float("-inf")
    spec: RunSpec | None = None
    began: float = 0.0
    step: int = 0
    loss: float | None = None
    first_step: int = 0
    first_seen: float = 0.0
    busy_seconds: float = 0.0
    runs: int = 0

    @property
    def output(self) -> IO[bytes]:
        """The pipe that the process writes its messages to."""
        assert self.process is not None and self.process.stdout is not None
        return self.process.stdout

    def start(self, settings: dict[str, Any]) -> None:
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            # -P: a file in the current folder must not pass for a package.
            [sys.executable, "-P", "-m", "modjax.scaling.engines.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            # Whatever libraries print can be written to log.txt, in every locale.
            env=os.environ | compilation_cache() | {"PYTHONIOENCODING": "utf-8:backslashreplace"},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which stops the workers
        )
        self.unread, self.ready, self.error, self.runs = b"", False, None, 0
        self.send(settings)

    def send(self, message: dict[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; the end of its output says so
            self.process.stdin.write((json.dumps(message) + "\n").encode())
            self.process.stdin.flush()

    def assign(self, spec: RunSpec) -> None:
        self.spec, self.step, self.loss = spec, 0, None
        self.runs += 1
        self.began = self.heard = time.monotonic()
        self.send({"spec": to_dict(spec)})

    def release(self) -> RunSpec:
        """Makes the worker idle, and returns its run."""
        spec, self.spec = self.spec, None
        assert spec is not None
        self.busy_seconds += time.monotonic() - self.began
        return spec

    def receive(self) -> Iterator[dict[str, Any]]:
        """Blocks for output and yields its messages; {"event": "died"} if the output has ended."""
        chunk = os.read(self.output.fileno(), 1 << 16)
        self.heard = time.monotonic()
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        yield from map(json.loads, lines)
        if not chunk:
            yield {"event": "died"}

    def close_input(self) -> None:
        """Asks the process to save the state of its run and to end."""
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def end(self) -> int:
        """Waits for the process to end, and returns its exit code."""
        assert self.process is not None
        self.close_input()
        self.output.close()
        code = self.process.wait()
        self.process, self.ready, self.ended = None, False, time.monotonic()
        assert self.errors is not None
        with self.errors:
            self.errors.seek(0)
            self.last_words = self.errors.read().decode(errors="replace")[-4000:]
        return code


def cannot_start(worker: Worker, how: str, times: int) -> Exception:
    """Returns the error for failed starts: RuntimeError if a worker raised, else InputError.

    how: how the last process ended, in words. times: the number of failed starts.
    """
    if worker.error is not None:
        fault = RuntimeError(f"workers cannot start: {how}")
        fault.add_note(worker.last_words)
        return fault
    said = f"died {times} times before it had a run: {last_line(worker.last_words)}"
    return InputError("worker", how, said)


def describe_exit(code: int) -> str:
    """Returns how a process with this exit code ended, in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def end_all(workers: Sequence[Worker], received: Sequence[int]) -> bool:
    """Ends the workers once they have saved their runs.

    Kills them after SECONDS_TO_STOP, or at a second signal.
    received: the signals so far, from `signals`.
    Returns whether every run under way has saved its state.
    """
    for worker in workers:
        worker.close_input()
    deadline = time.monotonic() + SECONDS_TO_STOP
    processes = [worker.process for worker in workers if worker.process is not None]
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or len(received) > 1:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return all([_lost_nothing(worker, worker.end()) for worker in workers])


def _lost_nothing(worker: Worker, code: int) -> bool:
    """Returns whether a worker that ended with `code` saved its run, or had nothing to save."""
    # SIGTERM ends a worker by itself only until its training listens for it.
    unbegun = code == -signal.SIGTERM and worker.step == 0
    return code == 0 or worker.spec is None or unbegun


def share_of_cores(index: int, jobs: int) -> list[int]:
    """Returns the cores of worker `index`, or [] if workers cannot or need not be separated."""
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        return [cores[index % len(cores)]]
    return cores[index * len(cores) // jobs : (index + 1) * len(cores) // jobs]


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in the yielded list, so that they do not end the process."""
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
