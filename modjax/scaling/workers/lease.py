"""Leases on runs, for folders whose locks do not hold between machines, such as gcsfuse.

The n-th holder of a run creates runs/ID/lease-n, which the store does only if there is no such
file, and keeps changing it. A lease is over when its file has not changed for so many seconds by
the observer's own clock: no two clocks are compared. A holder that sees a later file has lost its
lease, and writes no more.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from modjax.errors import SharedFault

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
        content = path.read_text(encoding="utf-8")
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
                with open(path, "x", encoding="utf-8") as file:
                    file.write(uuid.uuid4().hex)
            except OSError:  # another process was first, or may have been
                path = None
        if path is None:
            yield None
            return
        ended, renewed = threading.Event(), [asked]

        def renew() -> None:
            while not ended.wait(self.seconds / RENEWALS):
                with contextlib.suppress(OSError):  # the next one may succeed
                    asked = self.clock()
                    path.write_text(uuid.uuid4().hex, encoding="utf-8")
                    renewed[0] = asked

        def guard() -> None:
            # Nobody takes a lease before it has been unchanged for so long.
            late = self.clock() - renewed[0] > self.seconds
            with contextlib.suppress(OSError):  # the store may answer the next time
                late = late or newest(folder) != path
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
                path.write_text(FREE, encoding="utf-8")


def newest(folder: Path) -> Path | None:
    """Returns the file of the last holder, or None if there was no holder."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith("lease-")]
    except FileNotFoundError:
        return None
    return max((folder / name for name in names), key=_number, default=None)


def is_recent(folder: Path) -> bool:
    """Returns whether a lease was renewed a while ago, if the store's clock is right.

    A single look cannot tell more.
    """
    with contextlib.suppress(OSError):
        path = newest(folder)
        if path is not None and path.read_text(encoding="utf-8") != FREE:
            return time.time() - path.stat().st_mtime < SECONDS_OF_A_LOOK
    return False


def _number(path: Path) -> int:
    return int(path.name.partition("-")[2])
