"""Comparisons of arms over the runs that a record keeps.

Every comparison uses the field `eval_loss`. Pass runs through `causal` first to compare the losses
under routing that does not look ahead.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from modjax.errors import require
from modjax.records import RunRecord, read_csv, read_records, write_csv
from modjax.scaling.fit.cells import Repeated, by_cell
from modjax.scaling.fit.isoflop import fit_all

LEVEL = 0.95
CHANCE = 0.05
Texts = Mapping[str, list[RunRecord]]  # name of a text: the runs on it


def of_both_texts(folder: Path) -> dict[str, list[RunRecord]]:
    """Returns the kept runs on source code and on English, with losses as trained."""
    names = {"source code": "stdlib", "English": "english"}
    return {text: read_csv(folder / f"{name}.csv") for text, name in names.items()}


def causal(records: list[RunRecord]) -> list[RunRecord]:
    """Returns the runs with their causal loss as `eval_loss`.

    Runs without a router have one loss only and are returned as they are. Raises InputError for a
    run with a router and no causal loss.
    """
    missing = [r.run_id for r in records if r.flops.get("router") and r.causal_loss is None]
    require(not missing, "causal_loss", missing[:1], "every run with a router needs one")
    return [
        r if r.causal_loss is None else dataclasses.replace(r, eval_loss=r.causal_loss)
        for r in records
    ]


def keep(folder: Path, arguments: Iterable[str]) -> Iterator[tuple[str, Path, list[RunRecord]]]:
    """Yields the name, working directory and runs of each argument.

    "NAME=WORKDIR" reads the runs of a sweep and writes them to NAME.csv in `folder`. "NAME" reads
    NAME.csv.
    """
    for argument in arguments:
        name, _, workdir = argument.partition("=")
        table = folder / f"{name}.csv"
        if workdir:
            write_csv(table, read_records(Path(workdir)))
        yield name, Path(workdir), read_csv(table)


def loss(runs: Repeated) -> float:
    """Returns the mean loss over the seeds of one cell."""
    return statistics.mean(r.eval_loss for r in runs if r.eval_loss is not None)


def best(sizes: list[Repeated]) -> Repeated:
    """Returns the cell with the lowest mean loss."""
    return min(sizes, key=loss)


def cells(records: list[RunRecord]) -> dict[float, dict[str, list[Repeated]]]:
    """Returns, for each budget and arm, one cell per size: the runs that differ in seed only."""
    found: dict[float, dict[str, list[Repeated]]] = {}
    for (arm, budget), sizes in by_cell(records).items():
        found.setdefault(budget, {})[arm] = sizes
    return dict(sorted(found.items()))


def seed_difference(*sweeps: list[RunRecord]) -> float:
    """Returns the median difference between the two seeds of a cell, in nats."""
    groups = (by_arm for records in sweeps for by_arm in cells(records).values())
    pairs = (runs for by_arm in groups for sizes in by_arm.values() for runs in sizes)
    losses = ([r.eval_loss or math.nan for r in runs] for runs in pairs)
    return statistics.median(abs(first - second) for first, second in losses)


@dataclass(frozen=True)
class Interval:
    """A difference of losses in nats, with the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Returns whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Difference(Interval):
    """A mean difference over pairs of runs.

    error: standard error of the mean.
    pairs: number of pairs.
    ratio: smallest and largest ratio of the first arm's FLOPs per token to the second's.
    widths: mean difference at each width.
    varies: whether the difference depends on the width, by an F test at 5%.
    """

    error: float
    pairs: int
    ratio: tuple[float, float]
    widths: dict[int, float]
    varies: bool


@dataclass(frozen=True)
class Optimum(Interval):
    """A difference between two optima, with the ratio of their FLOPs per token."""

    ratio: float | None


class Cases(dict[str, list[Interval]]):
    """Differences by text, in the order of the budgets. One text at one budget is one case."""

    @property
    def all(self) -> list[Interval]:
        return [d for found in self.values() for d in found]

    @property
    def significant(self) -> int:
        return sum(d.significant for d in self.all)

    @property
    def above(self) -> bool:
        return all(d.mean > 0 for d in self.all)

    @property
    def below(self) -> bool:
        return all(d.mean < 0 for d in self.all)

    @property
    def tally(self) -> str:
        """Counts the significant cases on each side of 0, and gives the range of the means."""
        means, total = [d.mean for d in self.all], len(self.all)
        lower = sum(d.high < 0 for d in self.all)
        higher = sum(d.low > 0 for d in self.all)
        sides = [(n, side) for n, side in ((lower, "lower"), (higher, "higher")) if n]
        counts = " and ".join(f"{side} in {n} of {total} cases" for n, side in sides)
        verdict = f"significantly {counts}" if sides else "not significantly different in any case"
        return f"{verdict} ({min(means):+.3f} to {max(means):+.3f})"

    def __str__(self) -> str:
        parts = (
            f"{' and '.join(f'{d.mean:+.3f}' for d in found)} on {text}"
            for text, found in self.items()
        )
        return f"{', '.join(parts)} (significant in {self.significant} of {len(self.all)} cases)"


