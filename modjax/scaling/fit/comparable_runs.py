"""Runs that can be compared: scored on the same validation data, by the same kind of loss."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modjax.errors import InputError, require
from modjax.files import read_json
from modjax.records import RunRecord, causal_loss, causal_routing

DEEPEST = 20  # nesting levels of a sweep's JSON, with room to spare


def comparable(records: Sequence[RunRecord]) -> tuple[list[RunRecord], dict[str, str]]:
    """Sets aside runs that were scored on other validation data than most finished runs.

    Returns the remaining records, and run id -> how a run that is set aside differs. Sets none
    aside unless more than half of the finished runs share their validation data.
    """
    finished = (r for r in records if r.eval_loss is not None)
    scored = {r.run_id: (r.data_fingerprint, r.eval_tokens) for r in finished}
    counts = Counter(scored.values())
    most = next((data for data, runs in counts.items() if 2 * runs > len(scored)), None)
    if most is None:
        return list(records), {}
    apart = {
        run_id: f"{run_id} was scored on {tokens} tokens of data {data}, and {counts[most]} other "
        f"runs on {most[1]} tokens of {most[0]}"
        for run_id, (data, tokens) in scored.items()
        if (data, tokens) != most
    }
    return [r for r in records if r.run_id not in apart], apart


class Compared(NamedTuple):
    """Runs that can be compared by one kind of loss.

    records: these runs, with that loss as their `eval_loss`.
    without: finished runs without a causal loss, with their loss as trained. Under the loss
      "trained" they are among `records`, too.
    """

    records: list[RunRecord]
    without: list[RunRecord]


def under(records: Sequence[RunRecord], loss: str) -> Compared:
    """Returns the runs that can be compared by `loss`.

    "causal": the loss under routing that never looks ahead. Runs without one are left out. A
      diverged run is left out if all finished runs of its arm are.
    "trained": the loss as the runs were trained, of every run.
    Raises InputError if no finished run has a causal loss.
    """
    finished = [r for r in records if r.status == "finished"]
    without = [r for r in finished if causal_routing(r) is None]
    if loss == "trained":
        return Compared(list(records), without)
    dropped = {r.run_id for r in without}
    arms = {r.variant for r in finished if r.run_id not in dropped}
    gone = {r.variant for r in without} - arms
    require(
        bool(arms) or not gone,
        "--loss",
        loss,
        f"no finished run has a causal loss, in any of the arms {', '.join(sorted(gone))}; "
        "--loss=trained compares them as they were trained",
    )
    kept = (r for r in records if r.run_id not in dropped and r.variant not in gone)
    return Compared([with_loss(r, loss) for r in kept], without)


def with_loss(r: RunRecord, loss: str) -> RunRecord:
    """Returns the record with its evaluation's loss and bits per byte replaced by those of `loss`.

    A run whose causal loss is not finite becomes diverged. The standard error stays that of the
    loss as trained.
    """
    value = r.eval_loss if loss == "trained" else causal_loss(r)
    if r.status != "finished" or r.eval_loss is None or value == r.eval_loss:
        return r
    if value is None:
        status = "finished" if causal_routing(r) is None else "diverged"
        return dataclasses.replace(r, status=status, eval_loss=None, eval_bits_per_byte=None)
    bits = r.eval_bits_per_byte and r.eval_bits_per_byte * value / r.eval_loss
    return dataclasses.replace(r, eval_loss=value, eval_bits_per_byte=bits)


def lenient_plan(workdir: Path) -> dict[str, Any]:
    """Returns the fields of plan.json that can be read; "runs" is a list of text or absent."""
    plan = lenient_json(workdir / "plan.json")
    runs = plan.get("runs")
    if not (isinstance(runs, list) and all(isinstance(run_id, str) for run_id in runs)):
        plan.pop("runs", None)
    return plan


def lenient_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`, or {} if it is missing or damaged."""
    try:
        values = read_json(path, "")
    except InputError:
        return {}
    return values if isinstance(values, dict) and not _deeper(values, DEEPEST) else {}


def _deeper(value: dict[str, Any] | list[Any], levels: int) -> bool:
    """Returns whether objects and lists are nested more than `levels` deep."""
    inner = value.values() if isinstance(value, dict) else value
    groups = (item for item in inner if isinstance(item, dict | list))
    return levels == 0 or any(_deeper(group, levels - 1) for group in groups)
