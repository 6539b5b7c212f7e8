"""Figure 7: experts, MoD and both at equal training FLOPs.

Usage: python experiments/fig7_mode/plot.py WORKDIR NAME   (of a configs/fig7_mode.py sweep)
Writes NAME.png and NAME.csv beside this file, and prints the tables of README.md.
"""

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from modjax.records import Record, read_records, write_csv
from modjax.scaling.fit import fit_all
from modjax.scaling.marks import RC, nth_style
from modjax.scaling.observed import Repeated, by_cell
from modjax.scaling.words import render_text

HERE = Path(__file__).parent
BASELINE = "dense"
AXES = {
    "params_total": "total parameters",
    "params_active": "active parameters,\nwithout embeddings",
    "forward_flops_per_token": "forward FLOPs per token /\nthose of the optimal baseline",
}


def cells(records: list[Record]) -> dict[float, dict[str, list[Repeated]]]:
    """Those of every arm, by size, for every budget."""
    found: dict[float, dict[str, list[Repeated]]] = {}
    for (arm, budget), sizes in by_cell(records).items():
        found.setdefault(budget, {})[arm] = sizes
    return dict(sorted(found.items()))


def loss(runs: Repeated) -> float:
    return statistics.mean(r.eval_loss for r in runs if r.eval_loss is not None)


def best(sizes: list[Repeated]) -> Repeated:
    return min(sizes, key=loss)


def draw(records: list[Record], path: Path) -> None:
    budgets = cells(records)
    with plt.rc_context(RC):
        size = (18 / 2.54, (1 + 5.5 * len(budgets)) / 2.54)
        figure, axes = plt.subplots(
            len(budgets), len(AXES), figsize=size, sharey="row", layout="constrained"
        )
        for row, (budget, by_arm) in zip(axes, budgets.items(), strict=True):
            least = best(by_arm[BASELINE])
            for ax, (name, label) in zip(row, AXES.items(), strict=True):
                relative = name == "forward_flops_per_token"
                scale = least[0].forward_flops_per_token if relative else 1.0
                for i, (arm, sizes) in enumerate(by_arm.items()):
                    colour, marker, line = nth_style(i)
                    x = [getattr(runs[0], name) / scale for runs in sizes]
                    y = [loss(runs) / loss(least) for runs in sizes]
                    ax.plot(x, y, color=colour, marker=marker, linestyle=line, label=arm)
                ax.set(xscale="log", xlabel=label, ylim=(None, 1.12))
                ax.xaxis.set_minor_formatter(NullFormatter())
            row[0].set_ylabel(f"{budget:.0e} FLOPs: loss /\nthat of the optimal baseline")
        lines, names = axes[0][0].get_legend_handles_labels()
        figure.legend(lines, names, ncols=len(names), loc="outside upper center")
        figure.savefig(path, dpi=200)


def table(records: list[Record]) -> None:
    print("| budget | arm | best width | total | active | loss of each seed | against dense | "
          "dropped | no-op | useful | causal difference |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for budget, by_arm in cells(records).items():
        dense = loss(best(by_arm[BASELINE]))
        for arm, sizes in sorted(by_arm.items(), key=lambda item: loss(best(item[1]))):
            runs = best(sizes)
            r = runs[0]
            shares = [
                "" if value is None else f"{value:.1%}"
                for value in (r.moe_dropped, r.moe_no_op, r.moe_useful)
            ]
            gaps = [x.causal_difference for x in runs if x.causal_difference is not None]
            print(
                f"| {budget:.0e} | {arm} | {r.d_model} | {r.params_total / 1e3:.0f}k | "
                f"{r.params_active / 1e3:.0f}k | {', '.join(f'{x.eval_loss:.4f}' for x in runs)} | "
                f"{100 * (loss(runs) / dense - 1):+.2f}% | {' | '.join(shares)} | "
                f"{f'{statistics.mean(gaps):+.4f}' if gaps else ''} |"
            )


def paired(records: list[Record]) -> None:
    """Arms of equal shapes against each other, over runs of equal width, budget and seed."""
    losses = {(r.variant, r.budget_flops, r.d_model, r.seed): r.eval_loss for r in records}
    for arm, other in (("integrated", "reduced"), ("integrated", "random"), ("random", "reduced")):
        pairs = [
            a - losses[other, *rest]
            for (name, *rest), a in losses.items()
            if name == arm and a is not None and (other, *rest) in losses
        ]
        if len(pairs) > 1:
            error = statistics.stdev(pairs) / len(pairs) ** 0.5
            print(f"{arm} - {other}: {statistics.mean(pairs):+.4f} +- {error:.4f}, {len(pairs)}")


if __name__ == "__main__":
    workdir, name = Path(sys.argv[1]), sys.argv[2]
    records = read_records(workdir)
    write_csv(HERE / f"{name}.csv", records)
    table(records)
    paired(records)
    print(render_text(fit_all(records, baseline=BASELINE)))
    draw(records, HERE / f"{name}.png")
