"""Progress of a running sweep: a live table on a terminal, a few plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from modjax.records import RunRecord
from modjax.scaling.formatting import clock
from modjax.scaling.report.prose import loss_text
from modjax.specs import RunSpec

SECONDS_BETWEEN_LINES = 60.0  # without a terminal, while no run finishes


@dataclass
class Running:
    """A run under way. Times are those of time.monotonic, in seconds.

    began: when a process began to do it; None while it waits for one.
    heard: when its last event came.
    first_seen: when it reported its first step, `first_step`; the time before is compilation.
    """

    spec: RunSpec
    began: float | None = None
    heard: float = 0.0
    step: int = 0
    loss: float | None = None
    first_step: int = 0
    first_seen: float = 0.0

    def start(self) -> None:
        self.began = self.heard = time.monotonic()

    def advance(self, step: int, loss: float | None) -> None:
        self.heard = time.monotonic()
        if self.step == 0:
            self.first_step, self.first_seen = step, self.heard
        self.step, self.loss = step, self.loss if loss is None else loss

    def wait(self) -> float:
        """Ends the time of a process, and returns how long that was."""
        seconds, self.began = self.seconds(), None
        return seconds

    def seconds(self) -> float:
        """Returns how long a process has been at it."""
        return 0.0 if self.began is None else time.monotonic() - self.began


class Display:
    """Context manager that shows progress on stderr. slots: the runs done at a time."""

    def __init__(self, specs: Sequence[RunSpec], flops_per_second: float):
        self.budgets = {spec.run_id: spec.budget_flops for spec in specs}
        self.slots = 1
        self.expected_rate = flops_per_second
        self.console = Console(file=sys.stderr)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.done: set[str] = set()
        self.flops_here = 0.0
        self.began = self.noted = time.monotonic()

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def note(self, line: str) -> None:
        self.noted = time.monotonic()
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def found(self, record: RunRecord) -> None:
        """Counts a run that another session finished."""
        self.done.add(record.run_id)

    def finished(self, record: RunRecord) -> None:
        """Counts and announces a run that this session finished."""
        self.done.add(record.run_id)
        self.flops_here += self.budgets[record.run_id]
        loss = "diverged" if record.eval_loss is None else loss_text(record)
        count = f"[{len(self.done):{len(str(len(self.budgets)))}}/{len(self.budgets)}]"
        self.note(f"{count} {record.run_id}  {loss}  {clock(record.wall_seconds)}")

    def update(self, running: Mapping[str, Running], elsewhere: int) -> None:
        """Shows the runs under way. elsewhere: the number in progress in other sweeps."""
        if not self.console.is_terminal and time.monotonic() - self.noted < SECONDS_BETWEEN_LINES:
            return
        table = Table(box=None, pad_edge=False)
        for name in ("run", "step", "loss", "left"):
            table.add_column(name, justify="left" if name == "run" else "right")
        under_way = 0.0
        for run_id, run in running.items():
            if run.began is None:
                table.add_row(run_id, "waiting")
                continue
            steps = run.spec.train.steps
            under_way += run.spec.budget_flops * run.step / steps
            spent, counted = time.monotonic() - run.first_seen, run.step - run.first_step
            left = clock(spent * (steps - run.step) / counted) if counted > 0 else "?"
            loss = "" if run.loss is None else f"{run.loss:.3f}"
            table.add_row(run_id, f"{run.step}/{steps}", loss, left)
        total = sum(self.budgets.values())
        spent_flops = sum(self.budgets[run_id] for run_id in self.done) + under_way
        rate = self._rate(under_way)
        summary = f"{len(self.done)}/{len(self.budgets)} runs, "
        summary += f"about {clock((total - spent_flops) / rate)} left"
        if elsewhere:
            summary += f"; {elsewhere} running in another sweep"
        if not self.console.is_terminal:
            places = [f"{run_id} at step {run.step}" for run_id, run in running.items()]
            return self.note("; ".join([summary, *places]))
        overall = Table.grid(padding=(0, 1))
        overall.add_row(ProgressBar(total=total, completed=spent_flops, width=40), summary)
        self.live.update(Group(table, overall), refresh=True)

    def _rate(self, under_way: float) -> float:
        """Returns FLOP/s of all runs under way: expected until a run has finished, then measured.

        under_way: FLOPs that unfinished runs have spent so far.
        """
        if self.flops_here == 0:
            return self.expected_rate * self.slots
        return (self.flops_here + under_way) / (time.monotonic() - self.began)
