"""Tables and claims of README.md, checked against the kept scores; see experiments/check.py."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tables import markdown
from modjax.finished.paired import compare

RESULTS = Path(__file__).parent / "results"
CONTROLS = ("random", "pattern", "mean")
GIVEN = ("below 0.02 nats", "with 12% of all attention off", "the 15 of 30 attentions")


def read(cell: str, kind: str) -> dict[str, Any] | None:
    """Returns the last score of a file, the pooled texts or the task; None if it is missing."""
    file = RESULTS / cell / f"{kind}.json"
    return json.loads(file.read_text())[-1] if file.exists() else None


def interval(estimate: dict[str, float], form: str = "+.3f") -> str:
    value, low, high = (format(estimate[end], form) for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def change(found: dict[str, Any] | None, measure: str = "nats") -> dict[str, float] | None:
    """Returns a measure minus that of the model that skips nothing."""
    return None if found is None else found["measures"][measure]["difference"]


def against(ours: dict[str, Any], theirs: dict[str, Any] | None) -> str:
    """Returns our loss minus that of a control, paired by blocks of text."""
    if theirs is None:
        return ""
    pair = [np.array(one["units"]["nats"]) for one in (ours, theirs)]
    return interval(compare(pair, np.array(ours["units"]["weight"]))["difference"]._asdict())


def tables() -> dict[str, str]:
    rows = []
    for cell in sorted(path.name for path in RESULTS.iterdir()):
        tuned, last = read(cell, "tuned"), read(cell, "tuned-lambada")
        if tuned is None:
            continue
        ran, controls = tuned["layers"]["all"], [change(read(cell, kind)) for kind in CONTROLS]
        greedy = change(last, "greedy")
        rows.append(
            (
                cell,
                f"{ran['skip_capacity']:.3f}",
                f"{ran['skip_variance']:.3f}",
                interval(tuned["measures"]["nats"]["difference"]),
                *("" if one is None else f"{one['value']:+.3f}" for one in controls),
                against(tuned, read(cell, "random")),
                "" if last is None else interval(last["measures"]["nats"]["difference"]),
                "" if greedy is None else interval({k: 100 * v for k, v in greedy.items()}, "+.1f"),
            )
        )
    columns = ("cell", "ran", "variance", "tuned", *CONTROLS, "tuned - random")
    return {"cells": markdown((*columns, "LAMBADA, nats", "LAMBADA, points"), rows)}


def claims() -> Iterator[tuple[str, bool]]:
    cell = "attention-token-75"
    tuned, random = change(read(cell, "tuned")), change(read(cell, "random"))
    last = read(cell, "tuned-lambada")
    points, nats = change(last, "greedy"), change(last)
    assert tuned and random and points and nats
    yield (
        f"the loss grows by {tuned['value']:.3f} nats with trained routers, and by "
        f"{random['value']:.3f} with random tokens at the same rates",
        tuned["value"] <= 0.5 * random["value"],
    )
    yield "It does not hold the quality", tuned["high"] >= 0.02 and points["value"] < -0.01
    yield (
        f"the last word of LAMBADA loses {-100 * points['value']:.1f} points",
        points["high"] < 0,
    )