Optima = dict[tuple[float, str], Optimum]  # by budget and "arm - baseline"


def difference(records: Iterable[RunRecord], arms: str, budget: float) -> Difference:
    """Returns the mean difference between arms at one budget, over runs of equal width and seed.

    `arms` is "moe - dense" or a difference of differences, such as "altup-moe - moe - recycled2 +
    dense". The interval is a t-interval over the pairs.
    """
    names = re.split(r" [+-] ", arms)
    signs = [1, *(1 if sign == "+" else -1 for sign in re.findall(r" ([+-]) ", arms))]
    runs: dict[tuple[int, int], dict[str, RunRecord]] = {}
    for r in records:
        if r.budget_flops == budget and r.variant in names and r.eval_loss is not None:
            runs.setdefault((r.d_model, r.seed), {})[r.variant] = r
    by_width: dict[int, list[float]] = {}
    ratios = []
    for (width, _), by_arm in sorted(runs.items()):
        if len(by_arm) == len(set(names)):  # skip pairs of which a run is missing
            losses = [by_arm[name].eval_loss or math.nan for name in names]
            total = sum(sign * loss for sign, loss in zip(signs, losses, strict=True))
            by_width.setdefault(width, []).append(total)
            first, second, *_ = (by_arm[name].forward_flops_per_token for name in names)
            ratios.append(first / second)
    values = [value for group in by_width.values() for value in group]
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    repeated = [group for group in by_width.values() if len(group) > 1]
    return Difference(
        mean=mean,
        low=mean - half,
        high=mean + half,
        error=error,
        pairs=len(values),
        ratio=(min(ratios), max(ratios)),
        widths={width: statistics.mean(group) for width, group in by_width.items()},
        varies=len(repeated) > 1 and float(stats.f_oneway(*repeated).pvalue) < CHANCE,
    )


def cases(texts: Texts, arms: str) -> Cases:
    """Returns the differences at equal width and seed, for each text and budget."""
    return Cases(
        {
            text: [difference(records, arms, budget) for budget in cells(records)]
            for text, records in texts.items()
        }
    )


def optima(records: list[RunRecord], *baselines: str) -> Optima:
    """Returns the differences between arms and baselines, each at its own optimal size.

    The differences are those of `modjax fit`. Differences that the fit refuses are left out.
    """
    found = {}
    for baseline in baselines:
        # "trained" reads eval_loss, which `causal` may have replaced already.
        for gap in fit_all(records, baseline=baseline, loss="trained").gaps:
            if gap.loss is not None and gap.loss_interval is not None:
                arms = f"{gap.arm} - {gap.baseline}"
                found[gap.budget_flops, arms] = Optimum(
                    gap.loss, *gap.loss_interval, gap.flops_ratio
                )
    return found


def own(texts: Mapping[str, Optima], arms: str) -> Cases:
    """Returns the differences at the arms' own optima, for each text and budget."""
    return Cases(
        {
            text: [d for (_, named), d in sorted(found.items()) if named == arms]
            for text, found in texts.items()
        }
    )


def rates(records: Iterable[RunRecord]) -> dict[str, dict[float, list[float]]]:
    """Returns the losses of arms named ARM-lrRATE, by arm and rate, one for each seed."""
    found: dict[str, dict[float, list[float]]] = {}
    for r in records:
        arm, rate = r.variant.split("-lr")
        by_rate = found.setdefault(arm, {}).setdefault(float(rate.replace("_", ".")), [])
        by_rate.append(r.eval_loss or math.nan)
    return found


def mean_rates(records: Iterable[RunRecord]) -> dict[str, dict[float, float]]:
    """Returns the mean loss over the seeds, by arm and rate."""
    return {
        arm: {rate: statistics.mean(losses) for rate, losses in by_rate.items()}
        for arm, by_rate in rates(records).items()
    }


def trained_twice(
    sweep: Iterable[RunRecord], rate_runs: Iterable[RunRecord]
) -> list[tuple[str, float | None, float | None]]:
    """Returns the runs of a rate sweep that the main sweep has too, both at the rate 0.2.

    Each entry holds the arm, its loss in the sweep and its loss in the rate sweep, as trained.
    """

    def key(r: RunRecord) -> tuple[object, ...]:
        return r.variant.removesuffix("-lr0_2"), r.budget_flops, r.d_model, r.seed, r.batch_size

    kept = {key(r): r for r in sweep}
    return [
        (kept[key(r)].variant, kept[key(r)].eval_loss, r.eval_loss)
        for r in rate_runs
        if key(r) in kept
    ]
