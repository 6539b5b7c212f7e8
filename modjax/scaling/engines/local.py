"""Worker processes on this machine. Each has its own cores, so that XLA threads do not compete."""

import os
import selectors
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from modjax.scaling.engines.engine import Engine
from modjax.scaling.engines.pool import Pool, Worker
from modjax.scaling.engines.process import Process
from modjax.scaling.workers.worker import Settings
from modjax.specs.fields import Positive, check

SECONDS_BETWEEN_STARTS = 0.05


@dataclass(frozen=True)
class Local:
    """Worker processes on this machine.

    jobs: how many, greater than 0.
    """

    jobs: Positive[int] = 1

    def __post_init__(self):
        check(self, "--engine")

    def open(self, settings: Settings, runs: int) -> Engine:
        return LocalPool([Process(i) for i in range(min(self.jobs, runs))], settings)


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
