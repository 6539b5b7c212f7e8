"""Leases on runs, for folders whose locks do not hold between machines, such as gcsfuse.

The n-th holder of a run creates runs/ID/lease-n, which the store does only if there is no such
file, and keeps changing it. A lease is over when its file has not changed for so many seconds by
the observer's own clock: no two clocks are compared. A holder that sees a later file has lost its
lease, and writes no more. The leases on runs in a bucket are files of the bucket.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from modjax import bucket
from modjax.errors import SharedFault
from modjax.files import is_copy

FREE = "free"  # the content of a lease that its holder has given back
RENEWALS = 4  # in the time after which a lease is over
SECONDS_OF_A_LOOK = 600.0
Guard = Callable[[], None]
T = TypeVar("T")
U = TypeVar("U")


class Lost(SharedFault):
    """Another process holds the lease of a run, or this one could not renew its own."""

    def __init__(self, folder: Path):
        super().__init__("lease", folder.name, "was lost: another process may do the run")


class Observer:
    """The leases that a process has seen. seconds: how long an unchanged lease lasts."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = seconds, clock
        self.seen: dict[Path, tuple[str, float]] = {}  # content, and when it was first seen

    def is_held(self, folder: Path) -> bool:
        """Returns whether a run has a holder, as far as this process has seen until now.

        Raises OSError if the store does not answer.
        """
        return self._is_held(newest(folder))

    def _is_held(self, path: Path | None) -> bool:
        if path is None:
            return False
        asked = self.clock()
        content = _read(path)
        if content == FREE:
            return False
        seen, since = self.seen.get(path, (None, 0.0))
        if seen != content:
            self.seen[path] = content, self.clock()
            return True
        return asked - since < self.seconds

    def _is_renewed(self, path: Path | None) -> bool:
        """Watches a lease until it is renewed, or is over, and returns whether it was renewed."""
        while self._ask(self._is_held, path):
            assert path is not None
            content, _ = self.seen[path]
            time.sleep(self.seconds / RENEWALS / 4)
            if self._ask(self._is_held, path) and self.seen[path][0] != content:
                return True
        return False

    def _ask(self, question: Callable[[T], U], about: T) -> U:
        """Asks the store until it answers, for as long as a lease lasts."""
        deadline = self.clock() + self.seconds
        while True:
            try:
                return question(about)
            except OSError:
                if self.clock() > deadline:
                    raise
                time.sleep(self.seconds / RENEWALS / 4)

    @contextlib.contextmanager
    def hold(self, folder: Path) -> Iterator[Guard | None]:
        """Holds a run for the `with` block; yields None if another process holds it.

        Yields a function to call before each write, which raises Lost. Waits for the end of a lease
        that nobody renews.
        """
        path, asked = None, 0.0
        earlier = self._ask(newest, folder)  # looked for once: the next one may be a rival's
        if not self._is_renewed(earlier):
            number = 1 + (0 if earlier is None else _number(earlier))
            path, asked = folder / f"lease-{number:09d}", self.clock()
            try:
                _create(path, _new())
            except OSError:  # another process was first, or may have been
                path = None
        if path is None:
            yield None
            return
        ended, renewed, looked = threading.Event(), [asked], [asked]

        def renew() -> None:
            while not ended.wait(self.seconds / RENEWALS):
                with contextlib.suppress(OSError):  # the next one may succeed
                    asked = self.clock()
                    _write(path, _new())
                    renewed[0] = asked

        def guard() -> None:
            # Nobody takes a lease before it has been unchanged for so long.
            late, now = self.clock() - renewed[0] > self.seconds, self.clock()
            # A look at a bucket takes longer than a step of training.
            if not is_copy(folder) or now - looked[0] > self.seconds / RENEWALS / 4:
                with contextlib.suppress(OSError):  # the store may answer the next time
                    late = late or newest(folder) != path
                    looked[0] = now
            if late:
                raise Lost(folder)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield guard
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError):
                _write(path, FREE)


def newest(folder: Path) -> Path | None:
    """Returns the file of the last holder, or None if there was no holder."""
    if is_copy(folder):
        names = bucket.names(folder, "lease-")
    else:
        try:
            names = [name for name in os.listdir(folder) if name.startswith("lease-")]
        except FileNotFoundError:
            return None
    return max((folder / name for name in names), key=_number, default=None)


def is_recent(folder: Path) -> bool:
    """Returns whether a lease was renewed a while ago, if the store's clock is right.

    In a bucket, if the clock of the holder is right. A single look cannot tell more.
    """
    with contextlib.suppress(OSError):
        path = newest(folder)
        if path is not None and (content := _read(path)) != FREE:
            # tensorstore does not tell when an object was written.
            since = (
                float(content.partition(" ")[2] or 0) if is_copy(folder) else path.stat().st_mtime
            )
            return time.time() - since < SECONDS_OF_A_LOOK
    return False


def _new() -> str:
    """Returns the content of a renewed lease, which differs from every other one."""
    return f"{uuid.uuid4().hex} {time.time():.0f}"


def _read(path: Path) -> str:
    if not is_copy(path):
        return path.read_text(encoding="utf-8")
    return (bucket.read(path) or b"").decode()


def _write(path: Path, content: str) -> None:
    if is_copy(path):
        bucket.write(path, content.encode())
    else:
        path.write_text(content, encoding="utf-8")


def _create(path: Path, content: str) -> None:
    """Writes a lease. Raises OSError if there is one already, or may be."""
    if not is_copy(path):
        with open(path, "x", encoding="utf-8") as file:
            file.write(content)
    elif not bucket.create(path, content.encode()):
        raise FileExistsError(path)


def _number(path: Path) -> int:
    return int(path.name.partition("-")[2])
