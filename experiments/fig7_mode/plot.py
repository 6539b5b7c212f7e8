"""Figure 7: experts, MoD and both at equal training FLOPs.

Usage: python -m experiments.fig7_mode.plot NAME[=WORKDIR] ...
WORKDIR holds a sweep of configs/fig7_mode.py. Writes its runs to NAME.csv and draws NAME.png.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from experiments.compare import best, causal, cells, keep, loss
from modjax.records import RunRecord
from modjax.scaling.report.markers import RC, nth_style

HERE = Path(__file__).parent
BASELINE = "dense"
AXES = {
    "params_total": "total parameters",
    "params_active": "active parameters,\nwithout embeddings",
    "forward_flops_per_token": "forward FLOPs per token /\nthose of the optimal baseline",
}


def draw(records: list[RunRecord], path: Path) -> None:
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


if __name__ == "__main__":
    for name, _, records in keep(HERE, sys.argv[1:]):
        draw(causal(records), HERE / f"{name}.png")
