"""Tables and claims of README.md, checked against the kept runs; see experiments/check.py."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from experiments.compare import difference
from experiments.tables import markdown
from modjax.records import read_csv

RUNS = read_csv(Path(__file__).parent / "results.csv")
UPDATES = {
    "linear": "r (f(x) - x)",
    "sigmoid": "sigmoid(r) (f(x) - x)",
    "literal": "r f(x)",
    "random": "r (f(x) - x), tokens drawn at random",
    "two_sigmoid": "2 sigmoid(r) (f(x) - x)",
    "one_plus_tanh": "(1 + tanh(r)) (f(x) - x)",
}
LOSSES = {arm: [r.eval_loss for r in RUNS if r.variant == arm] for arm in UPDATES}


MEANS = {arm: statistics.mean(losses) for arm, losses in LOSSES.items()}
SPREADS = {arm: statistics.stdev(losses) for arm, losses in LOSSES.items()}
AGAINST_LINEAR = {
    arm: difference(RUNS, f"{arm} - linear", RUNS[0].budget_flops)
    for arm in UPDATES
    if arm != "linear"
}


def tables() -> dict[str, str]:
    rows = (
        (arm, UPDATES[arm], f"{MEANS[arm]:.3f}", f"{SPREADS[arm]:.3f}", AGAINST_LINEAR.get(arm, ""))
        for arm in sorted(MEANS, key=MEANS.__getitem__)
    )
    columns = ("arm", "update of a selected token", "mean loss", "standard deviation over seeds")
    return {"losses": markdown((*columns, "minus linear (95% interval)"), rows)}


def claims() -> Iterator[tuple[str, bool]]:
    significant = [arm for arm, d in AGAINST_LINEAR.items() if d.significant]
    yield "no arm differs significantly from linear", not significant
    yield (
        "the lowest mean loss and the smallest spread",
        min(MEANS, key=MEANS.__getitem__) == min(SPREADS, key=SPREADS.__getitem__) == "linear",
    )


GIVEN = ("5.2 minutes", "every other block at 12.5%")
