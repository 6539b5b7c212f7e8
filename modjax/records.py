"""The JSON files in a run's folder: its spec, its provenance and, at the end, its record."""

import contextlib
import csv
import dataclasses
import io
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from modjax.errors import LONGEST_NAME, InputError, require, require_name
from modjax.files import Missing, damaged, entries, read_json, write_atomically
from modjax.specs import RunSpec, from_dict, to_dict
from modjax.specs.run import FORMAT
from modjax.specs.text import UnknownName

logger = logging.getLogger("modjax")
T = TypeVar("T")

WRITTEN_AGAIN = "delete it, and the same `modjax sweep` or `train` writes it again"
NO_ROUTING = "none"


@dataclass(frozen=True)
class RunRecord:
    """The result of a run, stored as `result.json` in its folder.

    status: "finished" or "diverged"; a diverged run has `diverged_step` but no `eval_loss`.
    budget_flops, train_flops: training FLOPs requested and spent.
    flops: forward FLOPs per sequence of each component, as `modjax.flops` counts them.
    train_loss, eval_loss: nats per token under the routing of training; train_loss is that of
      train.objective.
    causal_routing: names of the rules behind the other causal_* fields; "trained" if training never
      looks ahead, NO_ROUTING if no rule applies, None in earlier records (see `causal_routing`).
    outcome: what the layers measured in the evaluation, as trained ("trained/capacity") and under
      the causal rules ("causal/accuracy"); see `Record` in nn/records.py.
    provenance: see provenance.py; empty in earlier records.
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
    eval_batch_size: int | None = None
    outcome: dict[str, int | float | None] = dataclasses.field(default_factory=dict)
    provenance: dict[str, str] = dataclasses.field(default_factory=dict)


# Field of earlier records -> name of the same number in `outcome`.
EARLIER = {
    "causal_accuracy": "causal/accuracy",
    "causal_capacity": "causal/capacity",
    "moe_dropped": "trained/moe/dropped",
    "moe_no_op": "trained/moe/no_op",
    "moe_useful": "trained/moe/useful",
    "near_ties": "trained/near_ties",
}


def record_from(values: Any) -> RunRecord:
    """Returns the record with the fields `values`, which an earlier modjax may have written."""
    if isinstance(values, dict):
        outcome = {new: values[old] for old, new in EARLIER.items() if values.get(old) is not None}
        values = {name: value for name, value in values.items() if name not in EARLIER}
        values |= {"outcome": outcome} if outcome else {}
    return from_dict(RunRecord, values)


def causal_routing(record: RunRecord) -> str | None:
    """Returns the routing behind `causal_loss`, or None if the model has none.

    An earlier record without the field counts as "trained" (training never looks ahead) if the
    model has no router, and if every position, or every k-th one ("anchors"), uses all parameters.
    """
    if record.causal_routing is not None:
        return None if record.causal_routing == NO_ROUTING else record.causal_routing
    skips = record.params_active < record.params_non_embedding and "anchors" not in record.flops
    return None if skips or record.flops.get("router", 0) > 0 else "trained"


def causal_loss(record: RunRecord) -> float | None:
    """Returns the loss under `causal_routing`, or None. If that is "trained", it is `eval_loss`."""
    as_trained = causal_routing(record) == "trained"
    return record.eval_loss if as_trained else record.causal_loss


def run_dir(workdir: Path, run_id: str) -> Path:
    """Returns the folder of a run. Raises InputError for an id that would lead out of `workdir`."""
    require_name("run id", run_id, most=2 * LONGEST_NAME)
    return workdir / "runs" / run_id


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file, which at any time holds its old content or all of the new."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_as(make: Callable[[Any], T], path: Path, remedy: str) -> T:
    """Returns `make(value)` of the value in a JSON file. Raises as `files.read_json` does.

    remedy: tells the user what to do about an unreadable file.
    """
    value = read_json(path, remedy)
    try:
        return make(value)
    except InputError as error:
        raise damaged(path, remedy, error) from error


def write_spec(run_dir: Path, spec: RunSpec) -> None:
    """Writes spec.json, which defines what the run computes."""
    write_json(run_dir / "spec.json", {"format": FORMAT} | to_dict(spec))


def read_spec(run_dir: Path, run_id: str | None = None) -> RunSpec:
    """Returns the spec of a run, whose id is `run_id` if known. Imports nothing that it names.

    Raises InputError if the spec cannot be read, has another format or belongs to another run, and
    UnknownName if it has a layer that is not registered.
    """
    path = run_dir / "spec.json"
    values = read_json(path, WRITTEN_AGAIN)
    if isinstance(values, dict) and values:
        require_format(path, values.pop("format", 1))
    try:
        spec = from_dict(RunSpec, values)
    except UnknownName as error:
        accepted = (
            "is no layer of modjax's: give the file or module that registers it with --imports "
            "(in Python, imports=[...]) if you trust it; the run itself names "
            f"{values['model'].get('imports')}"
        )
        raise UnknownName(str(path), error.value, accepted) from error
    except InputError as error:
        raise damaged(path, WRITTEN_AGAIN, error) from error
    _require_own(path, spec.run_id, run_id)
    return spec


def require_format(path: Path, found: Any) -> None:
    """Raises InputError unless `found`, the format of the runs' file at `path`, is FORMAT."""
    accepted = (
        f"must be {FORMAT}: runs of another modjax can neither be resumed nor opened; choose "
        "another workdir (`modjax fit` and `modjax report` still read their results)"
    )
    require(found == FORMAT, str(path), f"format {found}", accepted)


