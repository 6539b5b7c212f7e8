"""The lines of a run's metrics.jsonl, some of which may be damaged or lost."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from modjax.files import Missing, read

REMEDY = "delete it, and the run continues without its earlier lines"
MOST_SPANS = 5  # spans of lost steps in a message
TAIL = 65_536  # bytes, which hold many lines


class MetricsLine(NamedTuple):
    """A line of metrics.jsonl.

    text: the line without its line end.
    values: the metrics, or None if the line is damaged.
    """

    text: bytes
    values: dict[str, Any] | None


def read_metrics(run_dir: Path, *, last: int | None = None) -> list[MetricsLine]:
    """Returns the complete lines of a run's metrics.jsonl, or of its `last` bytes.

    Returns [] if there is no such file. Raises InputError if the file cannot be read.
    """
    try:
        return _lines(read(run_dir / "metrics.jsonl", REMEDY, last=last))
    except Missing:
        return []


def last_step(run_dir: Path) -> int:
    """Returns the last step that the run has logged, or 0. Raises as `read_metrics` does."""
    lines = read_metrics(run_dir, last=TAIL)
    return next((line.values["step"] for line in reversed(lines) if line.values), 0)


def lost_steps(lines: Iterable[MetricsLine], steps: int) -> str:
    """Returns the steps from 1 to `steps` that no training line covers, as "11 to 20, 31 to 40".

    Shows at most MOST_SPANS spans. A training line covers its step and the `loss_steps` - 1 steps
    before it.
    """
    covered = []
    for values in (line.values or {} for line in lines):
        if isinstance(width := values.get("loss_steps"), int):
            covered.append((values["step"] - width, values["step"]))
    lost, end = [], 0
    for start, stop in [*sorted(covered), (steps, steps)]:
        if end < min(start, steps):
            first, last = end + 1, min(start, steps)
            lost.append(str(last) if first == last else f"{first} to {last}")
        end = max(end, stop)
    return ", ".join([*lost[:MOST_SPANS], *["..."] * (len(lost) > MOST_SPANS)])


def _lines(content: bytes) -> list[MetricsLine]:
    texts = content.split(b"\n")[:-1]
    with contextlib.suppress(ValueError, RecursionError):  # one parse is faster, if none is damaged
        values = json.loads(b"[" + b",".join(texts) + b"]")
        if len(values) == len(texts) and all(map(_is_metrics, values)):
            return list(map(MetricsLine, texts, values))
    return [MetricsLine(text, _values(text)) for text in texts]


def _values(text: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if _is_metrics(values) else None


def _is_metrics(values: Any) -> bool:
    return isinstance(values, dict) and isinstance(values.get("step"), int)
