"""Engines: what starts the runs of a sweep, watches them and stops them.

An engine has no policy. modjax/scaling/session.py decides which runs are open, done once more or
given up. The options of an engine are a frozen dataclass with a method `open`, registered by a
name, which `--engine` takes. `--engine.FIELD=VALUE` sets its fields.
"""

import dataclasses
import errno
import importlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from modjax.errors import InputError, describe, require
from modjax.scaling.plan.experiment import parse
from modjax.scaling.workers.worker import Settings
from modjax.specs import RunSpec, from_dict


class Event(NamedTuple):
    """News of a run, or of an engine. why: an explanation, in one line.

    kind: one of
      checked        the engine has found no run that would be refused
      note           `why` is for the user
      started        a process does the run
      waiting        it waits for its turn again
      progress       `step`, and `loss` if it is known; `why`, if any, is for the user
    or how a run ended:
      done           it has finished here
      found          it had its result already
      busy           another process is doing it
      preempted      somebody stopped it; it may have saved its state
      node lost      its machine has gone
      out of memory
      refused        bad input
      died           anything else
    """

    kind: str
    run_id: str = ""
    why: str = ""
    step: int = 0
    loss: float | None = None


class Engine(Protocol):
    """Does runs elsewhere. All methods but `stop` return soon; what happens later is an event.

    slots: the number of runs that it does at a time, for estimates.
    """

    slots: int

    def check(self, specs: Sequence[RunSpec]) -> None:
        """Begins to look at the runs. "checked" follows, or `events` raises InputError."""
        ...

    def room(self) -> int:
        """Returns how many more runs `start` takes now."""
        ...

    def start(self, specs: Sequence[RunSpec]) -> None:
        """Takes runs. An event for each says how it ends.

        Raises HandedOver if it does none itself, which ends the session.
        """
        ...

    def events(self, seconds: float) -> Iterator[Event]:
        """Yields what has happened, after at most `seconds` of waiting.

        Raises InputError or OSError for a fault that would stop every other run, too.
        """
        ...

    def stop(self, received: Sequence[int]) -> bool:
        """Ends the runs under way once they have saved their state, and frees everything.

        May be called again. received: the signals so far; it may grow. A second one ends the runs
        at once. Without any, an error ends the session: runs that another launcher can find go on.
        Returns whether every run has saved its state.
        """
        ...


class Options(Protocol):
    """Options of an engine: a frozen dataclass."""

    def open(self, settings: Settings, runs: int) -> Engine:
        """Returns the engine for a sweep with so many open runs. Raises InputError."""
        ...


class Refused(InputError):
    """Bad input, in the words of the process that found it."""

    def __init__(self, line: str):
        ValueError.__init__(self, line)


class HandedOver(Exception):
    """The engine has written the runs down for the user to start, in these words."""


def raise_for_all(kind: str, why: str, run_id: str, workdir: str) -> None:
    """Raises for an end that would stop every other run, too. run_id: "" for the check of all."""
    if kind == "fault" or (kind == "refused" and not run_id):
        raise Refused(why)
    if kind == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), workdir)


def describe_exit(code: int) -> str:
    """Returns how a process with this exit code ended, in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


OWN = "modjax.scaling.engines."
ENGINES: dict[str, type[Options] | str] = {
    "local": OWN + "local:Local",
    "ray": OWN + "ray:Ray",
    "slurm": OWN + "slurm:Slurm",
    "gke": OWN + "gke:Gke",
}


def register(name: str, options: type[Options]) -> None:
    """Makes `--engine=NAME` known. options: the frozen dataclass of the engine's options."""
    require(name not in ENGINES, "engine", name, "is registered already")
    ENGINES[name] = options


def options_of(
    name: str, texts: Mapping[str, str], values: Mapping[str, Any] = MappingProxyType({})
) -> Options:
    """Returns the options of an engine, from their values and from texts, which come first.

    Raises InputError for unknown names and bad values.
    """
    require(name in ENGINES, "--engine", name, f"must be one of {', '.join(ENGINES)}")
    found: Any = ENGINES[name]
    if isinstance(found, str):
        module, _, found = found.partition(":")
        try:
            found = getattr(importlib.import_module(module), found)
        except ImportError as error:
            accepted = f"needs its extra: pip install 'modjax[{name}]' ({describe(error)})"
            raise InputError("--engine", name, accepted) from error
    usual = {field.name: field.default for field in dataclasses.fields(found)}
    parsed = {
        field: parse(f"--engine.{field}", text, usual.get(field)) for field, text in texts.items()
    }
    return from_dict(found, {**values, **parsed}, "--engine.")
