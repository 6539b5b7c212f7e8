"""Metrics of a run, as JSON lines and, on request, for TensorBoard.

No line depends on the clock, so a resumed run writes the same bytes.
"""

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from modjax.errors import require
from modjax.files import naming, write_atomically
from modjax.metrics_file import lost_steps, read_metrics

logger = logging.getLogger("modjax")


class MetricsWriter:
    """Appends lines to metrics.jsonl in `run_dir`, and to TensorBoard's files.

    First drops the lines that a resumed run writes again. Warns of damaged lines, which it drops,
    and of steps whose lines are lost.

    start_step: step of the restored state. Its training line is kept. Its evaluation is dropped,
      because a state is saved before it is evaluated.
    unlogged: number of steps up to `start_step` that the next training line will cover.
    tensorboard: whether to write TensorBoard's files, too.
    progress: called with every line.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        start_step: int,
        unlogged: int = 0,
        tensorboard: bool,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ):
        self._progress = progress
        self._file = self._board = None
        if jax.process_index() > 0:
            return  # one process writes for all
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        path, lines = run_dir / "metrics.jsonl", read_metrics(run_dir)
        while lines and lines[-1].values is None:
            lines.pop()  # a kill cut it short
        for number, line in enumerate(lines, 1):
            if line.values is None:
                logger.warning("modjax: %s: line %d is damaged: left out", path, number)
        kept = [line for line in lines if line.values and _stays(line.values, start_step)]
        if lost := lost_steps(kept, start_step - unlogged):
            message = (
                "modjax: %s: has lost its lines of steps %s: the run goes on from step %d, and its "
                "learning curve lacks them"
            )
            logger.warning(message, path, lost, start_step)
        write_atomically(path, b"".join(line.text + b"\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line. Numbers that are not finite become null."""
        line = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        if self._file is not None:
            with naming(Path(self._file.name)):
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, float(value), step)
        if self._progress is not None:
            self._progress(line)

    def sync(self) -> None:
        """Waits until all lines are on disk."""
        if self._file is not None:
            with naming(Path(self._file.name)):
                os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def last_train_loss(run_dir: Path) -> float | None:
    """Returns the loss of the last training line of metrics.jsonl, or None."""
    lines = (line.values for line in reversed(read_metrics(run_dir)))
    return next((values["loss"] for values in lines if values and "loss" in values), None)


def _stays(values: dict[str, Any], start_step: int) -> bool:
    step = values["step"]
    return step < start_step or (step == start_step and "eval_loss" not in values)


def _json_number(value: Any) -> int | float | None:
    """Returns a number for JSON: arrays with the 7 digits of a float32, None for NaN and inf."""
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int | float) else float(f"{float(value):.7g}")


def require_tensorboard() -> None:
    """Raises InputError if tensorboardX is not installed."""
    there = importlib.util.find_spec("tensorboardX") is not None
    need = "needs tensorboardX: pip install -e '.[tensorboard]'"
    require(there, "execution.tensorboard", True, need)
