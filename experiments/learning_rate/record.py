"""Tables and claims of README.md, held against the kept runs; see experiments/check.py."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from experiments.compare import rates
from experiments.tables import rate_table
from modjax.records import read_csv

RUNS = read_csv(Path(__file__).parent / "results.csv")


def tables() -> dict[str, str]:
    return {"rates": rate_table(RUNS)}


def claims() -> Iterator[tuple[str, bool]]:
    found = rates(RUNS)
    means = {arm: {x: statistics.mean(of) for x, of in by.items()} for arm, by in found.items()}
    yield (
        "Both arms are best at 0.2",
        all(min(by, key=by.__getitem__) == 0.2 for by in means.values()),
    )
    ahead = {arm: by[0.1] - by[0.2] for arm, by in means.items()}
    yield f"0.1 is worse by {ahead['dense']:.3f} for dense and {ahead['mod12']:.3f} for mod12", True
    apart = [abs(a - b) for by in found.values() for a, b in by.values()]
    yield f"Two seeds differ by {statistics.median(apart):.3f} in the median", True


GIVEN = ("4.5 minutes", "0.2 sqrt(batch) / d")
