"""A worker process of this machine, as its launcher sees it."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from modjax.scaling.engines.pool import Worker
from modjax.scaling.workers.worker import Settings, environment
from modjax.specs import to_dict


class Process(Worker):
    """A worker slot with a process of this machine, which is heard through a pipe."""

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
            [sys.executable, "-P", "-m", "modjax.scaling.workers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.printed,
            env=environment(),
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
