"""Worker processes on this machine. Each has its own cores, so that XLA threads do not compete."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

from modjax.backend import compilation_cache
from modjax.scaling.engines.engine import Engine
from modjax.scaling.engines.pool import Pool, Worker
from modjax.scaling.engines.worker import Settings
from modjax.specs import to_dict
from modjax.specs.fields import Positive, check

SECONDS_BETWEEN_STARTS = 0.05


@dataclass(frozen=True)
class Local:
    """Worker processes on this machine.

    jobs: how many, greater than 0.
    """

    jobs: Positive[int] = 1

    def __post_init__(self):
        check(self, "engine")

    def open(self, settings: Settings, runs: int) -> Engine:
        return LocalPool([Process(i) for i in range(min(self.jobs, runs))], settings)


class Process(Worker):
    """A worker process on this machine, as its launcher sees it."""

    process: subprocess.Popen
    printed: IO[bytes]

    def __init__(self, index: int):
        super().__init__()
        self.index, self.unread = index, b""

    @property
    def output(self) -> IO[bytes]:
        """The pipe that the process writes its messages to."""
        assert self.process.stdout is not None
        return self.process.stdout

    def start(self, settings: Settings) -> None:
        self.printed, self.unread = tempfile.TemporaryFile(), b""
        self.process = subprocess.Popen(
            # -P: a file in the current folder must not pass for a package.
            [sys.executable, "-P", "-m", "modjax.scaling.engines.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.printed,
            # Whatever libraries print can be written to log.txt, in every locale.
            env=os.environ | compilation_cache() | {"PYTHONIOENCODING": "utf-8:backslashreplace"},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which stops the workers
        )
        self.send(to_dict(settings))

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; the end of its output says so
            self.process.stdin.write((json.dumps(message) + "\n").encode())
            self.process.stdin.flush()

    def receive(self) -> Iterator[dict[str, Any]]:
        """Blocks for output and yields its messages; {"event": "died"} if the output has ended."""
        chunk = os.read(self.output.fileno(), 1 << 16)
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        yield from map(json.loads, lines)
        if not chunk:
            yield {"event": "died"}

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def kill(self) -> None:
        self.process.kill()

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> tuple[int, str]:
        self.close()
        self.output.close()
        code = self.process.wait()
        with self.printed:
            self.printed.seek(0)
            return code, self.printed.read().decode(errors="replace")[-4000:]


class LocalPool(Pool):
    """Worker processes that are heard through their pipes."""

    workers: list[Process]

    def settings_of(self, worker: Worker) -> Settings:
        assert isinstance(worker, Process)
        return replace(self.settings, cpus=tuple(share_of_cores(worker.index, self.slots)))

    def receive(self, seconds: float) -> Iterator[tuple[Worker, dict[str, Any]]]:
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                if worker.living:
                    selector.register(worker.output, selectors.EVENT_READ, worker)
            # Without a process there is nothing to hear, but soon one to start.
            heard = selector.select(seconds if selector.get_map() else SECONDS_BETWEEN_STARTS)
        for key, _ in heard:
            for message in key.data.receive():
                yield key.data, message


def share_of_cores(index: int, jobs: int) -> list[int]:
    """Returns the cores of worker `index`, or [] if workers cannot or need not be separated."""
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        return [cores[index % len(cores)]]
    return cores[index * len(cores) // jobs : (index + 1) * len(cores) // jobs]
