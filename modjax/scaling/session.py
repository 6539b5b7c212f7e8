"""Policy of a sweep: which runs are open, done once more, or given up. Engines do the runs.

All state is in the folders: a run is done when its result.json exists, and in progress while a
process holds its lock, or its lease.
"""

import contextlib
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from modjax.bucket import get, local, pull_run, shown, write
from modjax.errors import InputError
from modjax.files import WatchedFolder, is_copy, read
from modjax.metrics_file import last_step
from modjax.records import read_record, run_dir, write_json
from modjax.scaling.engines.engine import Engine, Event, Options, Refused
from modjax.scaling.formatting import clock
from modjax.scaling.orders import last_stop
from modjax.scaling.progress import Display, Running
from modjax.scaling.workers.lease import Observer
from modjax.scaling.workers.run_lock import is_running
from modjax.scaling.workers.worker import Settings
from modjax.specs import RunSpec

MAX_ATTEMPTS, MOST_FRUITLESS = 2, 20
FREE = ("preempted", "node lost")  # costs a run no attempt
FINAL = ("refused", "out of memory")  # would happen again
SECONDS_OF_SILENCE = 300.0
SECONDS_OF_WATCHING = 0.5
LOOKS = 16  # into a bucket, in the time after which a lease is over
LOG_LINES, LOG_BYTES = 20, 65_536  # of the end of a log


