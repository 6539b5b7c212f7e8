"""Tables and claims of README.md, checked against the kept runs; see experiments/check.py."""

from collections.abc import Iterator
from pathlib import Path

from experiments.compare import mean_rates, seed_difference
from experiments.tables import rate_table
from modjax.records import read_csv

RUNS = read_csv(Path(__file__).parent / "results.csv")


def tables() -> dict[str, str]:
    return {"rates": rate_table(RUNS)}


def claims() -> Iterator[tuple[str, bool]]:
    means = mean_rates(RUNS)
    best = [min(by_rate, key=by_rate.__getitem__) for by_rate in means.values()]
    yield "Both arms have their lowest loss at the coefficient 0.2", best == [0.2, 0.2]
    worse = {arm: by_rate[0.1] - by_rate[0.2] for arm, by_rate in means.items()}
    yield (
        f"At 0.1 the loss is higher by {worse['dense']:.3f} for dense and by {worse['mod12']:.3f} "
        "for mod12",
        True,
    )
    yield f"Two seeds differ by {seed_difference(RUNS):.3f} in the median", True


GIVEN = ("4.5 minutes", "0.2 sqrt(batch) / d")
