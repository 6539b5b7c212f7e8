"""Figure 3: every routing scheme at one budget, and learning curves of four models.

Usage: python -m experiments.fig3_variants.plot NAME=WORKDIR ...
WORKDIR holds a sweep of configs/fig3_variants.py. Writes its runs to NAME.csv and draws NAME.png,
with the losses as trained.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from experiments.compare import best, cells, keep, loss
from modjax.records import RunRecord
from modjax.scaling.fit.cells import Repeated
from modjax.scaling.report.learning_curves import read_curves
from modjax.scaling.report.markers import COLOURS, RC, nth_style

HERE = Path(__file__).parent
# Far worse than all others at every size: on its scale they could not be distinguished.
OFF_SCALE = "mod12-every"


def draw(workdir: Path, records: list[RunRecord], path: Path) -> None:
    (by_arm,) = cells(records).values()  # the sweep has one budget
    curves = {curve.run_id: curve for curve in read_curves(workdir, records).curves}
    with plt.rc_context(RC):
        figure, (left, right) = plt.subplots(1, 2, figsize=(18 / 2.54, 8 / 2.54))
        for i, (arm, sizes) in enumerate(by_arm.items()):
            colour, marker, line = nth_style(i)
            x = [runs[0].params_non_embedding for runs in sizes]
            y = [loss(runs) for runs in sizes]
            left.plot(x, y, color=colour, marker=marker, linestyle=line, label=arm)
        shown = [loss(runs) for arm, sizes in by_arm.items() if arm != OFF_SCALE for runs in sizes]
        low, room = min(shown), 0.07 * (max(shown) - min(shown))
        left.set(xscale="log", ylim=(low - room, max(shown) + room))
        left.set(xlabel="non-embedding parameters", ylabel="validation loss, nats per byte")
        off = [loss(runs) for runs in by_arm[OFF_SCALE]]
        note = f"{OFF_SCALE}: {min(off):.2f} to {max(off):.2f}"
        left.text(0.02, 0.02, note, transform=left.transAxes, color="#777777", fontsize=5.5)
        left.xaxis.set_minor_formatter(NullFormatter())
        left.legend(ncols=3, fontsize=5.5, loc="lower center", bbox_to_anchor=(0.5, 1))
        for record, colour in zip(four(by_arm), COLOURS, strict=False):
            label = f"{record.variant} {record.params_non_embedding / 1e3:.0f}k"
            right.plot(*curves[record.run_id].smooth, color=colour, label=label)
        right.set(xscale="log", xlim=(1e10, 4e11), ylim=(low - 0.05, low + 0.8))
        right.set(xlabel="training FLOPs", ylabel="training loss")
        right.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=200)


def four(by_arm: dict[str, list[Repeated]]) -> list[RunRecord]:
    """Returns the best dense model, and MoD models of its size, of the best and the largest."""
    mod, (dense, *_) = by_arm["mod12"], best(by_arm["dense"])
    nearest = min(mod, key=lambda of: abs(of[0].params_non_embedding - dense.params_non_embedding))
    return [dense, *(runs[0] for runs in mod if runs in (nearest, best(mod), mod[-1]))]


if __name__ == "__main__":
    for name, workdir, records in keep(HERE, sys.argv[1:]):
        draw(workdir, records, HERE / f"{name}.png")
