"""Figure 6: losses under causal routing against top-k, and accuracy over training.

Usage: python -m experiments.fig6_autoregressive.plot NAME=WORKDIR ...
WORKDIR holds a sweep of configs/fig6_autoregressive.py. Writes its runs to NAME.csv and draws
NAME.png.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from experiments.compare import keep
from modjax.metrics_file import read_metrics
from modjax.records import RunRecord, run_dir
from modjax.scaling.report.markers import COLOURS, MARKERS, RC

HERE = Path(__file__).parent
# Training metrics of the arms that learn to select without the future.
ACCURACY = {"predictor": "predictor/accuracy", "auxiliary": "auxiliary/accuracy"}


def accuracy_curve(folder: Path, metric: str) -> tuple[list[float], list[float]]:
    lines = [line.values or {} for line in read_metrics(folder)]
    kept = [line for line in lines if metric in line]
    return [line["tokens"] for line in kept], [line[metric] for line in kept]


def draw(workdir: Path, records: list[RunRecord], path: Path) -> None:
    arms = list(dict.fromkeys(r.variant for r in records if r.causal_loss is not None))
    with plt.rc_context(RC):
        figure, (left, right) = plt.subplots(1, 2, figsize=(16 / 2.54, 6 / 2.54))
        for arm, colour, marker in zip(arms, COLOURS, MARKERS, strict=False):
            mine = [r for r in records if r.variant == arm]
            x = [r.params_non_embedding * 1.03 ** arms.index(arm) for r in mine]
            gaps = [100 * r.causal_difference / r.eval_loss for r in mine]
            bars = [100 * r.causal_difference_sem / r.eval_loss for r in mine]
            left.errorbar(x, gaps, bars, fmt=marker, color=colour, label=arm, linewidth=0.8)
            if arm in ACCURACY:
                middle = sorted({r.d_model for r in mine})[-2]
                for r in mine:
                    if r.d_model == middle:
                        curve = accuracy_curve(run_dir(workdir, r.run_id), ACCURACY[arm])
                        right.plot(*curve, color=colour, label=arm if r.seed == 0 else None)
        left.axhline(0, color="#d4d4d4", linewidth=0.6, zorder=0)
        left.set(xscale="log", xlabel="non-embedding parameters")
        left.set_ylabel("causal loss over top-k loss, %")
        right.axhline(0.875, color="#d4d4d4", linewidth=0.6, zorder=0)
        right.text(0, 0.878, 'always "no"', color="#777777")
        right.set(xlabel="tokens", ylabel="accuracy on the training batch", ylim=(0.8, 1))
        left.xaxis.set_minor_formatter(NullFormatter())
        left.legend()
        right.legend(loc="lower right")
        figure.tight_layout()
        figure.savefig(path, dpi=200)


if __name__ == "__main__":
    for name, workdir, records in keep(HERE, sys.argv[1:]):
        draw(workdir, records, HERE / f"{name}.png")
