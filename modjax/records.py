"""What a run's folder holds as JSON: its spec, and one record when it has finished."""

import contextlib
import csv
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from modjax.errors import InputError
from modjax.files import damaged, read_json, write_atomically
from modjax.spec import RunSpec, from_dict, to_dict

T = TypeVar("T")

WRITTEN_AGAIN = "delete it, and the same `modjax sweep` or `train` writes it again"
METRICS_TAIL = 65_536  # bytes, which hold many lines


@dataclass(frozen=True)
class Record:
    """What a run leaves behind, as `result.json` in its folder. FLOPs by `modjax.flops`.

    Losses are in nats per token; `flops` maps a component to forward FLOPs per sequence;
    `train_flops` is what was spent, `budget_flops` what was asked for. `status` is "finished" or
    "diverged"; a diverged run has no `eval_loss` and names the step in `diverged_step`. causal_*:
    under a routing that never looks ahead, which may be what training does. moe_*: shares of
    experts' picks in the evaluation as trained, see nn/expert_record.py; None without experts.
    """

    run_id: str
    variant: str
    status: str
    diverged_step: int | None
    budget_flops: float
    train_flops: float
    forward_flops_per_token: float
    flops: dict[str, float]
    params_total: int
    params_non_embedding: int
    params_active: int
    d_model: int
    num_layers: int
    tokens: int
    epochs: float
    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    train_loss: float | None
    eval_loss: float | None
    eval_loss_sem: float | None
    eval_bits_per_byte: float | None
    eval_tokens: int
    seed: int
    data_seed: int
    data_fingerprint: str
    code_version: str
    wall_seconds: float
    train_seconds: float
    compile_seconds: float
    eval_seconds: float
    data_wait_seconds: float
    median_step_seconds: float
    device: str
    versions: dict[str, str]
    causal_routing: str | None = None
    causal_loss: float | None = None
    causal_difference: float | None = None
    causal_difference_sem: float | None = None
    causal_accuracy: float | None = None
    causal_capacity: float | None = None
    moe_dropped: float | None = None
    moe_no_op: float | None = None
    moe_useful: float | None = None


def run_dir(workdir: Path, run_id: str) -> Path:
    """The folder of a run of the sweep in `workdir`."""
    return workdir / "runs" / run_id


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that `path` holds either its old content or the whole new one."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_as(cls: type[T], path: Path, remedy: str) -> T:
    """The frozen config `cls` that a JSON file holds.

    Raises InputError where it cannot be read. remedy: what the line says to do then.
    """
    values = read_json(path, remedy)
    try:
        return from_dict(cls, values)
    except InputError as error:
        raise damaged(path, remedy, error) from error


def read_spec(run_dir: Path) -> RunSpec:
    """What the run in this folder computes. Raises InputError where that cannot be read."""
    return read_as(RunSpec, run_dir / "spec.json", WRITTEN_AGAIN)


def write_record(run_dir: Path, record: Record) -> None:
    write_json(run_dir / "result.json", to_dict(record))


def read_record(run_dir: Path) -> Record | None:
    """The run's record, or None where it has not finished.

    Raises InputError where it cannot be read.
    """
    path = run_dir / "result.json"
    return read_as(Record, path, "delete it to run this cell again") if path.exists() else None


class Scan(NamedTuple):
    """Finished and diverged runs, by variant, budget, size and seed.

    unreadable: run id -> what is wrong with its result.json, in one line.
    """

    records: list[Record]
    unreadable: dict[str, str]


def scan(workdir: Path) -> Scan:
    """What every result.json under `workdir` says; one that is damaged hides no other."""
    records, unreadable = [], {}
    for path in workdir.glob("runs/*/result.json"):
        try:
            records.append(read_as(Record, path, "delete it to run this cell again"))
        except InputError as error:
            unreadable[path.parent.name] = str(error)
    records.sort(key=lambda r: (r.variant, r.budget_flops, r.params_total, r.seed))
    return Scan(records, dict(sorted(unreadable.items())))


def read_records(workdir: Path) -> list[Record]:
    """Those of `scan` that can be read."""
    return scan(workdir).records


class MetricsLine(NamedTuple):
    """A line of metrics.jsonl without its end; values is None where it is damaged."""

    text: bytes
    values: dict[str, Any] | None


def read_metrics(run_dir: Path) -> list[MetricsLine]:
    """The whole lines of a run's metrics.jsonl, [] where there is none; a torn end is no line."""
    path = run_dir / "metrics.jsonl"
    return _metrics_lines(path.read_bytes()) if path.is_file() else []


def last_step(run_dir: Path) -> int:
    """The last step that the run has logged, read from the end of its metrics.jsonl; 0 if none."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - METRICS_TAIL))
        lines = _metrics_lines(file.read())
    return next((line.values["step"] for line in reversed(lines) if line.values), 0)


def _metrics_lines(content: bytes) -> list[MetricsLine]:
    texts = content.split(b"\n")[:-1]
    with contextlib.suppress(ValueError, RecursionError):  # all at once, where none is damaged
        values = json.loads(b"[" + b",".join(texts) + b"]")
        if len(values) == len(texts) and all(map(_is_metrics, values)):
            return list(map(MetricsLine, texts, values))
    return [MetricsLine(text, _metrics_values(text)) for text in texts]


def _metrics_values(text: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if _is_metrics(values) else None


def _is_metrics(values: Any) -> bool:
    return isinstance(values, dict) and isinstance(values.get("step"), int)


def write_csv(path: Path, records: Iterable[Record]) -> None:
    """A flat table of records; nested fields become JSON text."""
    names = [field.name for field in dataclasses.fields(Record)]
    with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for record in records:
            values = (getattr(record, name) for name in names)
            writer.writerow([json.dumps(v) if isinstance(v, dict) else v for v in values])


def read_csv(path: Path) -> list[Record]:
    """Returns the records in a table of `write_csv`; an older table may lack the newest columns.

    Raises InputError where a row is no record.
    """
    with open(path, newline="", encoding="utf-8") as file:
        return [
            from_dict(Record, {name: _cell(name, text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def _cell(name: str, text: str) -> Any:
    if text == "":
        return None
    with contextlib.suppress(ValueError):  # `from_dict` says what is wrong with other text
        return text if name in _TEXTS else json.loads(text)
    return text


_TEXTS = {f.name for f in dataclasses.fields(Record) if f.type in (str, str | None)}
