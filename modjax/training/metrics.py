"""Metrics of a run: JSON lines always, TensorBoard when asked.

Lines hold nothing that depends on the clock, so a resumed run writes the same bytes.
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
    """Appends lines to `run_dir`/metrics.jsonl, after dropping those that a resumed run repeats.

    A damaged line is left out with a warning, and the lines after it are kept. Lines that are lost
    cannot be made again without their training steps: a warning names the steps.

    start_step: the step of the restored state. Of that step its training line stays and its
    evaluation does not, because a state is saved before it is evaluated.
    unlogged: how many of the steps up to `start_step` the next training line will cover.
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
            self._board = _summary_writer(run_dir, start_step)
        path = run_dir / "metrics.jsonl"
        lines = read_metrics(run_dir)
        kept = [line for line in lines if _stays(line.values, start_step)]
        last = max((n for n, line in enumerate(lines, 1) if line.values is not None), default=0)
        for number, line in enumerate(lines[:last], 1):  # what a kill leaves comes after it
            if line.values is None:
                logger.warning("modjax: %s: line %d is damaged: left out", path, number)
        if lost := lost_steps(kept, start_step - unlogged):
            logger.warning(
                "modjax: %s: has lost its lines of steps %s: the run goes on from step %d, and its "
                "learning curve lacks them",
                path,
                lost,
                start_step,
            )
        write_atomically(path, b"".join(line.text + b"\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line. Values that are not finite become null."""
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
        """Returns when all lines are on the disk."""
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


def _stays(values: dict[str, Any] | None, start_step: int) -> bool:
    if values is None:
        return False
    step = values["step"]
    return step < start_step or (step == start_step and "eval_loss" not in values)


def _json_number(value: Any) -> int | float | None:
    """Arrays by the 7 digits that a float32 holds."""
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int | float) else float(f"{float(value):.7g}")


def require_tensorboard() -> None:
    """Raises InputError where tensorboardX is not installed."""
    require(
        importlib.util.find_spec("tensorboardX") is not None,
        "execution.tensorboard",
        True,
        "needs tensorboardX: pip install -e '.[tensorboard]'",
    )


def _summary_writer(run_dir: Path, start_step: int) -> Any:
    require_tensorboard()
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
