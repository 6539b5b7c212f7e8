"""What a run's folder holds as JSON: its spec, and one record when it has finished."""

import csv
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modjax.config import InputError, RunSpec, from_dict, to_dict
from modjax.files import write_atomically


@dataclass(frozen=True)
class Record:
    """What a run leaves behind, as `result.json` in its folder. FLOPs by `modjax.flops`.

    Losses are in nats per token; `flops` maps a component to forward FLOPs per sequence;
    `train_flops` is what was spent, `budget_flops` what was asked for. `status` is "finished" or
    "diverged"; a diverged run has no `eval_loss` and names the step in `diverged_step`.
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


def run_dir(workdir: Path, run_id: str) -> Path:
    """The folder of a run of the sweep in `workdir`."""
    return workdir / "runs" / run_id


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that `path` holds either its old content or the whole new one."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def read_spec(run_dir: Path) -> RunSpec:
    """What the run in this folder computes. Raises InputError where that cannot be read."""
    path = run_dir / "spec.json"
    try:
        return from_dict(RunSpec, json.loads(path.read_text()))
    except (OSError, ValueError) as error:  # InputError and JSONDecodeError are ValueErrors
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            str(path), "damaged or missing",
            f"delete it, and the same `modjax sweep` or `train` writes it again ({reason})",
        ) from error  # fmt: skip


def write_record(run_dir: Path, record: Record) -> None:
    write_json(run_dir / "result.json", to_dict(record))


def read_record(run_dir: Path) -> Record | None:
    """The run's record, or None where it has not finished."""
    path = run_dir / "result.json"
    if not path.exists():
        return None
    try:
        return from_dict(Record, json.loads(path.read_text()))
    except (json.JSONDecodeError, InputError) as error:
        raise InputError(str(path), "damaged", f"delete it to run this cell again ({error})") from (
            error
        )


def read_records(workdir: Path) -> list[Record]:
    """Every finished or diverged run under `workdir`, by variant, budget and size."""
    found = (read_record(path.parent) for path in workdir.glob("runs/*/result.json"))
    records = [record for record in found if record is not None]
    return sorted(records, key=lambda r: (r.variant, r.budget_flops, r.params_total, r.seed))


def write_csv(path: Path, records: Iterable[Record]) -> None:
    """A flat table of records; nested fields become JSON text."""
    names = [field.name for field in dataclasses.fields(Record)]
    with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for record in records:
            values = (getattr(record, name) for name in names)
            writer.writerow([json.dumps(v) if isinstance(v, dict) else v for v in values])
