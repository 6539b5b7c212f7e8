"""What a run's folder holds as JSON: its spec, and one record when it has finished."""

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
    """The result of a run, as `result.json` in its folder. FLOPs by `modjax.flops`.

    Losses are in nats per token, eval_* as trained; `flops` maps a component to forward FLOPs per
    sequence; `train_flops` is spent, `budget_flops` requested. `status` is "finished" or
    "diverged"; a diverged run has no `eval_loss` and names the step in `diverged_step`.
    causal_routing: the rules that never look ahead under which the other causal_* were taken:
      "trained" where training itself never looks ahead, NO_ROUTING where the model has none, None
      in earlier records, which `causal_routing` reads.
    outcome: numbers of the layers' records in the evaluation, see `outcome` in modjax/nn: as
      trained, as in "trained/capacity", and under the causal rules, as in "causal/accuracy".
    provenance: see modjax/provenance.py; empty in records from before it was kept.
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


# Fields of earlier records -> the name of their number in `outcome`.
EARLIER = {
    "causal_accuracy": "causal/accuracy",
    "causal_capacity": "causal/capacity",
    "moe_dropped": "trained/moe/dropped",
    "moe_no_op": "trained/moe/no_op",
    "moe_useful": "trained/moe/useful",
    "near_ties": "trained/near_ties",
}


def record_from(values: Any) -> RunRecord:
    """Returns the record with these fields, which an earlier modjax may have written."""
    if isinstance(values, dict):
        outcome = {new: values[old] for old, new in EARLIER.items() if values.get(old) is not None}
        kept = {name: value for name, value in values.items() if name not in EARLIER}
        values = {**kept, "outcome": outcome} if outcome else kept
    return from_dict(RunRecord, values)


def causal_routing(record: RunRecord) -> str | None:
    """Returns the routing under which `causal_loss` was taken, or None where the model has none.

    Earlier records name no routing where training never looks ahead, and none where the model had
    no other. Their costs tell the two apart: the first has no router, and all positions use all
    parameters, or every k-th position does ("anchors").
    """
    if record.causal_routing is not None:
        return None if record.causal_routing == NO_ROUTING else record.causal_routing
    skips = record.params_active < record.params_non_embedding and "anchors" not in record.flops
    return None if skips or record.flops.get("router", 0) > 0 else "trained"


def causal_loss(record: RunRecord) -> float | None:
    """Returns the loss under routing that never looks ahead, None where there is none.

    A dense run's is its loss as trained.
    """
    as_trained = causal_routing(record) == "trained"
    return record.eval_loss if as_trained else record.causal_loss


def run_dir(workdir: Path, run_id: str) -> Path:
    """Returns the folder of a run of the sweep in `workdir`.

    Raises InputError where `run_id`, which another's plan may name, leads out of it.
    """
    require_name("run id", run_id, most=2 * LONGEST_NAME)
    return workdir / "runs" / run_id


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that `path` holds either its old content or the whole new one."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_as(make: Callable[[Any], T], path: Path, remedy: str) -> T:
    """Returns what `make` makes of the values in a JSON file. Raises as `files.read_json`.

    remedy: tells the user what to do about a file that cannot be read.
    """
    values = read_json(path, remedy)
    try:
        return make(values)
    except InputError as error:
        raise damaged(path, remedy, error) from error


def read_spec(run_dir: Path, run_id: str | None = None) -> RunSpec:
    """Returns the spec of the run in this folder.

    run_id: the run that the folder is for, where it is known.
    Imports nothing that the folder names. Raises InputError where the spec cannot be read, has
    another format or is another run's, and UnknownName where it has a layer that is not registered.
    """
    path = run_dir / "spec.json"
    values = read_json(path, WRITTEN_AGAIN)
    if isinstance(values, dict) and values:
        require_format(path, values.pop("format", 1))
    try:
        spec = from_dict(RunSpec, values)
    except UnknownName as error:
        raise UnknownName(
            str(path),
            error.value,
            "is no layer of modjax's: give the file or module that registers it with --imports "
            "(in Python, imports=[...]) if you trust it; the run's own are "
            f"{values['model'].get('imports')}",
        ) from error
    except InputError as error:
        raise damaged(path, WRITTEN_AGAIN, error) from error
    _require_own(path, spec.run_id, run_id)
    return spec


def write_spec(run_dir: Path, spec: RunSpec) -> None:
    """Writes spec.json, which says what the run computes."""
    write_json(run_dir / "spec.json", {"format": FORMAT} | to_dict(spec))


def require_format(path: Path, found: Any) -> None:
    """Raises InputError for a file of runs that another version of modjax has named."""
    accepted = (
        f"must be {FORMAT}: runs of another modjax can neither be resumed nor opened; choose "
        "another workdir (`modjax fit` and `modjax report` still read their results)"
    )
    require(found == FORMAT, str(path), f"format {found}", accepted)


def read_provenance(run_dir: Path) -> dict[str, str]:
    """Returns what the run depends on beyond its spec; {} where that was not kept."""
    path, remedy = run_dir / "provenance.json", "delete it, and nobody knows what code the run had"
    try:
        values = read_json(path, remedy)
    except Missing:
        return {}
    if isinstance(values, dict) and all(isinstance(value, str) for value in values.values()):
        return values
    raise damaged(path, remedy, "it must hold names with text")


def write_provenance(run_dir: Path, values: dict[str, str]) -> None:
    """Writes provenance.json, see modjax/provenance.py."""
    write_json(run_dir / "provenance.json", values)


def write_record(run_dir: Path, record: RunRecord) -> None:
    """Writes result.json, which says that the run has ended."""
    write_json(run_dir / "result.json", to_dict(record))


def read_record(run_dir: Path, run_id: str | None = None) -> RunRecord | None:
    """Returns the record of the run in this folder, or None where it has not finished.

    run_id: the run that the folder is for, where it is known.
    Raises InputError where the record cannot be read, or is another run's.
    """
    path = run_dir / "result.json"
    try:
        record = read_as(record_from, path, "delete it to run this cell again")
    except Missing:
        return None
    _require_own(path, record.run_id, run_id)
    return record


def _require_own(path: Path, found: str, run_id: str | None) -> None:
    """Raises InputError for a file of another run than the one that its folder is for."""
    accepted = f"must be {run_id}, as its folder is named; keep copies of runs outside runs/"
    require(run_id in (None, found), str(path), found, accepted)


class Scan(NamedTuple):
    """The runs in a sweep's folder that have finished or diverged.

    records: sorted by variant, budget, size and seed.
    left_out: folder name -> why its result is not among them, in one line. A result that cannot be
      read is left out, and so is a copy of a run: a folder that has another name than its run.
    """

    records: list[RunRecord]
    left_out: dict[str, str]


def scan(workdir: Path) -> Scan:
    """Reads every result.json under `workdir`. A folder that is left out hides no other."""
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


def name_left_out(left_out: dict[str, str]) -> None:
    """Warns of every folder that does not count, see `Scan`."""
    for why in left_out.values():
        logger.warning("modjax: left out: %s", why)


def read_records(workdir: Path) -> list[RunRecord]:
    """Returns the records of `scan`."""
    return scan(workdir).records


def write_csv(path: Path, records: Iterable[RunRecord]) -> None:
    """Writes a flat table of records; nested fields become JSON text."""
    names = [field.name for field in dataclasses.fields(RunRecord)]
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(names)
    for record in records:
        values = (getattr(record, name) for name in names)
        writer.writerow([json.dumps(v) if isinstance(v, dict) else v for v in values])
    write_atomically(path, table.getvalue().encode(errors="replace"))


def read_csv(path: Path) -> list[RunRecord]:
    """Returns the records in a table of `write_csv`; an older table may lack the newest columns.

    Raises InputError where a row is no record.
    """
    with open(path, newline="", encoding="utf-8") as file:
        return [
            record_from({name: _cell(name, text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def _cell(name: str, text: str) -> Any:
    if text == "":
        return None
    with contextlib.suppress(ValueError):  # `from_dict` says what is wrong with other text
        return text if name in _TEXTS else json.loads(text)
    return text


_TEXTS = {f.name for f in dataclasses.fields(RunRecord) if f.type in (str, str | None)}
