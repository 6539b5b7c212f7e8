"""A background thread that makes batches ahead of need."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class prefetch(Generic[T]):  # lower case, as the iterators of itertools are
    """Iterator over make(first_step), ..., make(last_step - 1), called in one background thread.

    At most `depth` items wait while one more is made. `waited_seconds` is the total time that the
    consumer has waited. An error in `make` is raised in place of its item. Leaving a `with` block,
    or `close()`, ends the thread.
    """

    def __init__(self, make: Callable[[int], T], first_step: int, last_step: int, depth: int = 2):
        self.waited_seconds = 0.0
        self._make = make
        self._steps = iter(range(first_step, last_step))
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ahead: deque[Future[T]] = deque()
        for _ in range(depth + 1):
            self._submit_next()

    def _submit_next(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._ahead.append(self._thread.submit(self._make, step))

    def __iter__(self) -> "prefetch[T]":
        return self

    def __next__(self) -> T:
        if not self._ahead:
            raise StopIteration
        started = time.perf_counter()
        try:
            item = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self.waited_seconds += time.perf_counter() - started
        self._submit_next()
        return item

    def close(self) -> None:
        """Drops the remaining items and waits for the thread to end."""
        self._ahead.clear()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "prefetch[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
