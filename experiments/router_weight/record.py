"""Tables and claims of README.md, held against the kept runs; see experiments/check.py."""

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


def tables() -> dict[str, str]:
    rows = (
        (arm, UPDATES[arm], f"{statistics.mean(of):.3f}", f"{statistics.stdev(of):.3f}",
         "" if arm == "linear" else difference(RUNS, f"{arm} - linear", RUNS[0].budget_flops))
        for arm, of in sorted(LOSSES.items(), key=lambda item: statistics.mean(item[1]))
    )  # fmt: skip
    columns = ("arm", "update of a selected token", "mean loss", "standard deviation of a seed",
               "less linear (95% interval)")  # fmt: skip
    return {"losses": markdown(columns, rows)}


def claims() -> Iterator[tuple[str, bool]]:
    apart = [
        difference(RUNS, f"{arm} - linear", RUNS[0].budget_flops)
        for arm in UPDATES
        if arm != "linear"
    ]
    yield "No arm is told from linear", not any(d.told for d in apart)
    means = {arm: statistics.mean(of) for arm, of in LOSSES.items()}
    spreads = {arm: statistics.stdev(of) for arm, of in LOSSES.items()}
    yield (
        "the lowest mean and the smallest spread",
        min(means, key=means.__getitem__) == min(spreads, key=spreads.__getitem__) == "linear",
    )


GIVEN = ("5.2 minutes", "every other block at 12.5%")
