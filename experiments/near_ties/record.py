"""Tables and claims of README.md, checked against results.json; see experiments/check.py."""

import json
from collections.abc import Iterator
from pathlib import Path

from experiments.tables import markdown

RUNS = json.loads(Path(__file__).with_name("results.json").read_text(encoding="utf-8"))
ARMS = ("dense", "mod12", "token-choice", "expert-choice")


def tables() -> dict[str, str]:
    rows = (
        (run["arm"], run["seed"], *(f"{loss:.4f}" for loss in run["devices"].values()))
        for run in sorted(RUNS, key=lambda run: (ARMS.index(run["arm"]), run["seed"]))
    )
    return {"devices": markdown(("arm", "seed", *RUNS[0]["devices"]), rows)}


def largest_change(arm: str, kind: str) -> float:
    """Returns the largest difference between two losses of the same run of an arm."""
    losses = [run[kind].values() for run in RUNS if run["arm"] == arm]
    return max(max(group) - min(group) for group in losses)


def claims() -> Iterator[tuple[str, bool]]:
    devices = {arm: f"{largest_change(arm, 'devices'):.4f}" for arm in ARMS}
    yield (
        f"at most {devices['dense']} for dense, {devices['mod12']} for mod12, "
        f"{devices['token-choice']} for token choice and {devices['expert-choice']} for expert "
        "choice",
        True,
    )
    yield (
        "The losses of one run then differ by less than 1e-7",
        all(largest_change(arm, "batches") < 1e-7 for arm in ARMS),
    )
    ties = {arm: [run["near_ties"] for run in RUNS if run["arm"] == arm] for arm in ARMS}
    yield (
        f"{' and '.join(map(str, ties['mod12']))} of mod12's 1,024 selections and "
        f"{' and '.join(map(str, ties['expert-choice']))} of expert choice's 8,192",
        True,
    )


GIVEN = ()
