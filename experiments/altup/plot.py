"""Alternating Updates and its relatives against dense, each at its own optimum.

Usage: python -m experiments.altup.plot NAME[=WORKDIR] ...
WORKDIR holds a sweep of configs/altup.py. Writes its runs to NAME.csv and draws NAME.png.
"""

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.compare import Optima, causal, keep, optima
from modjax.scaling.report.markers import RC, nth_style

HERE = Path(__file__).parent


def draw(found: Optima, path: Path) -> None:
    """Draws every arm's loss minus that of dense, with its interval."""
    arms = sorted({arms for _, arms in found}, reverse=True)
    budgets = sorted({budget for budget, _ in found})
    with plt.rc_context(RC):
        size = (18 / 2.54, (3 + 0.6 * len(arms)) / 2.54)
        figure, axes = plt.subplots(
            1, len(budgets), figsize=size, sharey=True, layout="constrained", squeeze=False
        )
        for i, (ax, budget) in enumerate(zip(axes[0], budgets, strict=True)):
            colour, marker, _ = nth_style(i)
            ax.axvline(0, color="black", linewidth=0.8)
            for (at, named), d in found.items():
                if at == budget and math.isfinite(d.low) and math.isfinite(d.high):
                    spread = [[d.mean - d.low], [d.high - d.mean]]
                    style = {"color": colour, "marker": marker, "capsize": 2}
                    ax.errorbar(d.mean, arms.index(named), xerr=spread, **style)
            ax.set(title=f"{budget:.1e} FLOPs", xlabel="loss less dense, nats per token")
            ax.set_yticks(range(len(arms)), [named.removesuffix(" - dense") for named in arms])
            ax.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=200)


if __name__ == "__main__":
    for name, _, records in keep(HERE, sys.argv[1:]):
        draw(optima(causal(records), "dense"), HERE / f"{name}.png")
