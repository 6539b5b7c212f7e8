"""Tables and claims of README.md, checked against the kept scores; see experiments/check.py."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tables import markdown
from modjax.finished.paired import compare

RESULTS = Path(__file__).parent / "results"
CONTROLS = ("random", "pattern", "mean", "static")
UNITS = (("attention", 75), ("attention", 50), ("mlp", 75), ("block", 75))
INNERS = ("block", "mlp")
TASKS = ("lambada", "piqa", "arc_easy")
GIVEN = (
    "below 0.02 nats",
    "with 12% of all attention off",
    "the 15 of 30 attentions",
    "a base of 3.75 nats",
    "21% faster",
    "0.2% lower",
)


def read(cell: str, kind: str) -> dict[str, Any] | None:
    """Returns the last score of a file, the pooled texts or the task; None if it is missing."""
    file = RESULTS / cell / f"{kind}.json"
    return json.loads(file.read_text())[-1] if file.exists() else None


def cells() -> list[str]:
    return sorted(path.parent.name for path in RESULTS.glob("*/tuned.json"))


def times() -> dict[str, float]:
    """Returns the time of a prefill over that of the base, by cell or "CELL, static"."""
    file = RESULTS / "times.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return {name: one["ratio"] for name, one in found.items() if name != "base"}


def interval(estimate: dict[str, float], form: str = "+.3f") -> str:
    value, low, high = (format(estimate[end], form) for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def rounded(nats: float) -> str:
    return f"{round(nats, 3) + 0.0:+.3f}"  # 0.0 turns -0.0 into 0.0


def change(found: dict[str, Any] | None, measure: str = "nats") -> dict[str, float]:
    """Returns a measure minus that of the model that skips nothing."""
    assert found is not None
    return found["measures"][measure]["difference"]


def against(ours: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, float] | None:
    """Returns our loss minus that of a control or of another cell, paired by blocks of text."""
    if theirs is None:
        return None
    pair = [np.array(one["units"]["nats"]) for one in (ours, theirs)]
    return compare(pair, np.array(ours["units"]["weight"]))["difference"]._asdict()


def ran(found: dict[str, Any]) -> float:
    return found["layers"]["all"]["skip_capacity"]


def tables() -> dict[str, str]:
    rows, tasks, taken = [], [], times()
    for cell in cells():
        tuned = read(cell, "tuned")
        assert tuned is not None
        controls = [read(cell, kind) for kind in CONTROLS]
        random = against(tuned, controls[0])
        rows.append(
            (
                cell,
                f"{ran(tuned):.3f}",
                f"{tuned['layers']['all']['skip_variance']:.3f}",
                f"{taken[cell]:.2f}" if cell in taken else "",
                interval(change(tuned)),
                *(
                    "" if one is None else f"{round(change(one)['value'], 3) + 0:+.3f}"
                    for one in controls
                ),
                "" if random is None else interval(random),
            )
        )
        for task in TASKS:
            if (found := read(cell, f"tuned-{task}")) is not None:
                points = "accuracy" if "accuracy" in found["measures"] else "greedy"
                share = {k: 100 * v for k, v in change(found, points).items()}
                nats = interval(change(found))
                tasks.append(
                    (cell, task, found["count"], f"{ran(found):.3f}", nats, interval(share, "+.1f"))
                )
    columns = ("cell", "ran", "variance", "time", "tuned", *CONTROLS, "tuned - random")
    about = ("cell", "task", "n", "ran", "nats", "points")
    return {"cells": markdown(columns, rows), "tasks": markdown(about, tasks)}


def claims() -> Iterator[tuple[str, bool]]:
    main = [f"attention-token-75{seed}" for seed in ("", "-seed1", "-seed2")]
    tuned, random, static = ([read(c, k) for c in main] for k in ("tuned", "random", "static"))
    increase, by_chance = ([change(one)["value"] for one in found] for found in (tuned, random))
    shares = [a / b for a, b in zip(increase, by_chance, strict=True)]
    yield f"Trained routers cost {several(increase, '+.3f')} nats", min(increase) > 0
    yield f"random tokens at the same rates {several(by_chance, '+.3f')}", True
    said = f"{several(shares, '.2f')} of the increase, where at most half was the target"
    yield said, max(shares) <= 0.5
    worse = [change(one)["value"] for one in static]
    yield f"whole attentions cost {several(worse, '+.3f')}", min(worse) > max(increase)
    assert all(tuned)
    rates = [ran(one) for one in tuned if one]
    said = f"{several(rates, '.3f')} of the positions ran, where 0.75 was the target"
    yield said, all(abs(rate - 0.75) <= 0.02 for rate in rates)
    last = [change(read(cell, "tuned-lambada"), "greedy") for cell in main]
    points = [-100 * one["value"] for one in last]
    yield f"loses {several(points, '.1f')} points", all(one["high"] < 0 for one in last)
    fewer = [ran(found) for cell in main if (found := read(cell, "tuned-lambada"))]
    yield f"Fewer attentions run there, {several(fewer, '.2f')}", max(fewer) < 0.73
    every = [read(cell, f"tuned-{task}") for cell in main[:1] for task in TASKS[1:]]
    lost = [-100 * change(one, "accuracy")["value"] for one in every]
    yield (
        f"PIQA loses {lost[0]:.1f} points, ARC-E {lost[1]:.1f}",
        all(change(one, "nats")["low"] > 0 for one in every),
    )
    by_kl, theirs = read("attention-token-75-base", "tuned"), read(main[0], "tuned")
    assert by_kl and theirs
    apart = against(by_kl, theirs)
    assert apart
    said = f"by KL they cost {change(by_kl)['value']:+.3f} nats, at {ran(by_kl):.3f}"
    yield said, apart["low"] < 0 < apart["high"]
    last_kl = change(read("attention-token-75-base", "tuned-lambada"), "greedy")
    yield f"LAMBADA {100 * last_kl['value']:+.1f} points", last_kl["high"] < 0
    half, chance = read("attention-token-50", "tuned"), read("attention-token-50", "random")
    both = [change(half)["value"], change(chance)["value"]]
    said = f"At half, they cost {both[0]:+.3f} nats, random tokens {both[1]:+.3f}"
    yield said, both[0] <= 0.5 * both[1]
    others = [f"{inner}-token-{n}" for inner in ("block", "mlp") for n in (75, 50)]
    costs, chances = ([change(read(c, k)) for c in others] for k in ("tuned", "random"))
    said = several([one["value"] for one in costs], "+.3f")
    yield (
        f"Blocks and MLPs cost {said} nats (blocks at 0.75 and 0.5, MLPs at 0.75 and 0.5)",
        all(one["low"] > 0.2 for one in costs),
    )
    yield f"random tokens {several([one['value'] for one in chances], '+.3f')}", True
    rows = [f"{name}-sequence-{n}" for name, n in UNITS]
    costs, chances = ([change(read(c, k))["value"] for c in rows] for k in ("tuned", "random"))
    yield (
        f"cost {several(costs, '+.3f')} nats, random tokens {several(chances, '+.3f')}",
        all(a > b for a, b in zip(costs, chances, strict=True)),
    )
    shares = [ran(found) for cell in rows if (found := read(cell, "tuned"))]
    yield f"{several(shares, '.3f')} of them ran, where 0.75, 0.5, 0.75 and 0.75", True
    published = [read(f"attention-{unit}-published", "tuned") for unit in ("token", "sequence")]
    chance = [read(f"attention-{unit}-published", "random") for unit in ("token", "sequence")]
    assert published[0] and published[1]
    rates, costs, by_chance = (
        [ran(one) for one in published if one],
        [change(one)["value"] for one in published],
        [change(one)["value"] for one in chance],
    )
    yield (
        f"lets {several(rates, '.3f')} of the positions run (by token, by sequence), and costs "
        f"{several(costs, '+.3f')} nats, random tokens {several(by_chance, '+.3f')}",
        all(abs(rate - 0.75) > 0.02 for rate in rates),
    )
    routed = read("attention-token-75-routed", "tuned")
    last_routed = change(read("attention-token-75-routed", "tuned-lambada"), "greedy")
    yield (
        f"costs {change(routed)['value']:+.3f} nats, and LAMBADA {100 * last_routed['value']:+.1f}",
        change(routed)["low"] > max(increase),
    )
    taken = times()
    at = [taken[f"attention-token-{end}"] for end in ("75", "50", "75-routed")]
    yield f"takes {at[0]:.2f} of the base's time in the main cell, {at[1]:.2f} at half", True
    yield f"{at[2]:.2f} with keys of the routed tokens", min(at) > 1
    half = [taken[f"{inner}-token-50"] for inner in ("block", "mlp")]
    said = several(
        [change(read(f"{inner}-token-50", "tuned"))["value"] for inner in INNERS], "+.3f"
    )
    yield f"Blocks at half take {half[0]:.2f}, MLPs at half {half[1]:.2f}, for {said} nats", True
    dropped = [taken[f"attention-token-{n}, static"] for n in (75, 50)]
    yield f"Whole attentions dropped take {several(dropped, '.2f')}", True
    lost = change(read("attention-sequence-published", "tuned-lambada"), "greedy")
    said = f"but {change(published[1])['value']:+.3f} nats and {100 * lost['value']:.1f} points"
    yield f"{taken['attention-sequence-published']:.2f} of the time", lost["high"] < 0
    yield said, True
    stages = json.loads((RESULTS / "mod.json").read_text())
    for share, words in ((50, "At a half"), (12, "At an eighth")):
        ends = [stages[f"mod-{share}-{stage}"][-1] for stage in ("routers", "all")]
        losses = [end["eval_causal_loss"] for end in ends]
        yield f"{words}: {losses[0]:.1f} nats with routers alone, {losses[1]:.1f} with all", True


def several(values: Sequence[float], form: str) -> str:
    *most, last = (format(value, form) for value in values)
    return f"{', '.join(most)} and {last}"
