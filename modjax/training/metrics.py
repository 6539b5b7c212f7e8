"""Metrics of a run: JSON lines always, TensorBoard when asked.

Lines hold nothing that depends on the clock, so a resumed run writes the same bytes.
"""

import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from modjax.config import require


class MetricsWriter:
    """Appends lines to `run_dir`/metrics.jsonl, after dropping those that a resumed run repeats.

    start_step: the step of the restored state. Of that step its training line stays and its
    evaluation does not, because a state is saved before it is evaluated.
    progress: called with every line.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        start_step: int,
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
        kept = [
            line + "\n" for line, values in _lines(path)
            if values["step"] < start_step
            or (values["step"] == start_step and "eval_loss" not in values)
        ]  # fmt: skip
        path.touch()
        os.truncate(path, sum(len(line) for line in kept))
        self._file = open(path, "a")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line. Values that are not finite become null."""
        line = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        if self._file is not None:
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
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def last_train_loss(run_dir: Path) -> float | None:
    losses = [values["loss"] for _, values in _lines(run_dir / "metrics.jsonl") if "loss" in values]
    return losses[-1] if losses else None


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The whole lines of a metrics file and their values, up to the first that is damaged."""
    text = path.read_text() if path.exists() else ""
    found = []
    for line in text.split("\n")[:-1]:
        try:
            found.append((line, json.loads(line)))
        except json.JSONDecodeError:
            break
    return found


def _json_number(value: Any) -> int | float | None:
    """Arrays by the 7 digits that a float32 holds."""
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int | float) else float(f"{float(value):.7g}")


def require_tensorboard() -> None:
    """Raises InputError where tensorboardX is not installed."""
    require(
        importlib.util.find_spec("tensorboardX") is not None, "execution.tensorboard", True,
        "needs tensorboardX: pip install -e '.[tensorboard]'",
    )  # fmt: skip


def _summary_writer(run_dir: Path, start_step: int) -> Any:
    require_tensorboard()
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
