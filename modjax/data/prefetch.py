"""Making batches ahead of need, in a background thread."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class prefetch(Generic[T]):  # lower case, as the iterators of itertools are
    """Iterates over make(first_step), ..., make(last_step - 1), made up to `depth` ahead.

    `waited_seconds` adds up how long the consumer has waited. An error in `make` is raised where
    its item would have been. Leaving a `with` block, or `close()`, ends the thread.
    """

    def __init__(self, make: Callable[[int], T], first_step: int, last_step: int, depth: int = 2):
        self.waited_seconds = 0.0
        self._made: queue.Queue = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(make, range(first_step, last_step)), daemon=True
        )
        self._thread.start()

    def _run(self, make: Callable[[int], T], steps: range) -> None:
        try:
            for step in steps:
                if not self._put((make(step), None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, item: tuple[T | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "prefetch[T]":
        return self

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        started = time.perf_counter()
        item, error = self._made.get()
        self.waited_seconds += time.perf_counter() - started
        if error is not None:
            self.close()
            raise error
        return item

    def close(self) -> None:
        """Stops the thread and waits for it; further items are not delivered."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> "prefetch[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