def write_provenance(run_dir: Path, values: dict[str, str]) -> None:
    write_json(run_dir / "provenance.json", values)


def read_provenance(run_dir: Path) -> dict[str, str]:
    """Returns the content of provenance.json, or {} if there is no such file."""
    path, remedy = run_dir / "provenance.json", "delete it, and its values count as not recorded"
    try:
        values = read_json(path, remedy)
    except Missing:
        return {}
    if isinstance(values, dict) and all(isinstance(value, str) for value in values.values()):
        return values
    raise damaged(path, remedy, "it must hold names with text")


def write_record(run_dir: Path, record: RunRecord) -> None:
    """Writes result.json, whose presence means that the run has ended."""
    write_json(run_dir / "result.json", to_dict(record))


def read_record(run_dir: Path, run_id: str | None = None) -> RunRecord | None:
    """Returns the record of a run, whose id is `run_id` if known, or None if it has not ended.

    Raises InputError if the record cannot be read or belongs to another run.
    """
    path = run_dir / "result.json"
    try:
        record = read_as(record_from, path, "delete it to run this cell again")
    except Missing:
        return None
    _require_own(path, record.run_id, run_id)
    return record


def _require_own(path: Path, found: str, run_id: str | None) -> None:
    accepted = f"must be {run_id}, as its folder is named; keep copies of runs outside runs/"
    require(run_id in (None, found), str(path), found, accepted)


class Scan(NamedTuple):
    """The runs in a sweep's folder that have finished or diverged.

    records: sorted by variant, budget, size and seed.
    left_out: folder name -> why its result does not count, in one line. The result cannot be read,
      or the folder is a copy: it has another name than its run.
    """

    records: list[RunRecord]
    left_out: dict[str, str]


def scan(workdir: Path) -> Scan:
    """Reads every result.json under `workdir`. Names unusable ones in `left_out`."""
    records, left_out = [], {}
    for folder in entries(workdir / "runs"):
        try:
            record = read_record(folder, folder.name)
        except InputError as error:
            left_out[folder.name] = str(error)
        else:
            if record is not None:
                records.append(record)
    records.sort(key=lambda r: (r.variant, r.budget_flops, r.params_total, r.seed))
    return Scan(records, left_out)


def warn_left_out(left_out: dict[str, str]) -> None:
    """Logs a warning for each folder of `Scan.left_out`."""
    for why in left_out.values():
        logger.warning("modjax: left out: %s", why)


def read_records(workdir: Path) -> list[RunRecord]:
    """Returns the records of finished and diverged runs, as `scan` reads them."""
    return scan(workdir).records


def write_csv(path: Path, records: Iterable[RunRecord]) -> None:
    """Writes one row per record; nested fields become JSON text."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(field.name for field in dataclasses.fields(RunRecord))
    for record in records:
        values = vars(record).values()
        writer.writerow(json.dumps(v) if isinstance(v, dict) else v for v in values)
    write_atomically(path, table.getvalue().encode(errors="replace"))


def read_csv(path: Path) -> list[RunRecord]:
    """Returns the records in a file of `write_csv`, which may lack the newest columns.

    Raises InputError for a row that is not a record.
    """
    with open(path, newline="", encoding="utf-8") as file:
        return [
            record_from({name: _cell(name, text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def _cell(name: str, text: str) -> Any:
    if text == "":
        return None
    with contextlib.suppress(ValueError):  # `from_dict` explains what is wrong with other text
        return text if name in _TEXTS else json.loads(text)
    return text


_TEXTS = {f.name for f in dataclasses.fields(RunRecord) if f.type in (str, str | None)}
