"""The fields of the runs' specs: those that all runs share, and those that differ."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modjax.records import RunRecord, run_dir
from modjax.scaling.fit.comparable_runs import lenient_json

Spec = dict[str, Any]  # flat: the fields of a spec by names such as "train.steps"


@dataclass(frozen=True)
class Specs:
    """Every field of every spec, listed once.

    shared: fields with the same value in all runs.
    by_arm: fields with the same value in all runs of each arm.
    by_run: the other fields, by run id.
    """

    shared: Spec
    by_arm: dict[str, Spec]
    by_run: dict[str, Spec]

    @property
    def arm_fields(self) -> list[str]:
        return list(dict.fromkeys(name for spec in self.by_arm.values() for name in spec))

    @property
    def run_fields(self) -> list[str]:
        return list(dict.fromkeys(name for spec in self.by_run.values() for name in spec))


def read_specs(workdir: Path, records: Sequence[RunRecord]) -> Specs:
    """Returns the specs of the runs, without those whose spec.json cannot be read."""
    specs = {}
    for r in records:
        if spec := lenient_json(run_dir(workdir, r.run_id) / "spec.json"):
            # One copy of each name, for 10,000 runs.
            specs[r.run_id] = {sys.intern(name): value for name, value in _flatten(spec)}
    return _compare(specs, {r.run_id: r.variant for r in records})


def _flatten(values: Spec, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yields nested fields with their full names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _compare(specs: Mapping[str, Spec], arms: Mapping[str, str]) -> Specs:
    """Compares flat specs by run id. arms: the arm of every run id."""
    groups: dict[str, list[Spec]] = {}
    for run_id, spec in specs.items():
        groups.setdefault(arms[run_id], []).append(spec)
    shared = _common(list(specs.values()))
    by_arm = {arm: _common(of_arm) for arm, of_arm in groups.items()}
    # A field that differs within one arm is listed for every run.
    differing = {n for run_id, spec in specs.items() for n in spec if n not in by_arm[arms[run_id]]}
    listed = {*shared, *differing}
    return Specs(
        shared,
        {arm: {n: spec[n] for n in spec if n not in listed} for arm, spec in by_arm.items()},
        {run_id: {n: spec[n] for n in spec if n in differing} for run_id, spec in specs.items()},
    )


def _common(specs: Sequence[Spec]) -> Spec:
    """Returns the fields that all specs have with the same value."""
    first = specs[0] if specs else {}
    return {n: v for n, v in first.items() if all(n in s and s[n] == v for s in specs)}
