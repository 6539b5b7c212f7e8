"""Learning curves from the training losses that runs log, and an arm's frontier of them.

The loss of one step is mostly the luck of its batch. A line of metrics.jsonl therefore holds the
mean since the line before, and a curve shows the mean over a trailing window of SHARE of the run.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modjax.errors import InputError
from modjax.metrics_file import lost_steps, read_metrics
from modjax.records import RunRecord, run_dir

LINE = ("step", "loss_steps", "train_flops", "loss")
SHARE = 0.05
# The minimum of many noisy means is biased low by about one standard deviation of a mean, which is
# that of one step over the root of the window's steps. Shorter windows do not enter a frontier.
FRONTIER_STEPS = 50


@dataclass(frozen=True)
class Curve:
    """Training losses that a run of `steps` steps logged, line by line.

    step: the step after which each line was logged.
    loss: mean over the `loss_steps` steps up to `step`, in nats per token.
    flops: training FLOPs spent by then.
    """

    run_id: str
    arm: str
    steps: int
    step: np.ndarray
    loss_steps: np.ndarray
    flops: np.ndarray
    loss: np.ndarray

    @property
    def window(self) -> int:
        """Number of steps that `smooth` averages over."""
        return max(1, round(SHARE * self.steps))

    @functools.cached_property
    def smooth(self) -> tuple[np.ndarray, np.ndarray]:
        """FLOPs and smoothed loss at every line whose whole window was logged.

        The smoothed loss is the mean over the window that ends at the line. Every step counts with
        the mean of its line.
        """
        knots = np.stack([self.step - self.loss_steps, self.step], -1).ravel()

        def over_window(weight: np.ndarray) -> np.ndarray:
            """Returns the sum of `weight`, given by line, over each window."""
            after = np.cumsum(weight)
            sums = np.stack([after - weight, after], -1).ravel()
            return after - np.interp(self.step - self.window, knots, sums)

        whole = over_window(self.loss_steps) > self.window - 0.5
        return self.flops[whole], over_window(self.loss * self.loss_steps)[whole] / self.window


class Curves(NamedTuple):
    """Learning curves, and run id -> what is missing from a run's curve, in words."""

    curves: list[Curve]
    lacking: dict[str, str]


def read_curves(workdir: Path, records: Iterable[RunRecord]) -> Curves:
    """Returns the curves of the records that logged mean losses. Skips damaged lines."""
    curves, lacking = [], {}
    for record in records:
        try:
            logged = read_metrics(run_dir(workdir, record.run_id))
        except InputError as error:
            lacking[record.run_id] = f"cannot be read: {error}"
            continue
        lines, end = [], 0.0
        for values in (line.values or {} for line in logged):
            try:
                step, loss_steps, flops, loss = line = [float(values[name]) for name in LINE]
            except (KeyError, TypeError, ValueError, OverflowError):
                continue  # an evaluation, the loss of one step, or a mean that was not finite
            ordered = end <= step - loss_steps < step <= record.steps
            if ordered and flops > 0 and math.isfinite(flops) and math.isfinite(loss):
                lines.append(line)
                end = step
        if lines:
            columns = np.array(lines).T
            curves.append(Curve(record.run_id, record.variant, record.steps, *columns))
        if lost := lost_steps(logged, record.steps):
            lacking[record.run_id] = f"lacks steps {lost}: metrics.jsonl has no lines of them"
    return Curves(curves, lacking)


def frontier(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns (flops, loss), with the lowest smoothed loss of all curves up to those FLOPs.

    Leaves out curves whose window is shorter than FRONTIER_STEPS. Returns None if no curve is left.
    """
    found = [curve.smooth for curve in curves if curve.window >= FRONTIER_STEPS]
    flops, loss = np.concatenate(found, axis=1) if found else np.empty((2, 0))
    order = np.argsort(flops)
    return (flops[order], np.minimum.accumulate(loss[order])) if len(flops) else None
