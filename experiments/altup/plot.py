"""Alternating Updates and its relatives against dense, and against their controls.

Usage: python experiments/altup/plot.py NAME=WORKDIR ...   (sweeps of configs/altup.py)
Writes NAME.png and NAME.csv beside this file, and prints the tables of README.md.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from scipy.stats import t as student

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from modjax.records import Record, read_records, write_csv
from modjax.scaling.fit import fit_all
from modjax.scaling.marks import RC, nth_style
from modjax.scaling.results import Gap
from modjax.scaling.words import render_text

HERE = Path(__file__).parent
BASELINE = "dense"
# Arms whose FLOPs per token are alike at equal width, and what each is compared with.
PAIRS = (
    *((arm, BASELINE) for arm in (
        "recycled2", "recycled4", "full2", "same2", "sum2", "simplified4", "static2", "dynamic2",
        "manifold2", "moe", "altup-moe",
    )),
    ("recycled2", "same2"), ("full2", "sum2"), ("full2", "recycled2"),
    ("manifold2", "dynamic2"), ("seq4", "skip4"), ("seq4", "pool4"), ("seq4", "mod25"),
    ("skip4", "mod25"), ("altup-mod12", "mod12"), ("altup-moe", "moe"),
)  # fmt: skip
TOLD = 0.005  # nats


class Difference(NamedTuple):
    """The mean over pairs of runs of equal budget, width and seed, and its 95% interval."""

    mean: float
    low: float
    high: float
    deviation: float

    @property
    def needed(self) -> int:
        """Pairs whose mean would have an interval of TOLD on either side."""
        return math.ceil((1.96 * self.deviation / TOLD) ** 2)


def difference(records: list[Record], arm: str, other: str, budget: float) -> Difference | None:
    def losses(of: str) -> dict[tuple[int, int], float]:
        found = (r for r in records if (r.variant, r.budget_flops) == (of, budget))
        return {(r.d_model, r.seed): r.eval_loss for r in found if r.eval_loss is not None}

    ours, theirs = losses(arm), losses(other)
    pairs = [ours[place] - theirs[place] for place in ours.keys() & theirs.keys()]
    if len(pairs) < 3:
        return None
    mean, deviation = statistics.mean(pairs), statistics.stdev(pairs)
    half = float(student.ppf(0.975, len(pairs) - 1)) * deviation / math.sqrt(len(pairs))
    return Difference(mean, mean - half, mean + half, deviation)


def table(texts: Mapping[str, list[Record]]) -> None:
    """Mean differences and their intervals, and how many pairs would tell TOLD."""
    print("| budget | arm | less |" + "".join(f" {name} | 95% interval |" for name in texts))
    print("|---|---|---|" + "---|---|" * len(texts))
    needed = []
    for budget in sorted({r.budget_flops for records in texts.values() for r in records}):
        for arm, other in PAIRS:
            found = [difference(records, arm, other, budget) for records in texts.values()]
            told = [d for d in found if d is not None]
            if len(told) == len(texts):  # else its cells would stand under another text
                needed += [d.needed for d in told]
                cells = [f" {d.mean:+.4f} | {d.low:+.4f} to {d.high:+.4f} |" for d in told]
                print(f"| {budget:.1e} | {arm} | {other} |" + "".join(cells))
    middle = statistics.median(needed)
    print(f"pairs needed for {TOLD}: {min(needed)} to {max(needed)}, median {middle:.0f}")


def optima(texts: Mapping[str, Sequence[Gap]]) -> None:
    """Each arm at its own optimum against dense at its own, as `modjax fit` has them."""
    print("| budget | arm |" + "".join(f" {name} | 95% interval | FLOPs |" for name in texts))
    print("|---|---|" + "---|---|---|" * len(texts))
    rows: dict[tuple[float, str], list[Gap]] = {}
    for gaps in texts.values():
        for gap in gaps:
            if gap.loss is not None:
                rows.setdefault((gap.budget_flops, gap.arm), []).append(gap)
    for (budget, arm), gaps in sorted(rows.items(), key=lambda r: (r[0][0], r[1][0].loss)):
        cells = ""
        for gap in gaps:
            low, high = gap.loss_interval or (math.nan, math.nan)
            cells += f" {gap.loss:+.4f} | {low:+.4f} to {high:+.4f} | "
            cells += f"{gap.flops_ratio:.2f} |"
        print(f"| {budget:.1e} | {arm} |{cells}")


def draw(gaps: Sequence[Gap], path: Path) -> None:
    """Every arm's loss less that of dense, each at its own optimum, with its interval."""
    arms = sorted({gap.arm for gap in gaps}, reverse=True)
    budgets = sorted({gap.budget_flops for gap in gaps if gap.loss_interval})
    with plt.rc_context(RC):
        size = (18 / 2.54, (3 + 0.6 * len(arms)) / 2.54)
        figure, axes = plt.subplots(
            1, len(budgets), figsize=size, sharey=True, layout="constrained", squeeze=False
        )
        for i, (ax, budget) in enumerate(zip(axes[0], budgets, strict=True)):
            colour, marker, _ = nth_style(i)
            ax.axvline(0, color="black", linewidth=0.8)
            for gap in gaps:
                if gap.budget_flops == budget and gap.loss is not None and gap.loss_interval:
                    low, high = gap.loss_interval
                    if math.isfinite(low) and math.isfinite(high):
                        spread = [[gap.loss - low], [high - gap.loss]]
                        ax.errorbar(gap.loss, arms.index(gap.arm), xerr=spread, color=colour,
                                    marker=marker, capsize=2)  # fmt: skip
            ax.set(title=f"{budget:.1e} FLOPs", xlabel="loss less dense, nats per token")
            ax.set_yticks(range(len(arms)), arms)
            ax.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=200)


if __name__ == "__main__":
    records, gaps = {}, {}
    for name, workdir in (argument.split("=", 1) for argument in sys.argv[1:]):
        trained = read_records(Path(workdir))
        write_csv(HERE / f"{name}.csv", trained)
        # What one can sample from: MoD by its predictor, experts without drops.
        causal = [dataclasses.replace(r, eval_loss=r.causal_loss or r.eval_loss) for r in trained]
        found = fit_all(causal, baseline=BASELINE)
        print(render_text(found))
        records[name], gaps[name] = causal, found.gaps
        draw(found.gaps, HERE / f"{name}.png")
    table(records)
    optima(gaps)