class Stopped(Exception):
    """A signal ended the sweep. saved: whether every run under way had saved its state."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.is_interrupt = signum == signal.SIGINT
        self.saved = True


class Session:
    """One invocation of a sweep: `run` returns when every run is finished or given up.

    finished: ids of the runs that this session finished.
    found: ids of the runs that other sessions finished meanwhile.
    failures: run id -> why the run was given up.
    running: run id -> the run under way.
    busy_seconds: how long runs were under way, in sum.
    home: the sweep's folder; None until the plan is written there.
    """

    def __init__(
        self,
        specs: Sequence[RunSpec],
        settings: Settings,
        options: Options,
        flops_per_second: float,
    ):
        self.workdir = local(settings.workdir)
        self.observer = Observer(settings.lease) if settings.lease else None
        # A look into a bucket is a request; what others do is not that urgent.
        self.pause = settings.lease / LOOKS if is_copy(self.workdir) else 0.0
        self.looked, self.looks = float("-inf"), True
        self.home: WatchedFolder | None = None
        self.finished: list[str] = []
        self.found: list[str] = []
        self.failures: dict[str, str] = {}
        self.running: dict[str, Running] = {}
        self.busy_seconds = 0.0
        self.attempts: Counter[str] = Counter()
        self.fruitless: Counter[str] = Counter()  # free ends since a run got any further
        self.reached: Counter[str] = Counter()  # the last step of a run
        self.elsewhere: list[RunSpec] = []  # runs that another sweep on this folder is doing
        self.said_idle, self.earlier_stop = False, last_stop(self.workdir)
        self.specs = {spec.run_id: spec for spec in specs}
        self.display = Display(specs, flops_per_second)
        self.waiting = deque(spec for spec in specs if self._is_open(spec))
        self.open_engine = lambda: options.open(settings, len(self.waiting))
        self.slots = 0

    def run(self, claim: Callable[[], None]) -> None:
        """Does the runs.

        claim: writes the plan. Called once, when the engine has found no run that would be refused.
        """
        if not self.waiting:
            claim()
            self.home = WatchedFolder(self.workdir)
            return
        with signals() as received, self.display:
            engine = self.open_engine()
            self.slots = self.display.slots = engine.slots
            try:
                engine.check(list(self.waiting))
                while "checked" not in [e.kind for e in self._events(engine, received)]:
                    pass
                claim()
                self.home = WatchedFolder(self.workdir)
                while self.waiting or self.elsewhere or self.running:
                    self._start(engine)
                    for event in self._events(engine, received):
                        self._handle(event)
                    self._note_silence()
                    self.display.update(self.running, len(self.elsewhere))
            except Stopped as stopped:
                if self.running:
                    said = f"{len(self.running)} run(s) save their state; a second signal kills"
                    self.display.note(f"stopping: {said}")
                stopped.saved = engine.stop(received)
                raise
            finally:
                engine.stop(received)

    def _events(self, engine: Engine, received: list[int]) -> Iterator[Event]:
        """Yields the engine's events. Raises Stopped after a signal."""
        self.looks = time.monotonic() - self.looked > self.pause
        stop = last_stop(self.workdir) if self.looks else ""  # "" if the store does not answer
        self.looked = time.monotonic() if self.looks else self.looked
        if not received and stop and stop != self.earlier_stop:
            received.append(signal.SIGTERM)
        if received:
            raise Stopped(received[0])
        for event in engine.events(SECONDS_OF_WATCHING):
            if event.kind == "note":
                self.display.note(event.why)
            yield event

    def _start(self, engine: Engine) -> None:
        """Gives the engine the runs that it has room for."""
        given_up = [r for r in self.attempts if r in self.failures and self.looks]
        for run_id in given_up:  # `modjax retry` opens them
            folder = self._folder(self.specs[run_id])
            with contextlib.suppress(OSError):  # the store may answer the next time
                get(folder, ["failure.json"])
            if not (folder / "failure.json").exists():
                del self.failures[run_id], self.attempts[run_id], self.fruitless[run_id]
                self.waiting.append(self.specs[run_id])
        room = engine.room()
        specs = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        if specs:
            self._require_home()
            self.running |= {spec.run_id: Running(spec) for spec in specs}
            engine.start(specs)
        if not self.waiting:
            self._poll_other_sweeps()

    def _poll_other_sweeps(self) -> None:
        """Records runs that other sweeps on this folder finished; requeues runs they dropped."""
        for spec in list(self.elsewhere if self.looks else ()):
            if is_running(self._folder(spec), self.observer):
                continue
            try:
                self._pull(spec)
            except OSError:  # the store may answer the next time
                continue
            self.elsewhere.remove(spec)
            if (self._folder(spec) / "result.json").exists():
                self._finish(spec, here=False)
            else:
                self.waiting.append(spec)
        if self.elsewhere and not self.waiting and not self.running and not self.said_idle:
            self.said_idle = True
            names = ", ".join(spec.run_id for spec in self.elsewhere)
            self.display.note(f"nothing left to do but to wait for another sweep's {names}")

    def _note_silence(self) -> None:
        for run_id, run in self.running.items():
            if run.began is not None and time.monotonic() - run.heard > SECONDS_OF_SILENCE:
                run.heard = time.monotonic()
                said = f"no progress for {clock(SECONDS_OF_SILENCE)}, compiling or stuck"
                self.display.note(
                    f"{run_id}: {said}; see {shown(self._folder(run.spec) / 'log.txt')}"
                )

    def _handle(self, event: Event) -> None:
        if event.kind == "started":
            self.running[event.run_id].start()
        elif event.kind == "waiting":
            self.busy_seconds += self.running[event.run_id].wait()
        elif event.kind == "progress":
            self.running[event.run_id].advance(event.step, event.loss)
            self._reach(event.run_id, event.step)
            if event.why:
                self.display.note(f"{event.run_id}: {event.why}")
        elif event.run_id:
            run = self.running.pop(event.run_id)
            self.busy_seconds += run.seconds()
            self._ended(run.spec, event)

    def _ended(self, spec: RunSpec, event: Event) -> None:
        """Decides what becomes of a run that has ended."""
        run_id, kind, why = spec.run_id, event.kind, event.why
        if kind == "busy":
            self.elsewhere.append(spec)
            return
        self._require_home()
        try:
            self._pull(spec)
        except OSError:  # the bucket may answer the next time
            self.elsewhere.append(spec)
            return
        self.attempts[run_id] += kind not in FREE
        self.fruitless[run_id] += 1
        if self.fruitless[run_id] >= MOST_FRUITLESS and kind in FREE:
            kind, why = FINAL[0], f"{why}, {MOST_FRUITLESS} times without getting further"
        if kind == "found":
            self._finish(spec, here=False)
        elif kind == "done" or (self._folder(spec) / "result.json").exists():
            self._finish(spec, here=True)  # or it died between its result and saying so
        elif event.kind == "refused" and not (self.display.done or self.reached):
            raise Refused(why)  # most likely all runs would be: say it once and stop
        elif kind in FINAL or self.attempts[run_id] >= MAX_ATTEMPTS:
            self._give_up(spec, why)
        else:
            self.display.note(f"{run_id}: {why}; once more")
            self.waiting.appendleft(spec)

    def _is_open(self, spec: RunSpec) -> bool:
        """Returns whether a run is still to be done. Gives up one whose result cannot be read."""
        try:
            record = read_record(self._folder(spec), spec.run_id)
        except InputError as error:
            self.failures[spec.run_id] = str(error)
            return False
        if record is not None:
            self.display.found(record)
        return record is None

    def _finish(self, spec: RunSpec, here: bool) -> None:
        self._require_home()
        try:
            record = read_record(self._folder(spec), spec.run_id)
        except InputError as error:
            return self._give_up(spec, str(error))
        if record is None:
            return self._give_up(spec, "its result.json has gone")
        if here:
            self.finished.append(spec.run_id)
            self.display.finished(record)
        else:
            self.found.append(spec.run_id)
            self.display.found(record)

    def _give_up(self, spec: RunSpec, why: str) -> None:
        log, tail = self._folder(spec) / "log.txt", []
        with contextlib.suppress(InputError):
            if is_copy(log):  # its process has died before it could
                with contextlib.suppress(OSError):
                    write(log, read(log, ""))
            tail = read(log, "", last=LOG_BYTES).decode(errors="replace").splitlines()[-LOG_LINES:]
        failure = {"run_id": spec.run_id, "why": why, "log": tail}
        write_json(self._folder(spec) / "failure.json", failure)
        self.failures[spec.run_id] = why
        self.display.note(f"{spec.run_id}: given up, {why}; see {shown(log)}")

    def _pull(self, spec: RunSpec) -> None:
        """Fetches what another machine wrote for a run that it has ended."""
        if not (self._folder(spec) / "result.json").exists():
            pull_run(self._folder(spec))
        with contextlib.suppress(InputError):
            self._reach(spec.run_id, last_step(self._folder(spec)))

    def _reach(self, run_id: str, step: int) -> None:
        if step > self.reached[run_id]:
            self.reached[run_id], self.fruitless[run_id] = step, 0

    def _require_home(self) -> None:
        assert self.home is not None
        self.home.check()

    def _folder(self, spec: RunSpec) -> Path:
        return run_dir(self.workdir, spec.run_id)


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
