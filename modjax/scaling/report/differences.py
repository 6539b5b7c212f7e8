"""What the specs of a sweep's runs have in common, and where they differ."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Specs:
    """Every field of every spec, said once, under a name such as "train.steps".

    shared: the same in all runs; by_arm: the same in all runs of each arm; by_run: the others,
    by run id. Fields that a spec lacks are left out.
    """

    shared: dict[str, Any]
    by_arm: dict[str, dict[str, Any]]
    by_run: dict[str, dict[str, Any]]

    @property
    def arm_fields(self) -> list[str]:
        return list(dict.fromkeys(name for spec in self.by_arm.values() for name in spec))

    @property
    def run_fields(self) -> list[str]:
        return list(dict.fromkeys(name for spec in self.by_run.values() for name in spec))


def compare(specs: Mapping[str, Mapping[str, Any]], arms: Mapping[str, str]) -> Specs:
    """specs: flat, as `flatten` gives them, by run id; arms: the arm of every run id."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run_id, spec in specs.items():
        groups.setdefault(arms[run_id], []).append(spec)
    shared = _common(list(specs.values()))
    by_arm = {arm: _common(of_arm) for arm, of_arm in groups.items()}
    # A field that differs within one arm is said of every run.
    same = {
        name
        for name in {name for spec in specs.values() for name in spec}
        if all(
            name in by_arm[arm] or not any(name in spec for spec in groups[arm]) for arm in groups
        )
    }
    return Specs(
        shared=shared,
        by_arm={
            arm: {n: v for n, v in spec.items() if n in same and n not in shared}
            for arm, spec in by_arm.items()
        },
        by_run={
            run_id: {n: v for n, v in spec.items() if n not in same}
            for run_id, spec in specs.items()
        },
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested fields by their whole names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _common(specs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that all specs have with the same value."""
    found = dict(specs[0]) if specs else {}
    for spec in specs:
        found = {n: v for n, v in found.items() if n in spec and spec[n] == v}
    return found
