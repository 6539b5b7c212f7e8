"""Compares arms over the runs that a record keeps.

A loss here is one that can be sampled from: MoD by its predictor, experts without drops.
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
Texts = Mapping[str, list[RunRecord]]  # the runs on each text, by its name


def of_both_texts(folder: Path) -> dict[str, list[RunRecord]]:
    """Returns the runs that a record keeps of both texts, with losses as trained."""
    names = {"source code": "stdlib", "English": "english"}
    return {text: read_csv(folder / f"{name}.csv") for text, name in names.items()}


def causal(records: list[RunRecord]) -> list[RunRecord]:
    """Returns the runs with the loss under routing that does not look ahead, where one was taken.

    The others route nothing, or by position only: they have one loss. Raises InputError for a run
    with a router whose loss was not taken so.
    """
    missing = [r.run_id for r in records if r.flops.get("router") and r.causal_loss is None]
    require(not missing, "causal_loss", missing[:1], "must be kept of every run with a router")
    return [
        r if r.causal_loss is None else dataclasses.replace(r, eval_loss=r.causal_loss)
        for r in records
    ]


def keep(folder: Path, arguments: Iterable[str]) -> Iterator[tuple[str, Path, list[RunRecord]]]:
    """Yields the name, sweep and runs of each argument, and keeps the runs in `folder`.

    "NAME=WORKDIR" takes the runs of a sweep, and "NAME" those that are kept.
    """
    for argument in arguments:
        name, _, workdir = argument.partition("=")
        table = folder / f"{name}.csv"
        if workdir:
            write_csv(table, read_records(Path(workdir)))
        yield name, Path(workdir), read_csv(table)


def loss(runs: Repeated) -> float:
    """Returns the mean loss over the seeds of a cell."""
    return statistics.mean(r.eval_loss for r in runs if r.eval_loss is not None)


def best(sizes: list[Repeated]) -> Repeated:
    return min(sizes, key=loss)


def cells(records: list[RunRecord]) -> dict[float, dict[str, list[Repeated]]]:
    """Returns the cells of every arm by size, for every budget."""
    found: dict[float, dict[str, list[Repeated]]] = {}
    for (arm, budget), sizes in by_cell(records).items():
        found.setdefault(budget, {})[arm] = sizes
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Interval:
    """A difference of losses in nats, and the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def told(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Difference(Interval):
    """A mean difference over pairs of runs, and its standard error.

    ratio: the range of the first arm's FLOPs per token over the second's. widths: the mean at each
    width. varies: whether an F test at 5% tells the widths apart.
    """

    error: float
    pairs: int
    ratio: tuple[float, float]
    widths: dict[int, float]
    varies: bool


@dataclass(frozen=True)
class Optimum(Interval):
    """A difference between optima, and the ratio of their FLOPs per token."""

    ratio: float | None


class Cases(dict[str, list[Interval]]):
    """Differences on each text, by budget."""

    @property
    def all(self) -> list[Interval]:
        return [d for of in self.values() for d in of]

    @property
    def told(self) -> int:
        return sum(d.told for d in self.all)

    @property
    def above(self) -> bool:
        return all(d.mean > 0 for d in self.all)

    @property
    def below(self) -> bool:
        return all(d.mean < 0 for d in self.all)

    @property
    def tally(self) -> str:
        """Writes on which side of 0 differences are told, in how many cases, and their range."""
        sides = {
            "below": sum(d.high < 0 for d in self.all),
            "above": sum(d.low > 0 for d in self.all),
        }
        told = " and ".join(f"{side} in {n}" for side, n in sides.items() if n) or "in none"
        means = [d.mean for d in self.all]
        return f"told {told} of {len(means)} ({min(means):+.3f} to {max(means):+.3f})"

    def __str__(self) -> str:
        parts = (
            f"{' and '.join(f'{d.mean:+.3f}' for d in of)} on {text}" for text, of in self.items()
        )
        return f"{', '.join(parts)}; told from 0 in {self.told} of {len(self.all)}"


Optima = dict[tuple[float, str], Optimum]  # by budget and "arm - baseline"


def difference(records: Iterable[RunRecord], arms: str, budget: float) -> Difference:
    """Compares arms at one budget over runs of equal width and seed.

    arms: "moe - dense", or a difference of differences such as "altup-moe - moe - recycled2 +
    dense". The interval is Student's over the pairs, for the mean over the widths that were run.
    """
    names = re.split(r" [+-] ", arms)
    signs = [1, *(1 if sign == "+" else -1 for sign in re.findall(r" ([+-]) ", arms))]
    runs: dict[tuple[int, int], dict[str, RunRecord]] = {}
    for r in records:
        if r.budget_flops == budget and r.variant in names and r.eval_loss is not None:
            runs.setdefault((r.d_model, r.seed), {})[r.variant] = r
    by_width: dict[int, list[float]] = {}
    ratios = []
    for (width, _), of in sorted(runs.items()):
        if len(of) == len(set(names)):
            losses = [of[name].eval_loss or 0.0 for name in names]
            total = sum(s * loss for s, loss in zip(signs, losses, strict=True))
            by_width.setdefault(width, []).append(total)
            first, second, *_ = (of[name].forward_flops_per_token for name in names)
            ratios.append(first / second)
    values = [value for of in by_width.values() for value in of]
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    repeated = [of for of in by_width.values() if len(of) > 1]
    return Difference(
        mean=mean,
        low=mean - half,
        high=mean + half,
        error=error,
        pairs=len(values),
        ratio=(min(ratios), max(ratios)),
        widths={width: statistics.mean(of) for width, of in by_width.items()},
        varies=len(repeated) > 1 and float(stats.f_oneway(*repeated).pvalue) < CHANCE,
    )


def cases(texts: Texts, arms: str) -> Cases:
    """Returns the difference at equal width and seed, on each text at each budget."""
    return Cases(
        {text: [difference(of, arms, budget) for budget in cells(of)] for text, of in texts.items()}
    )


def optima(records: list[RunRecord], *baselines: str) -> Optima:
    """Compares every arm with the baselines, each at its own optimal size: what `modjax fit` says.

    A difference that the fit refuses is left out.
    """
    found = {}
    for baseline in baselines:
        # The losses are those that can be sampled from already.
        for gap in fit_all(records, baseline=baseline, loss="trained").gaps:
            if gap.loss is not None and gap.loss_interval is not None:
                arms = f"{gap.arm} - {gap.baseline}"
                found[gap.budget_flops, arms] = Optimum(
                    gap.loss, *gap.loss_interval, gap.flops_ratio
                )
    return found


def own(texts: Mapping[str, Optima], arms: str) -> Cases:
    """Returns the difference at the arms' own optima, on each text at each budget."""
    return Cases(
        {
            text: [d for (_, named), d in sorted(of.items()) if named == arms]
            for text, of in texts.items()
        }
    )


def rates(records: Iterable[RunRecord]) -> dict[str, dict[float, list[float]]]:
    """Returns the losses of arms named ARM-lrRATE, by arm and rate."""
    found: dict[str, dict[float, list[float]]] = {}
    for r in records:
        arm, rate = r.variant.split("-lr")
        by_rate = found.setdefault(arm, {}).setdefault(float(rate.replace("_", ".")), [])
        by_rate.append(r.eval_loss or math.nan)
    return found
