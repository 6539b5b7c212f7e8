"""Worker processes on a Ray cluster. An actor on a node holds one and passes its messages on."""

import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from modjax.bucket import url
from modjax.errors import InputError, describe, require
from modjax.scaling.engines.engine import Engine
from modjax.scaling.engines.pool import Pool, Worker
from modjax.scaling.engines.process import Process
from modjax.scaling.workers.worker import Settings
from modjax.specs import from_dict, to_dict
from modjax.specs.fields import NotNegative, Positive, check

SECONDS_BETWEEN_STARTS = 0.05
SECONDS_TO_ANSWER = 10.0  # of an actor, or of a node's look at a folder
PASSED_ON = ("PYTHONPATH", "JAX_", "XLA_", "LIBTPU_", "MODJAX_")  # beginnings of variables' names


@dataclass(frozen=True)
class Ray:
    """Worker processes on a Ray cluster.

    jobs: the runs done at a time, greater than 0.
    address: of a running cluster, as "auto" or "HOST:PORT"; "local" starts one on this machine.
    cores, memory, gpus, resources: needed by each run. memory is in GB. resources are Ray's other
      names and numbers, as in "TPU=4,spot=1".
    """

    jobs: Positive[int] = 1
    address: str = "local"
    cores: Positive[float] = 1.0
    memory: NotNegative[float] = 0.0
    gpus: NotNegative[float] = 0.0
    resources: str = ""

    def __post_init__(self):
        check(self, "--engine")
        self.needs()

    def open(self, settings: Settings, runs: int) -> Engine:
        variables = {name: v for name, v in os.environ.items() if name.startswith(PASSED_ON)}
        dashboard = False if self.address == "local" else None
        handler = signal.getsignal(signal.SIGTERM)
        try:
            host, _, port = self.address.rpartition(":")
            if port.isdecimal():  # Ray itself would ask for more than a minute, and print it
                socket.create_connection((host, int(port)), SECONDS_TO_ANSWER).close()
            ray.init(
                self.address,
                include_dashboard=dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": variables},
            )
        except (OSError, ValueError, RuntimeError) as error:
            accepted = f"has no Ray cluster: {describe(error)}"
            raise InputError("--engine.address", self.address, accepted) from error
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
        try:
            self._check(settings)
            return RayPool([Actor(self) for _ in range(min(self.jobs, runs))], settings)
        except BaseException:
            ray.shutdown()
            raise

    def needs(self) -> dict[str, float]:
        """Returns the needs of a run by Ray's names. Raises InputError for bad `resources`."""
        found = {"CPU": self.cores, "memory": self.memory * 1e9, "GPU": self.gpus}
        for item in filter(None, self.resources.split(",")):
            name, _, number = item.partition("=")
            fits = name and number.replace(".", "", 1).isdigit()
            accepted = "must be names and numbers, as in TPU=4,spot=1"
            require(bool(fits), "--engine.resources", self.resources, accepted)
            found[name] = float(number)
        return {name: number for name, number in found.items() if number > 0}

    def _check(self, settings: Settings) -> None:
        """Raises InputError if no node can do a run, or if a node does not see the folders."""
        nodes, needs = [node for node in ray.nodes() if node["Alive"]], self.needs()
        for name, number in needs.items():
            most = max(node["Resources"].get(name, 0) for node in nodes)
            accepted = f"no node has so much of it: at most {most:g}"
            require(number <= most, f"--engine: {name}", number, accepted)
        if url(settings.workdir):
            return
        sees: Any = ray.remote(num_cpus=0)(os.path.exists)
        folder = Path(settings.workdir).absolute()
        folder = next(path for path in (folder, *folder.parents) if path.is_dir())
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".modjax-probe-") as file:
            looks = {}
            for node in nodes:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                looks[node["NodeName"]] = sees.options(scheduling_strategy=there).remote(file.name)
            for name, look in looks.items():
                accepted = f"node {name} does not see it: it must be shared by all nodes"
                try:
                    seen = ray.get(look, timeout=SECONDS_TO_ANSWER)
                except RayError as error:
                    raise InputError("--engine", f"node {name}", describe(error)) from error
                require(bool(seen), "--workdir", settings.workdir, accepted)


class Holder:
    """Holds a worker process on a node. An actor's calls may overlap."""

    def __init__(self, settings: dict[str, Any]):
        self.process = Process(0)
        self.process.start(from_dict(Settings, settings))

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.process, name)(*arguments)

    def receive(self) -> list[dict[str, Any]]:
        return list(self.process.receive())


class Actor(Worker):
    """A worker slot with a process on some node."""

    def __init__(self, options: Ray):
        super().__init__()
        self.needs = options.needs()

    def start(self, settings: Settings) -> None:
        needs = dict(self.needs)
        options: dict[str, Any] = {"num_cpus": needs.pop("CPU"), "num_gpus": needs.pop("GPU", 0)}
        options |= {"memory": needs.pop("memory", None), "resources": needs}
        # One call waits for messages, and others come meanwhile.
        actor: Any = ray.remote(Holder)
        actor = actor.options(max_concurrency=3, **options)
        self.actor: Any = actor.remote(to_dict(settings))
        self.news, self.lost, self.refused = self.actor.receive.remote(), "", False

    def receive(self) -> Iterator[dict[str, Any]]:
        """Yields the messages that have come; {"event": "died"} if its process or actor has."""
        try:
            messages = ray.get(self.news)
        except RayError as error:
            self._lose(error)
            messages = [{"event": "died"}]
        if {"event": "died"} not in messages:
            self.news = self.actor.receive.remote()
        yield from messages

    def send(self, message: dict[str, Any]) -> None:
        self.actor.call.remote("send", message)

    def close(self) -> None:
        self.actor.call.remote("close")

    def kill(self) -> None:
        self.actor.call.remote("kill")

    def has_ended(self) -> bool:
        return self.lost != "" or self._ask("has_ended", True)

    def end(self) -> tuple[int | None, str]:
        found = None if self.lost else self._ask("end", None)
        ray.kill(self.actor)
        return found or (1 if self.refused else None, self.lost)

    def _ask(self, name: str, otherwise: Any) -> Any:
        """Returns what a method of the process returns, or `otherwise` if the actor has gone."""
        try:
            return ray.get(self.actor.call.remote(name), timeout=SECONDS_TO_ANSWER)
        except RayError as error:
            self._lose(error)
            return otherwise

    def _lose(self, error: RayError) -> None:
        self.refused = isinstance(error, RayActorError) and error.actor_init_failed
        how = "its actor cannot start" if self.refused else "lost with its node or actor"
        self.lost = f"{how}: {describe(error) if self.refused else type(error).__name__}"


class RayPool(Pool):
    """Worker processes that are heard through actors."""

    workers: list[Actor]

    def receive(self, seconds: float) -> Iterator[tuple[Worker, dict[str, Any]]]:
        living = {worker.news: worker for worker in self.workers if worker.living}
        if not living:
            time.sleep(min(seconds, SECONDS_BETWEEN_STARTS))
            return
        heard, _ = ray.wait(list(living), timeout=seconds)
        for news in heard:
            for message in living[news].receive():
                yield living[news], message

    def stop(self, received: Sequence[int]) -> bool:
        for worker in self.workers:
            if worker.living and not worker.ready:  # it may wait for its node, and has no run
                ray.kill(worker.actor)
                worker.living = False
        saved = super().stop(received)
        ray.shutdown()
        return saved
