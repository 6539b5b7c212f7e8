"""Alternating Updates and its relatives against dense, and against their controls.

Usage: python experiments/altup/plot.py WORKDIR NAME   (of a configs/altup.py sweep)
Writes NAME.png and NAME.csv beside this file, and prints the tables of README.md.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
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
        "moe", "altup-moe",
    )),
    ("recycled2", "same2"), ("full2", "sum2"), ("full2", "recycled2"), ("seq4", "skip4"),
    ("seq4", "pool4"), ("seq4", "mod25"), ("skip4", "mod25"), ("altup-mod12", "mod12"),
    ("altup-moe", "moe"),
)  # fmt: skip
TOLD = 0.005  # nats


class Difference(NamedTuple):
    """The mean over pairs of runs of equal budget, width and seed, and its 95% interval."""

    mean: float
    low: float
    high: float
    pairs: int
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
    return Difference(mean, mean - half, mean + half, len(pairs), deviation)


def table(records: list[Record], pairs: Iterable[tuple[str, str]]) -> None:
    print(f"| budget | arm | less | difference | 95% interval | pairs | needed for {TOLD} |")
    print("|---|---|---|---|---|---|---|")
    for budget in sorted({r.budget_flops for r in records}):
        for arm, other in pairs:
            d = difference(records, arm, other, budget)
            if d is not None:
                print(f"| {budget:.1e} | {arm} | {other} | {d.mean:+.4f} | "
                      f"{d.low:+.4f} to {d.high:+.4f} | {d.pairs} | {d.needed} |")  # fmt: skip


def optima(gaps: Sequence[Gap]) -> None:
    """Each arm at its own optimum against dense at its own, as `modjax fit` has them."""
    print("| budget | arm | loss less dense | 95% interval | forward FLOPs over dense |")
    print("|---|---|---|---|---|")
    for gap in sorted(gaps, key=lambda gap: (gap.budget_flops, gap.loss or math.inf)):
        if gap.loss is not None and gap.loss_interval is not None:
            low, high = gap.loss_interval
            print(f"| {gap.budget_flops:.1e} | {gap.arm} | {gap.loss:+.4f} | {low:+.4f} to "
                  f"{high:+.4f} | {gap.flops_ratio:.2f} |")  # fmt: skip


def draw(gaps: Sequence[Gap], path: Path) -> None:
    """Every arm's loss less that of dense, each at its own optimum, with its interval."""
    arms = sorted({gap.arm for gap in gaps}, reverse=True)
    budgets = sorted({gap.budget_flops for gap in gaps})
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
            ax.set(title=f"{budget:.1e} FLOPs", xlabel="loss less dense, nats per byte")
            ax.set_yticks(range(len(arms)), arms)
            ax.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=200)


if __name__ == "__main__":
    workdir, name = Path(sys.argv[1]), sys.argv[2]
    trained = read_records(workdir)
    write_csv(HERE / f"{name}.csv", trained)
    # What one can sample from: MoD by its predictor, experts without drops, all others as trained.
    records = [dataclasses.replace(r, eval_loss=r.causal_loss or r.eval_loss) for r in trained]
    table(records, PAIRS)
    found = fit_all(records, baseline=BASELINE)
    optima(found.gaps)
    print(render_text(found))
    draw(found.gaps, HERE / f"{name}.png")
